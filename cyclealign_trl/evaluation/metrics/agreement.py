"""`evaluate` metric for the agreement of two rankings; loads from this file without network access."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from cyclealign_trl.cycle.agreement import agreement_ranking
from cyclealign_trl.evaluation.intervals import bootstrap_ratios

_DESCRIPTION = """\
Agreement of two rankings of the same items, as CycleAlign (arXiv 2310.16271, section 2.2) defines it: their longest
common subsequence.

- rate: share of the items that both rankings order alike, averaged over pairs of rankings. Two random orders of 3
  items have a rate of 2/3 on average, and of 4 items 0.604.
- full: share of the pairs of rankings that are equal.
- length: mean number of items that both order alike.
"""

_INPUTS = """\
Args:
    predictions (list of list of int): rankings, each a list of item ids, best first.
    references (list of list of int): rankings of the same items by the other ranker.
    n_resamples (int): number of bootstrap resamples of the pairs of rankings.
    confidence_level (float): coverage of the intervals.
    seed (int): seed of the resamples.

Returns:
    rate, full and length, and the percentile bootstrap interval [low, high] of each, as "<figure>_interval". Without
    rankings, all are None.
"""


class Agreement(evaluate.Metric):
    """Share of two rankings that is their longest common subsequence, with bootstrap intervals."""

    def _info(self) -> evaluate.MetricInfo:
        rankings = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": rankings, "references": rankings}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
        n_resamples: int = 1000,
        confidence_level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        terms = np.empty((len(predictions), 3))
        for row, (ranking, reference) in enumerate(zip(predictions, references, strict=True)):
            if sorted(ranking) != sorted(reference) or len(set(ranking)) < len(ranking) or not ranking:
                raise ValueError(f"Two rankings must order the same distinct items, got {ranking} and {reference}.")
            length = len(agreement_ranking(reference, ranking))
            terms[row] = length / len(ranking), length == len(ranking), length
        estimates = bootstrap_ratios(terms, np.ones_like(terms), n_resamples, confidence_level, seed)
        figures: dict[str, Any] = {}
        for name, (value, interval) in zip(("rate", "full", "length"), estimates, strict=True):
            figures |= {name: value, f"{name}_interval": interval and list(interval)}
        return figures
