"""Kendall's tau-b, a measure of agreement between two rankings with ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Compute Kendall's tau-b of two rankings.

    The number of concordant pairs minus the number of discordant pairs, divided by the geometric mean of the numbers
    of untied pairs in each ranking (Kendall 1945, "The treatment of ties in ranking problems").

    Args:
        first: Rank of each completion. Equal ranks are ties. Scores work too, if both rankings are given as scores.
        second: Ranks of the same completions in the other ranking.

    Returns:
        A value between -1 (every pair reversed) and 1 (every pair in the same order), or `None` if a ranking has no
        untied pair.

    Raises:
        ValueError: If the rankings have different lengths.

    Example:
        >>> round(kendall_tau([0, 1, 2, 3], [0, 2, 1, 3]), 3)
        0.667
    """
    if len(first) != len(second):
        raise ValueError(f"Both rankings must rank the same completions, got {len(first)} and {len(second)} ranks.")
    concordant_minus_discordant = untied_first = untied_second = 0
    for i, j in combinations(range(len(first)), 2):
        sign_first, sign_second = _sign(first[i] - first[j]), _sign(second[i] - second[j])
        concordant_minus_discordant += sign_first * sign_second
        untied_first += sign_first != 0
        untied_second += sign_second != 0
    if not untied_first or not untied_second:
        return None
    return concordant_minus_discordant / math.sqrt(untied_first * untied_second)


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)
