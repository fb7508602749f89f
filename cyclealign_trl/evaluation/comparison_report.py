"""Report of a comparison of two models: figures, tables and files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..types import RankingResult, Usage
from .comparison import Comparison
from .intervals import bootstrap_ratios
from .markdown_table import markdown_table, printable
from .win_rates import win_rates

Figures = Mapping[str, Any]
_RATES = {
    "win_rate": "win rate",
    "length_controlled_win_rate": "win rate at equal lengths",
    "net_win_rate": "wins minus losses",
}


@dataclass(frozen=True)
class ComparisonReport:
    """Verdicts of a judge on two models, by criteria, by group and in all.

    Args:
        model_a: Name of the model whose wins are counted.
        model_b: Name of the model that it is compared with.
        judge: Name of the judge.
        comparisons: Comparisons by the name of their criteria, for the same prompts.
        without_reply: Prompts that one of the models did not answer, which are left out.
        confidence_level: Coverage of the intervals.
        n_resamples: Number of bootstrap resamples of the prompts.
        seed: Seed of the resamples.
    """

    model_a: str
    model_b: str
    judge: str
    comparisons: Mapping[str, Sequence[Comparison]]
    without_reply: int = 0
    confidence_level: float = 0.95
    n_resamples: int = 1000
    seed: int = 0

    @cached_property
    def figures(self) -> dict[str, Any]:
        """Return the figures by criteria, as JSON-compatible data.

        - `all` and `groups`: results of `win_rates` over all prompts, and over those of each group.
        - `prompts`; the number of `equal` replies; `failures` by reason.
        - `position`: `flip_rate`, the share of prompts whose verdict is opposite when the replies swap places, and
          `first_shown_wins`, how often the reply shown first wins if there is no tie (0.5 without bias), with
          intervals.
        - `mean_length`: mean characters of the replies of A and B.
        - `usage`: tokens, attempts and US dollars (`cost`; `None` if unknown), and the number of `cached` verdicts,
          which an earlier run paid for.
        """
        return {criteria: self._figures(comparisons) for criteria, comparisons in self.comparisons.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-compatible data, without the single verdicts."""
        return {
            "model_a": self.model_a,
            "model_b": self.model_b,
            "judge": self.judge,
            "without_reply": self.without_reply,
            "confidence_level": self.confidence_level,
            "n_resamples": self.n_resamples,
            "seed": self.seed,
            "criteria": self.figures,
        }

    def to_markdown(self) -> str:
        """Return a sentence and a Markdown table for each criteria."""
        parts = []
        for criteria, figures in self.figures.items():
            parts += [self._sentence(criteria, figures), self._table(criteria, figures), *_notes(figures)]
        if self.without_reply:
            parts.append(f"{self.without_reply} prompts without a reply of both models, left out.")
        return "\n\n".join(parts)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one row per criteria and prompt, with both verdicts and the judge's reasoning."""
        return [
            {
                "criteria": criteria,
                "prompt_id": comparison.pair.prompt.id,
                "group": comparison.pair.prompt.group,
                "prompt": comparison.pair.prompt.prompt,
                "reply_a": comparison.pair.reply_a,
                "reply_b": comparison.pair.reply_b,
                "verdict": comparison.verdict,
                "verdict_a_first": comparison.verdicts[0],
                "verdict_b_first": comparison.verdicts[1],
                "reasoning_a_first": _reasoning(comparison, 0),
                "reasoning_b_first": _reasoning(comparison, 1),
                "failure": comparison.failure and comparison.failure.reason,
                "detail": comparison.failure and comparison.failure.detail,
            }
            for criteria, comparisons in self.comparisons.items()
            for comparison in comparisons
        ]

    def save(self, output_dir: str | PathLike[str]) -> list[str]:
        """Write `report.json`, `report.md`, and `comparisons.jsonl` with the rows of `to_rows`.

        Returns:
            The names of the files.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.to_markdown() + "\n", encoding="utf-8")
        with open(folder / "comparisons.jsonl", "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in self.to_rows())
        return ["report.json", "report.md", "comparisons.jsonl"]

    def _figures(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        groups = dict.fromkeys(comparison.pair.prompt.group for comparison in comparisons)
        failures = Counter(comparison.failure.reason for comparison in comparisons if comparison.failure is not None)
        pairs = [comparison.pair for comparison in comparisons]
        return {
            "all": self._rates(comparisons),
            "groups": {
                group: self._rates([one for one in comparisons if one.pair.prompt.group == group]) for group in groups
            },
            "prompts": len(pairs),
            "equal": sum(pair.equal for pair in pairs),
            "failures": dict(sorted(failures.items())),
            "position": self._position(comparisons),
            "mean_length": [
                fmean(map(len, replies)) if pairs else None
                for replies in ([pair.reply_a for pair in pairs], [pair.reply_b for pair in pairs])
            ],
            "usage": _usage(comparisons),
        }

    def _rates(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        judged = [(one.pair, verdict) for one in comparisons if (verdict := one.verdict) is not None]
        return win_rates(
            [verdict for _, verdict in judged],
            [len(pair.reply_a) - len(pair.reply_b) for pair, _ in judged],
            n_resamples=self.n_resamples,
            confidence_level=self.confidence_level,
            seed=self.seed,
        )

    def _position(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        asked = [one for one in comparisons if one.outcomes is not None and one.verdict is not None]
        # With A shown first, a win of A is one of the first reply; with B shown first, a loss of A is.
        first_wins = [(one.verdicts[0] == "win") + (one.verdicts[1] == "lose") for one in asked]
        decided = [sum(verdict != "tie" for verdict in one.verdicts) for one in asked]
        numerators = np.array([[one.flips for one in asked], first_wins], dtype=float).T.reshape(-1, 2)  # (B, 2)
        denominators = np.array([[1] * len(asked), decided], dtype=float).T.reshape(-1, 2)
        estimates = bootstrap_ratios(numerators, denominators, self.n_resamples, self.confidence_level, self.seed)
        position: dict[str, Any] = {}
        for name, (value, interval) in zip(("flip_rate", "first_shown_wins"), estimates, strict=True):
            position |= {name: value, f"{name}_interval": interval and list(interval)}
        return position

    def _sentence(self, criteria: str, figures: Figures) -> str:
        rates = figures["all"]
        title = f"{printable(self.model_a)} against {printable(self.model_b)} ({printable(criteria)})"
        if rates["win_rate"] is None:
            return f"{title}: no verdict."
        low, high = rates["win_rate_interval"]
        return (
            f"{title}: {rates['win_rate']:.1f} % wins, {self.confidence_level:.0%} interval {low:.1f} to {high:.1f}. "
            f"Judge: {printable(self.judge)}, both orders. Ties count one half."
        )

    def _table(self, criteria: str, figures: Figures) -> str:
        header = [criteria, "prompts", "win", "tie", "lose", *_RATES.values()]
        rows = {name: _cells(rates) for name, rates in figures["groups"].items()}
        if len(rows) != 1:
            rows["All"] = _cells(figures["all"])
        return markdown_table(header, rows)


def _cells(rates: Figures) -> list[str]:
    counts = [rates[verdict] for verdict in ("win", "tie", "lose")]
    return [str(sum(counts)), *map(str, counts), *(_with_interval(rates, name) for name in _RATES)]


def _with_interval(figures: Figures, name: str, digits: int = 1) -> str:
    value, interval = figures[name], figures[f"{name}_interval"]
    if value is None or interval is None:
        return "-"
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _notes(figures: Figures) -> list[str]:
    position, usage = figures["position"], figures["usage"]
    lines = []
    if position["flip_rate"] is not None:
        lines.append(
            f"Swapping the replies flips the verdict on a share of {_with_interval(position, 'flip_rate', 2)} of the "
            f"prompts. The reply shown first wins {_with_interval(position, 'first_shown_wins', 2)} of the verdicts "
            "that are no ties."
        )
    if figures["equal"]:
        lines.append(f"{figures['equal']} of {figures['prompts']} prompts have equal replies, which are ties.")
    if figures["failures"]:
        reasons = ", ".join(f"{printable(reason)} {count}" for reason, count in figures["failures"].items())
        lines.append(f"Prompts without a verdict in both orders, left out: {reasons}.")
    if usage["attempts"] or usage["cached"]:
        cost = "unpriced" if usage["cost"] is None else f"${usage['cost']:,.2f}"
        lines.append(
            f"{usage['attempts']:,} calls, {usage['prompt_tokens']:,} prompt and {usage['completion_tokens']:,} "
            f"completion tokens, {cost}. {usage['cached']:,} verdicts were stored before."
        )
    return lines


def _reasoning(comparison: Comparison, index: int) -> str | None:
    outcome = None if comparison.outcomes is None else comparison.outcomes[index]
    return outcome.reasoning if isinstance(outcome, RankingResult) else None


def _usage(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    outcomes = [outcome for one in comparisons for outcome in one.outcomes or ()]
    usages = [outcome.usage for outcome in outcomes if outcome.usage is not None]
    paid = [usage for usage in usages if not usage.cached]
    total = sum(paid, Usage(attempts=0))
    return {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "attempts": total.attempts,
        "cost": None if any(usage.cost is None and usage.prompt_tokens for usage in paid) else total.cost or 0.0,
        "cached": sum(usage.cached for usage in usages),
    }
