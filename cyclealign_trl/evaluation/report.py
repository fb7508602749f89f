"""Report of a ranker evaluation: figures, tables and files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence, Set
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
    """A ranking of one row, or its failure.

    Args:
        reference: Index of the row in the report's references.
        num_demonstrations: Number of demonstrations in the request.
        reverse: Whether this is the second ranking of the row, with completions shown in reverse order.
        shown: Indices of the row's completions in the order in which they were shown.
        outcome: The ranking, whose indices are shown positions, or the failure.
        seconds: Time that the ranker took, including retries and waiting. `None` for an answer from the cache.
    """

    reference: int
    num_demonstrations: int
    reverse: bool
    shown: tuple[int, ...]
    outcome: Outcome
    seconds: float | None

    @property
    def ranks(self) -> list[int] | None:
        """Return the rank of each of the row's completions, or `None` if the ranking failed."""
        if not isinstance(self.outcome, RankingResult):
            return None
        rank_by_index = dict(zip(self.shown, self.outcome.resolved_ranks, strict=True))
        return [rank_by_index[index] for index in range(len(self.shown))]


@dataclass(frozen=True)
class JudgeReport:
    """Accuracy, position bias, failures, latency and usage of a ranker, for each number of demonstrations.

    Args:
        ranker: Name of the ranker.
        references: Rows that were ranked.
        demonstrations: All demonstrations. A request with n demonstrations contains the first n.
        dropped: Number of dropped rows by reason.
        rankings: All rankings, including failures.
        confidence_level: Coverage of the intervals.
        seed: Seed of the evaluation.
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
        """Return the figures for 0, 1, ... demonstrations as JSON-compatible data.

        - `agreement`: results of the metric `ranking_agreement` on the first shown order of each row.
        - `subsets`: `agreement` for each subset of the data.
        - `position_bias`: results of the metric `position_bias`, and whether the ranker is `biased`.
        - `reversal`: share of pairs, and of first places, that change when the shown order is reversed. `None` if rows
          were not ranked twice.
        - `rankings`, `failures` by reason, `failure_rate`.
        - `latency`: percentiles in seconds, without cached answers.
        - `usage`: tokens, attempts and US dollars (`cost`; `None` if unknown) of all rankings, and the number of
          `cached` answers, which an earlier run paid for.
        """
        return [
            self._figures([ranking for ranking in self.rankings if ranking.num_demonstrations == num_demonstrations])
            for num_demonstrations in range(len(self.demonstrations) + 1)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-compatible data, without the single rankings."""
        return {
            "ranker": self.ranker,
            "rows": len(self.references),
            "dropped": self.dropped,
            "confidence_level": self.confidence_level,
            "seed": self.seed,
            "figures": self.figures,
        }

    def to_markdown(self) -> str:
        """Return a Markdown table of the figures, followed by a table of subsets if the data has any."""
        tables = [figures_table(f"{self.ranker}: {len(self.references)} rows", self.figures)]
        subset_sizes = Counter(reference.subset for reference in self.references if reference.subset is not None)
        if subset_sizes:
            tables.append(subsets_table(subset_sizes, self.figures))
        return "\n\n".join(tables)

    def save(self, output_dir: str | PathLike[str]) -> list[str]:
        """Write `report.json`, `report.md`, `rankings.jsonl` (one ranking per line) and `report.png`.

        `report.png` needs matplotlib and is skipped without it.

        Returns:
            The names of the files that were written.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        tables = f"{self.to_markdown()}\n\n{positions_table(self.figures)}\n"
        (folder / "report.md").write_text(tables, encoding="utf-8")
        with open(folder / "rankings.jsonl", "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(self._record(ranking)) + "\n" for ranking in self.rankings)
        written = ["report.json", "report.md", "rankings.jsonl"]
        try:
            from .report_plot import plot_report
        except ModuleNotFoundError:
            return written
        plot_report(self.figures, folder / "report.png")
        return [*written, "report.png"]

    def _record(self, ranking: JudgedRanking) -> dict[str, Any]:
        reference = self.references[ranking.reference]
        failure = None if isinstance(ranking.outcome, RankingResult) else ranking.outcome
        return {
            "prompt": reference.prompt,
            "completions": reference.completions,
            "reference_ranks": reference.ranks,
            "ranks": ranking.ranks,
            "num_demonstrations": ranking.num_demonstrations,
            "shown": ranking.shown,
            "failure": failure and failure.reason,
            "detail": failure and failure.detail,
        }

    def _figures(self, rankings: Sequence[JudgedRanking]) -> dict[str, Any]:
        forward = {
            ranking.reference: ranks for ranking in rankings if not ranking.reverse and (ranks := ranking.ranks)
        }
        backward = {ranking.reference: ranks for ranking in rankings if ranking.reverse and (ranks := ranking.ranks)}
        paired = any(ranking.reverse for ranking in rankings)
        failures = Counter(
            ranking.outcome.reason for ranking in rankings if not isinstance(ranking.outcome, RankingResult)
        )
        subsets = sorted({reference.subset for reference in self.references if reference.subset is not None})
        seconds = [ranking.seconds for ranking in rankings if ranking.seconds is not None]
        return {
            "num_demonstrations": rankings[0].num_demonstrations,
            "agreement": self._agreement(forward),
            "subsets": {
                name: self._agreement({i: ranks for i, ranks in forward.items() if self.references[i].subset == name})
                for name in subsets
            },
            # If a row was ranked twice but one ranking failed, opinion would not cancel out of the other one.
            "position_bias": self._position_bias(
                rankings, forward.keys() & backward.keys() if paired else forward.keys()
            ),
            "reversal": self._reversal(forward, backward) if paired else None,
            "rankings": len(rankings),
            "failures": dict(sorted(failures.items())),
            "failure_rate": failures.total() / len(rankings),
            "latency": {f"p{q}": float(np.percentile(seconds, q)) for q in (50, 90, 99)} if seconds else None,
            "usage": _usage(rankings),
        }

    def _agreement(self, ranks: dict[int, list[int]]) -> dict[str, Any]:
        return self._compute(
            RankingAgreement(keep_in_memory=True),
            predictions=[*ranks.values()],
            references=[self.references[index].ranks for index in ranks],
        )

    def _position_bias(self, rankings: Sequence[JudgedRanking], references: Set[int]) -> dict[str, Any]:
        """Return the position bias over the rankings of some references."""
        ranked = [ranking for ranking in rankings if ranking.reference in references]
        result = self._compute(
            PositionBias(keep_in_memory=True),
            predictions=[[ranks[index] for index in ranking.shown] for ranking in ranked if (ranks := ranking.ranks)],
            prompt_ids=[ranking.reference for ranking in ranked],
        )
        p_value = result["p_value"]
        return result | {"biased": None if p_value is None else p_value < 1 - self.confidence_level}

    def _reversal(self, forward: dict[int, list[int]], backward: dict[int, list[int]]) -> dict[str, Any]:
        """Return the shares of pairs and first places that change, from the agreement of both rankings."""
        both = sorted(forward.keys() & backward.keys())
        agreement = self._compute(
            RankingAgreement(keep_in_memory=True),
            predictions=[backward[index] for index in both],
            references=[forward[index] for index in both],
        )
        changed: dict[str, Any] = {}
        for key, figure in (("pairs", "pairwise_accuracy"), ("first_place", "top_1")):
            value, interval = agreement[figure], agreement[f"{figure}_interval"]
            changed[key] = None if value is None else 1 - value
            changed[f"{key}_interval"] = interval and [1 - bound for bound in reversed(interval)]
        return changed

    def _compute(self, metric: RankingAgreement | PositionBias, **inputs: Any) -> dict[str, Any]:
        result: dict[str, Any] = metric.compute(**inputs, confidence_level=self.confidence_level, seed=self.seed)
        return result


def _usage(rankings: Sequence[JudgedRanking]) -> dict[str, Any]:
    usages = [ranking.outcome.usage for ranking in rankings if ranking.outcome.usage is not None]
    unpriced = any(usage.cost is None and usage.prompt_tokens for usage in usages)
    total = sum(usages, Usage(attempts=0))
    return {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "attempts": total.attempts,
        "cost": None if unpriced else total.cost,
        "cached": sum(usage.cached for usage in usages),
    }
