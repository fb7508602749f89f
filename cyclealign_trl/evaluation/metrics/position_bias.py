"""`evaluate` metric for position bias of rankings; loads from this file without network access."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import datasets
import evaluate
import numpy as np

from cyclealign_trl.evaluation.intervals import bootstrap_ratios

_DESCRIPTION = """\
Position bias of rankings whose completions were shown in random order: the dependence of ranks on shown positions.

- earlier_preferred: share of pairs in which the completion shown earlier is ranked higher, averaged over rankings. A
  tie counts one half. 0.5 means no bias; 1 means that the ranker repeats the shown order.
- placement_by_position: for each shown position, the share of the other completions that the completion there beats.
  0.5 means no bias.
- first_place_by_position: for each shown position, how often the completion there is ranked first.
- expected_by_position: the same for a ranker without bias.
- p_value: probability that a ranker without bias looks at least as biased by chance, from a sign-flip test. Reversing
  the shown order would flip the sign of an unbiased ranker's preference as often as not, so the test flips the signs
  of the prompts' preferences at random. It uses the larger of two preferences: for the earlier of two completions over
  the later one, and for first place to go to the completion shown first rather than last. Rankings of the same prompt
  are added up before the test: in two rankings with opposite shown orders, the ranker's opinion cancels out.
"""

_INPUTS = """\
Args:
    predictions (list of list of int): per ranking, the ranks by shown position, 0 = best; equal ranks are ties.
    prompt_ids (list of int, optional): per ranking, the id of its prompt. By default, all prompts differ.
    n_resamples (int): number of bootstrap resamples for the interval, and of sign flips for the test.
    confidence_level (float): coverage of the interval.
    seed (int): seed of resamples and sign flips.

Returns:
    earlier_preferred; earlier_preferred_interval, its percentile bootstrap interval [low, high]; p_value; and the
    figures by position as lists. Without rankings, the first three are None and the lists are empty.
"""


class PositionBias(evaluate.Metric):
    """Dependence of ranks on shown positions, with a bootstrap interval and a sign-flip test."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("int64"))}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[int]],
        prompt_ids: Sequence[int] | None = None,
        n_resamples: int = 1000,
        confidence_level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        ids = range(len(predictions)) if prompt_ids is None else prompt_ids
        # Per prompt, summed over its rankings: preference for the earlier of two completions, preference for the first
        # over the last to win, the former preference as a share, number of rankings.
        terms: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
        placements: defaultdict[int, list[float]] = defaultdict(list)  # by shown position
        wins: defaultdict[int, list[float]] = defaultdict(list)
        chances: defaultdict[int, list[float]] = defaultdict(list)
        for prompt_id, ranks in zip(ids, predictions, strict=True):
            if len(ranks) < 2:
                raise ValueError(f"A ranking needs at least 2 completions; got {len(ranks)}.")
            # The same opinion shown in reverse order gives exactly the negative, so both add up to 0.
            preference = fmean(_sign(later - earlier) for earlier, later in combinations(ranks, 2))
            top = [float(rank == min(ranks)) / ranks.count(min(ranks)) for rank in ranks]
            terms[prompt_id] += (preference, top[0] - top[-1], 0.5 + preference / 2, 1.0)
            for position, rank in enumerate(ranks):
                balance = sum(_sign(other - rank) for other in ranks) / (len(ranks) - 1)
                placements[position].append(0.5 + balance / 2)
                wins[position].append(top[position])
                chances[position].append(1 / len(ranks))
        by_prompt = np.array([*terms.values()]).reshape(len(terms), 4)
        [(share, interval)] = bootstrap_ratios(
            by_prompt[:, 2:3], by_prompt[:, 3:], n_resamples, confidence_level, seed
        )
        return {
            "earlier_preferred": share,
            "earlier_preferred_interval": interval and list(interval),
            "p_value": _p_value(by_prompt[:, :2], n_resamples, seed) if terms else None,
            "placement_by_position": [fmean(placements[position]) for position in range(len(placements))],
            "first_place_by_position": [fmean(wins[position]) for position in range(len(wins))],
            "expected_by_position": [fmean(chances[position]) for position in range(len(chances))],
        }


def _sign(difference: int) -> int:
    return (difference > 0) - (difference < 0)


def _p_value(preferences: np.ndarray, n_resamples: int, seed: int) -> float:
    """Return the share of random sign flips that give a preference at least as large as the observed one.

    Args:
        preferences: `(B, 2)`: the two preferences of each prompt.
        n_resamples: Number of sign flips.
        seed: Seed of the sign flips.
    """
    scale = np.sqrt((preferences**2).sum(0))  # (2,), not changed by sign flips
    scaled = preferences[:, scale > 0] / scale[scale > 0]
    if not scaled.size:  # no ranking depends on the shown order
        return 1.0
    observed = np.abs(scaled.sum(0)).max()
    rng = np.random.default_rng(seed)
    flipped = (np.abs(rng.choice((-1, 1), size=len(scaled)) @ scaled).max() for _ in range(n_resamples))
    num_as_large = sum(bool(preference >= observed - 1e-9) for preference in flipped)
    return (1 + num_as_large) / (1 + n_resamples)
