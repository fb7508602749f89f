"""What a run's log of interactions adds up to: counts, costs, and how far policy and ranker agreed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..interaction import SKIPPED

COLUMNS = ["step", "black_box_order", "agreement", "ranks", "failure", "usage"]
"""The columns of the log that a summary reads."""

CurvePoint = tuple[int, float]
"""A step, and the agreement of the rankings since the point before it."""


@dataclass(frozen=True, slots=True)
class Expense:
    """What some of the ranker's answers took.

    Args:
        answers: How many.
        prompt_tokens: Tokens sent.
        completion_tokens: Tokens received.
        cost: US dollars, of the answers whose price is known.
        priced: How many those are.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    priced: int = 0

    @property
    def tokens_text(self) -> str:
        """The tokens in words."""
        return f"{self.prompt_tokens:,} prompt, {self.completion_tokens:,} completion"

    @property
    def cost_text(self) -> str:
        """The cost in words. Where no price is known it is none, and never 0."""
        if self.priced == 0:
            return "unpriced"
        dollars = f"${self.cost:,.2f}" if self.cost >= 0.1 else f"${self.cost:.2g}"
        if self.priced == self.answers:
            return dollars
        return f"{dollars} for {self.priced:,} of {self.answers:,} answers, the others unpriced"


@dataclass(frozen=True, slots=True)
class InteractionSummary:
    """The sums of a log.

    Args:
        interactions: Rows.
        rankings: Those with a ranking.
        agreed: Rankings whose agreement is long enough for a demonstration.
        failures: Failed rankings by kind.
        skipped: Prompts that were not ranked, by why.
        billed: What the answers took that were paid for.
        cached: What those took that came from the cache, when they were first asked for.
        agreement: Per step, the share of completions that policy and ranker order alike, for each ranking.
    """

    interactions: int
    rankings: int
    agreed: int
    failures: Mapping[str, int]
    skipped: Mapping[str, int]
    billed: Expense
    cached: Expense
    agreement: Mapping[int, Sequence[float]]

    def curve(self, max_points: int) -> list[CurvePoint]:
        """The mean agreement over the run, in so many points at most; every ranking weighs the same in its point."""
        steps = sorted(self.agreement)
        size = max(1, math.ceil(len(steps) / max_points))
        parts = [steps[start : start + size] for start in range(0, len(steps), size)]
        return [(part[-1], fmean(rate for step in part for rate in self.agreement[step])) for part in parts]


def summarize(rows: Iterable[Mapping[str, Any]], min_agreement: int) -> InteractionSummary:
    """Adds up the rows of a log.

    Args:
        rows: With the columns `COLUMNS` at least.
        min_agreement: How many completions make a demonstration.
    """
    number = rankings = agreed = 0
    reasons: Counter[str] = Counter()
    agreement: defaultdict[int, list[float]] = defaultdict(list)
    usages: dict[bool, list[Mapping[str, Any]]] = {False: [], True: []}
    for row in rows:
        number += 1
        if row["failure"] is not None:
            reasons[row["failure"]] += 1
        if row["agreement"] is not None:
            rankings += 1
            agreed += len({row["ranks"][index] for index in row["agreement"]}) >= min_agreement  # ties show no order
            agreement[row["step"]].append(len(row["agreement"]) / len(row["black_box_order"]))
        if row["usage"] is not None:
            usages[row["usage"]["cached"]].append(row["usage"])
    return InteractionSummary(
        interactions=number,
        rankings=rankings,
        agreed=agreed,
        failures={reason: count for reason, count in reasons.items() if reason not in SKIPPED},
        skipped={reason: count for reason, count in reasons.items() if reason in SKIPPED},
        billed=_expense(usages[False]),
        cached=_expense(usages[True]),
        agreement=dict(agreement),
    )


def plot_agreement(curve: Sequence[CurvePoint], path: Path) -> None:
    """Draws the curve as a PNG. Needs `matplotlib`."""
    from matplotlib.figure import Figure  # without pyplot, which would keep the figure and ask for a display
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), marker="o", markersize=3)
    axes.set(xlabel="optimiser step", ylabel="agreement", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    unfinished = path.with_suffix(".tmp")
    figure.savefig(unfinished, dpi=150, format="png")
    unfinished.replace(path)


def _expense(usages: Sequence[Mapping[str, Any]]) -> Expense:
    costs = [usage["cost"] for usage in usages if usage["cost"] is not None]
    return Expense(
        answers=len(usages),
        prompt_tokens=sum(usage["prompt_tokens"] for usage in usages),
        completion_tokens=sum(usage["completion_tokens"] for usage in usages),
        cost=math.fsum(costs),
        priced=len(costs),
    )
