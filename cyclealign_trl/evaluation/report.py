"""What a ranker's answers to rows of known order come to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..rankers.base import Outcome
from ..types import Demonstration, RankingResult, Usage
from .metrics.position_bias import PositionBias
from .metrics.ranking_agreement import RankingAgreement
from .references import ReferenceRanking
from .report_tables import figures_table, positions_table, subsets_table


@dataclass(frozen=True, slots=True)
class JudgedRanking:
    """One answer.

    Args:
        reference: Index of the row in the report's references.
        num_demonstrations: How many demonstrations were shown.
        reverse: Whether this is the second ranking of the row, shown in reverse order.
        shown: Indices of the row's completions, in the order in which they were shown.
        outcome: The ranking, whose indices are shown positions; or the failure.
        seconds: How long the ranker took, its retries and its waits included; `None` for an answer from the cache.
    """

    reference: int
    num_demonstrations: int
    reverse: bool
    shown: tuple[int, ...]
    outcome: Outcome
    seconds: float | None

    @property
    def ranks(self) -> list[int] | None:
        """The rank of each of the row's completions; `None` where the ranking failed."""
        if not isinstance(self.outcome, RankingResult):
            return None
        by_index = dict(zip(self.shown, self.outcome.resolved_ranks, strict=True))
        return [by_index[index] for index in range(len(self.shown))]


@dataclass(frozen=True)
class JudgeReport:
    """How well a ranker does, for each number of demonstrations.

    Args:
        ranker: The ranker's name.
        references: The rows that were ranked.
        demonstrations: The demonstrations; those shown are the first ones.
        dropped: How many rows were left out, by reason.
        rankings: All answers.
        confidence_level: Coverage of the intervals.
        seed: The seed.
    """

    ranker: str
    references: tuple[ReferenceRanking, ...]
    demonstrations: tuple[Demonstration, ...]
    dropped: dict[str, int]
    rankings: tuple[JudgedRanking, ...]
    confidence_level: float
    seed: int

    @cached_property
    def figures(self) -> list[dict[str, Any]]:
        """The figures for 0, 1, ... demonstrations, as plain JSON data:

        - `agreement`: those of the metric `ranking_agreement`, over the rows that were ranked, in the first of both
          shown orders; `subsets`: the same for each subset of the data.
        - `position_bias`: those of the metric of this name, and whether the ranker is `biased`.
        - `reversal`, where rows were ranked twice: the share of pairs, and of first places, that change when the shown
          order is reversed.
        - `rankings`, `failures` by kind, `failure_rate`.
        - `latency`: percentiles in seconds, over the answers that did not come from a cache.
        - `usage`: tokens, attempts and US dollars (`cost`; `None` where unknown) of all rankings, and how many were
          `cached`, that is, paid for by an earlier run.
        """
        numbers = range(len(self.demonstrations) + 1)
        return [self._figures([one for one in self.rankings if one.num_demonstrations == n]) for n in numbers]

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain JSON data, without the rankings."""
        return {
            "ranker": self.ranker,
            "rows": len(self.references),
            "dropped": self.dropped,
            "confidence_level": self.confidence_level,
            "seed": self.seed,
            "figures": self.figures,
        }

    def to_markdown(self) -> str:
        """The figures side by side: a table in Markdown, and one more where the data has subsets."""
        sizes = Counter(one.subset for one in self.references if one.subset is not None)
        tables = [figures_table(f"{self.ranker}: {len(self.references)} rows", self.figures)]
        return "\n\n".join(tables + ([subsets_table(sizes, self.figures)] if sizes else []))

    def save(self, output_dir: str | PathLike[str]) -> list[str]:
        """Writes `report.json`, `report.md`, `rankings.jsonl` (one answer a line) and `report.png`, which takes
        matplotlib and is left out without it. Returns what was written.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        tables = f"{self.to_markdown()}\n\n{positions_table(self.figures)}\n"
        (folder / "report.md").write_text(tables, encoding="utf-8")
        with open(folder / "rankings.jsonl", "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(self._line(one)) + "\n" for one in self.rankings)
        written = ["report.json", "report.md", "rankings.jsonl"]
        try:
            from .report_plot import plot_report
        except ModuleNotFoundError:
            return written
        plot_report(self.figures, folder / "report.png")
        return [*written, "report.png"]

    def _line(self, one: JudgedRanking) -> dict[str, Any]:
        reference, outcome = self.references[one.reference], one.outcome
        failure = None if isinstance(outcome, RankingResult) else outcome
        return {
            "prompt": reference.prompt,
            "completions": reference.completions,
            "reference_ranks": reference.ranks,
            "ranks": one.ranks,
            "num_demonstrations": one.num_demonstrations,
            "shown": one.shown,
            "failure": failure and failure.reason,
            "detail": failure and failure.detail,
        }

    def _figures(self, rankings: Sequence[JudgedRanking]) -> dict[str, Any]:
        forward = {one.reference: one.ranks for one in rankings if not one.reverse and one.ranks is not None}
        backward = {one.reference: one.ranks for one in rankings if one.reverse and one.ranks is not None}
        failures = Counter(one.outcome.reason for one in rankings if not isinstance(one.outcome, RankingResult))
        subsets = sorted({one.subset for one in self.references if one.subset is not None})
        fresh = [one.seconds for one in rankings if one.seconds is not None]
        return {
            "num_demonstrations": rankings[0].num_demonstrations,
            "agreement": self._agreement(forward),
            "subsets": {
                name: self._agreement({i: ranks for i, ranks in forward.items() if self.references[i].subset == name})
                for name in subsets
            },
            "position_bias": self._position_bias(rankings, forward.keys() & backward.keys()),
            "reversal": self._reversal(forward, backward) if any(one.reverse for one in rankings) else None,
            "rankings": len(rankings),
            "failures": dict(sorted(failures.items())),
            "failure_rate": failures.total() / len(rankings),
            "latency": {f"p{q}": float(np.percentile(fresh, q)) for q in (50, 90, 99)} if fresh else None,
            "usage": _usage(rankings),
        }

    def _agreement(self, ranks: dict[int, list[int]]) -> dict[str, Any]:
        return self._measure(
            RankingAgreement(keep_in_memory=True),
            predictions=[*ranks.values()],
            references=[self.references[index].ranks for index in ranks],
        )

    def _position_bias(self, rankings: Sequence[JudgedRanking], twice: set[int]) -> dict[str, Any]:
        # Of a row that was to be ranked twice, one ranking without the other would weigh what opinion puts where.
        paired = any(one.reverse for one in rankings)
        ranked = [one for one in rankings if one.ranks is not None and (one.reference in twice or not paired)]
        measured = self._measure(
            PositionBias(keep_in_memory=True),
            predictions=[[ranks[index] for index in one.shown] for one in ranked if (ranks := one.ranks) is not None],
            prompt_ids=[one.reference for one in ranked],
        )
        p_value = measured["p_value"]
        return measured | {"biased": None if p_value is None else p_value < 1 - self.confidence_level}

    def _reversal(self, forward: dict[int, list[int]], backward: dict[int, list[int]]) -> dict[str, Any]:
        both = sorted(forward.keys() & backward.keys())
        same = self._measure(
            RankingAgreement(keep_in_memory=True),
            predictions=[backward[index] for index in both],
            references=[forward[index] for index in both],
        )
        flipped: dict[str, Any] = {}
        for key, figure in (("pairs", "pairwise_accuracy"), ("first_place", "top_1")):
            value, interval = same[figure], same[f"{figure}_interval"]
            flipped[key] = None if value is None else 1 - value
            flipped[f"{key}_interval"] = interval and [1 - bound for bound in reversed(interval)]
        return flipped

    def _measure(self, metric: RankingAgreement | PositionBias, **inputs: Any) -> dict[str, Any]:
        result: dict[str, Any] = metric.compute(**inputs, confidence_level=self.confidence_level, seed=self.seed)
        return result


def _usage(rankings: Sequence[JudgedRanking]) -> dict[str, Any]:
    usages = [one.outcome.usage for one in rankings if one.outcome.usage is not None]
    unpriced = any(usage.cost is None and usage.prompt_tokens for usage in usages)
    total = sum(usages, Usage(attempts=0))
    return {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "attempts": total.attempts,
        "cost": None if unpriced else total.cost,
        "cached": sum(usage.cached for usage in usages),
    }
