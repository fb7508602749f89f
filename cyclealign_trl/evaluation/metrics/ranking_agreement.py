"""`evaluate` metric for agreement with reference rankings; loads from this file without network access."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import datasets
import evaluate
import numpy as np

from cyclealign_trl.evaluation.intervals import bootstrap_ratios
from cyclealign_trl.rankers.kendall_tau import kendall_tau

FIGURES = ("pairwise_accuracy", "exact_match", "top_1", "kendall_tau")

_DESCRIPTION = """\
Agreement of rankings with reference rankings of the same completions. All figures use the pairs that the reference
orders strictly, and the prompts with at least one such pair.

- pairwise_accuracy: share of these pairs, over all prompts, that the ranking orders as the reference does. A pair that
  the ranking ties counts one half.
- exact_match: share of prompts with all of these pairs ordered as in the reference. Completions that the reference
  ties can be in any order.
- top_1: share of prompts whose first completion is one of the reference's best. If the ranking ties several
  completions for first place, the share of these that are. With one chosen and three rejected completions, this is the
  accuracy of RewardBench 2.
- kendall_tau: Kendall's tau-b, averaged over the prompts for which both rankings order at least one pair.
"""

_INPUTS = """\
Args:
    predictions (list of list of int): per prompt, the rank of each completion, 0 = best; equal ranks are ties.
    references (list of list of int): per prompt, the reference rank of each completion.
    n_resamples (int): number of bootstrap resamples of the prompts.
    confidence_level (float): coverage of the intervals.
    seed (int): seed of the resamples.

Returns:
    Each figure, and its percentile bootstrap interval over prompts, [low, high], as "<figure>_interval". Both are None
    if no prompt counts. num_prompts and num_pairs are the numbers of prompts and pairs that count.
"""


class RankingAgreement(evaluate.Metric):
    """Pairwise accuracy, exact match, top-1 and Kendall's tau-b, with bootstrap intervals over prompts."""

    def _info(self) -> evaluate.MetricInfo:
        ranks = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": ranks, "references": ranks}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
        n_resamples: int = 1000,
        confidence_level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        rows = [_terms(ranks, reference) for ranks, reference in zip(predictions, references, strict=True)]
        terms = np.array(rows, dtype=float).reshape(len(rows), 2, len(FIGURES))  # (B, 2, F)
        figures = bootstrap_ratios(terms[:, 0], terms[:, 1], n_resamples, confidence_level, seed)
        result: dict[str, Any] = {}
        for name, (value, interval) in zip(FIGURES, figures, strict=True):
            result |= {name: value, f"{name}_interval": interval and list(interval)}
        pairs = terms[:, 1, 0]
        return result | {"num_prompts": int((pairs > 0).sum()), "num_pairs": int(pairs.sum())}


def _terms(ranks: Sequence[int], reference: Sequence[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what one prompt adds to the numerator and the denominator of each figure."""
    if len(ranks) != len(reference):
        raise ValueError(
            f"A ranking and its reference must rank the same completions; got {len(ranks)} and {len(reference)} ranks."
        )
    pairs = [pair for pair in combinations(range(len(ranks)), 2) if reference[pair[0]] != reference[pair[1]]]
    if not pairs:
        return (0.0,) * len(FIGURES), (0.0,) * len(FIGURES)
    num_correct = sum(
        0.5 if ranks[i] == ranks[j] else float((ranks[i] < ranks[j]) == (reference[i] < reference[j]))
        for i, j in pairs
    )
    first = [index for index, rank in enumerate(ranks) if rank == min(ranks)]
    share_best = sum(reference[index] == min(reference) for index in first) / len(first)
    tau = kendall_tau(ranks, reference)
    return (num_correct, float(num_correct == len(pairs)), share_best, tau or 0.0), (
        len(pairs),
        1.0,
        1.0,
        float(tau is not None),
    )
