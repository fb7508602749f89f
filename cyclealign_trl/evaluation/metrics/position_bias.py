"""Whether a ranker likes a position: an `evaluate` metric, loaded from this file, without a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import datasets
import evaluate
import numpy as np

from cyclealign_trl.evaluation.intervals import ratios

_DESCRIPTION = """\
Position bias of rankings whose completions were shown in random order: how the ranks depend on where a completion was
shown, which they should not.

- earlier_preferred: of two completions, how often the one shown earlier is ranked higher (a tie counts one half); a
  mean over rankings. 0.5 is no bias, 1 is a ranker that repeats the shown order.
- placement_by_position: for each shown position the share of the other completions that the one there beats, 0.5
  without bias.
- first_place_by_position, and expected_by_position without bias: how often the completion there is ranked first.
- p_value: how often chance alone makes a ranker without bias look as biased. Had the shown order been the reverse, as
  it might, such a ranker's preference for what comes earlier would be one for what comes later: the test flips the
  signs of the prompts' preferences at random. It looks at two of them, for the earlier of two completions over the
  later, and for the very first over the very last to win, and takes the larger one each time. Two rankings of one
  prompt, one of them made in reverse order, count as one: what they have in common is opinion, which cancels out.
"""

_INPUTS = """\
Args:
    predictions (list of list of int): per ranking, the ranks by shown position, 0 = best; equal ranks are ties.
    prompt_ids (list of int, optional): per ranking, which prompt it is of. By default each is of its own.
    n_resamples (int): how many times prompts are drawn for the interval, and signs for the test.
    confidence_level (float): coverage of the interval.
    seed (int): seed of the draws.
"""


class PositionBias(evaluate.Metric):
    """How ranks depend on shown positions, and how likely chance alone explains that."""

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
        # Per prompt: preference for earlier over later, for first over last, the former as a share, rankings.
        terms: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
        placements: defaultdict[int, list[float]] = defaultdict(list)  # by position, like those below
        wins: defaultdict[int, list[float]] = defaultdict(list)
        chances: defaultdict[int, list[float]] = defaultdict(list)
        for prompt_id, ranks in zip(ids, predictions, strict=True):
            if len(ranks) < 2:
                raise ValueError(f"A ranking takes at least 2 completions; got {len(ranks)}.")
            # Exactly the opposite for the same opinion shown in reverse, so that the two add up to nothing.
            preference = fmean(_sign(later - earlier) for earlier, later in combinations(ranks, 2))
            top = [float(rank == min(ranks)) / ranks.count(min(ranks)) for rank in ranks]
            terms[prompt_id] += (preference, top[0] - top[-1], 0.5 + preference / 2, 1.0)
            for position, rank in enumerate(ranks):
                balance = sum(_sign(other - rank) for other in ranks) / (len(ranks) - 1)
                placements[position].append(0.5 + balance / 2)
                wins[position].append(top[position])
                chances[position].append(1 / len(ranks))
        by_prompt = np.array([*terms.values()]).reshape(len(terms), 4)
        [(share, interval)] = ratios(by_prompt[:, 2:3], by_prompt[:, 3:], n_resamples, confidence_level, seed)
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
    """The share of sign flips of the prompts' preferences, `(B, 2)`, that leave one as large as that found."""
    spread = np.sqrt((preferences**2).sum(0))  # (2,), the same whatever the signs
    scaled = preferences[:, spread > 0] / spread[spread > 0]
    if not scaled.size:  # no ranking depends on the shown order
        return 1.0
    found = np.abs(scaled.sum(0)).max()
    rng = np.random.default_rng(seed)
    flipped = (np.abs(rng.choice((-1, 1), size=len(scaled)) @ scaled).max() for _ in range(n_resamples))
    as_large = sum(bool(largest >= found - 1e-9) for largest in flipped)
    return (1 + as_large) / (1 + n_resamples)
