"""Totals of a run's interactions, in a size that does not grow with the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from operator import itemgetter
from typing import Any

from .agreement import agreement_rate, without_ties
from .interaction import SKIPPED, InteractionResult
from .interaction_log import InteractionLog, to_row

CurvePoint = tuple[int, float]
"""A step, and the mean agreement of the rankings since the point before it."""

SUMMARY_COLUMNS = ["step", "agreement", "ranks", "failure", "usage"]
"""Columns that the totals are made from."""

MAX_BINS = 400
"""Number of parts of the run whose agreement is kept. Beyond it, neighbours are added up."""


@dataclass(slots=True)
class Expense:
    """Tokens and cost of some of the ranker's answers.

    Args:
        answers: Number of answers.
        prompt_tokens: Tokens sent.
        completion_tokens: Tokens received.
        cost: US dollars, over the answers with a known price.
        priced: Number of answers with a known price.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    priced: int = 0

    def add(self, usages: Sequence[Mapping[str, Any]]) -> None:
        """Add answers."""
        costs = [usage["cost"] for usage in usages if usage["cost"] is not None]
        self.answers += len(usages)
        self.prompt_tokens += sum(usage["prompt_tokens"] for usage in usages)
        self.completion_tokens += sum(usage["completion_tokens"] for usage in usages)
        self.cost += math.fsum(costs)  # the same for any order of the processes
        self.priced += len(costs)

    @property
    def tokens_text(self) -> str:
        """Tokens as text."""
        return f"{self.prompt_tokens:,} prompt, {self.completion_tokens:,} completion"

    @property
    def cost_text(self) -> str:
        """Cost as text: `unpriced`, not 0, if no price is known."""
        if self.priced == 0:
            return "unpriced"
        dollars = f"${self.cost:,.2f}" if self.cost >= 0.1 else f"${self.cost:.2g}"
        if self.priced == self.answers:
            return dollars
        return f"{dollars} for {self.priced:,} of {self.answers:,} answers, the others unpriced"


@dataclass(slots=True)
class AgreementBin:
    """Agreement of the rankings of some successive steps.

    Args:
        last_step: The last of the steps.
        num_steps: Number of steps with a ranking.
        num_rankings: Number of rankings.
        total: Sum of their agreement rates.
    """

    last_step: int
    num_steps: int
    num_rankings: int
    total: float


@dataclass(slots=True)
class InteractionTotals:
    """Totals of interactions, added step by step.

    Args:
        min_agreement: Number of completions that make a demonstration.
        interactions: Number of rows.
        rankings: Number of rows with a ranking.
        agreed: Number of rankings whose agreement made a demonstration.
        tied: Number of rankings that prefer no completion.
        reasons: Number of rows without a ranking, by reason.
        billed: Expense of the answers that were paid for.
        cached: Expense of the cached answers, when they were first asked for.
        bins: Agreement over the run, in at most `MAX_BINS` parts.
        steps_per_bin: Number of steps with a ranking in each part but the last one.
    """

    min_agreement: int
    interactions: int = 0
    rankings: int = 0
    agreed: int = 0
    tied: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    billed: Expense = field(default_factory=Expense)
    cached: Expense = field(default_factory=Expense)
    bins: list[AgreementBin] = field(default_factory=list)
    steps_per_bin: int = 1

    @property
    def failures(self) -> dict[str, int]:
        """Number of failed rankings by reason."""
        return {reason: count for reason, count in self.reasons.items() if reason not in SKIPPED}

    @property
    def skipped(self) -> dict[str, int]:
        """Number of prompts that were not ranked by reason."""
        return {reason: count for reason, count in self.reasons.items() if reason in SKIPPED}

    def add(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the interactions of one step of all processes, as rows with the columns `SUMMARY_COLUMNS`."""
        rates: list[float] = []
        usages: dict[bool, list[Mapping[str, Any]]] = {False: [], True: []}
        for row in rows:
            self.interactions += 1
            if row["failure"] is not None:
                self.reasons[row["failure"]] = self.reasons.get(row["failure"], 0) + 1
            if row["ranks"] is not None:
                self.rankings += 1
                self.tied += len(set(row["ranks"])) < 2
            if row["agreement"] is not None and len(set(row["ranks"])) > 1:
                self.agreed += len(without_ties(row["agreement"], row["ranks"])) >= self.min_agreement
                rates.append(agreement_rate(row["agreement"], row["ranks"]))
            if row["usage"] is not None:
                usages[row["usage"]["cached"]].append(row["usage"])
        self.billed.add(usages[False])
        self.cached.add(usages[True])
        if rates:
            self._add_rates(AgreementBin(step, 1, len(rates), math.fsum(rates)))

    def curve(self, max_points: int) -> list[CurvePoint]:
        """Return the mean agreement over the run in up to `max_points` points, all rankings weighted alike."""
        bins = _in_groups(self.bins, max(1, math.ceil(len(self.bins) / max_points)))
        return [(part.last_step, part.total / part.num_rankings) for part in bins]

    def state_dict(self) -> dict[str, Any]:
        """Return the totals as JSON data."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> InteractionTotals:
        """Return the totals of which `state_dict` is the data."""
        return cls(
            **{
                **{name: state[name] for name in (field.name for field in fields(cls))},
                "billed": Expense(**state["billed"]),
                "cached": Expense(**state["cached"]),
                "bins": [AgreementBin(**part) for part in state["bins"]],
            }
        )

    def _add_rates(self, step: AgreementBin) -> None:
        if self.bins and self.bins[-1].num_steps < self.steps_per_bin:
            self.bins[-1] = _sum([self.bins[-1], step])
            return
        if len(self.bins) == MAX_BINS:
            self.bins = _in_groups(self.bins, 2)
            self.steps_per_bin *= 2
        self.bins.append(step)


def summarize(rows: Iterable[Mapping[str, Any]], min_agreement: int) -> InteractionTotals:
    """Add up the rows of a log.

    Args:
        rows: Rows with at least the columns `SUMMARY_COLUMNS`, by step.
        min_agreement: Number of completions that make a demonstration.
    """
    totals = InteractionTotals(min_agreement)
    for step, of_step in groupby(rows, key=itemgetter("step")):
        totals.add(step, of_step)
    return totals


class RunningTotals:
    """Totals of a run that are kept while it trains, so that nothing reads its log again.

    The log is read once where nobody kept them: for the checkpoint of an earlier version, and for a model card of a
    trainer that has not trained.

    Args:
        log: Log of the run.
        min_agreement: Number of completions that make a demonstration.
    """

    def __init__(self, log: InteractionLog, min_agreement: int) -> None:
        self._log = log
        self._min_agreement = min_agreement
        self._totals: InteractionTotals | None = None

    def start(self) -> None:
        """Start a run at step 0."""
        self._totals = InteractionTotals(self._min_agreement)

    def observe(self, step: int, results: Iterable[InteractionResult]) -> None:
        """Add the results of one step of all processes."""
        if self._totals is None:
            self._totals = self._read(before=step)
        self._totals.add(step, [to_row(step, 0, result) for result in results])

    def state_dict(self) -> dict[str, Any] | None:
        """Return the totals as JSON data, or `None` if no step was observed."""
        return None if self._totals is None else self._totals.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what `state_dict` returned. With `None`, the log is read."""
        if state is None:
            self._totals = None
        else:  # `min_agreement` may change between the parts of a run
            self._totals = InteractionTotals.from_state_dict({**state, "min_agreement": self._min_agreement})

    def current(self) -> InteractionTotals:
        """Return the totals so far."""
        return self._read() if self._totals is None else self._totals

    def _read(self, before: int | None = None) -> InteractionTotals:
        if not self._log.paths:
            return InteractionTotals(self._min_agreement)
        rows = self._log.read(SUMMARY_COLUMNS).to_pylist()
        return summarize((row for row in rows if before is None or row["step"] < before), self._min_agreement)


def _in_groups(bins: Sequence[AgreementBin], size: int) -> list[AgreementBin]:
    return [_sum(bins[start : start + size]) for start in range(0, len(bins), size)]


def _sum(bins: Sequence[AgreementBin]) -> AgreementBin:
    return AgreementBin(
        last_step=bins[-1].last_step,
        num_steps=sum(part.num_steps for part in bins),
        num_rankings=sum(part.num_rankings for part in bins),
        total=sum(part.total for part in bins),
    )
