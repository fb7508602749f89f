"""Kendall's tau-b."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings: 1 where every pair is ordered alike, -1 where every pair is reversed.

    Pairs that agree less pairs that do not, over the geometric mean of the pairs that either ranking orders at all
    (Kendall 1945, "The treatment of ties in ranking problems").

    Args:
        first: The rank of each completion. Equal ranks are ties. Scores do as well, if both lists hold scores.
        second: Likewise, of the same completions.

    Returns:
        From -1 to 1; `None` where a ranking orders no pair: it has nothing but ties, or fewer than two completions.

    Raises:
        ValueError: If the rankings are not of the same length.

    Example:
        >>> round(kendall_tau([0, 1, 2, 3], [0, 2, 1, 3]), 3)
        0.667
    """
    if len(first) != len(second):
        raise ValueError(f"Rankings of the same completions are of one length; got {len(first)} and {len(second)}.")
    agreeing = ordered_first = ordered_second = 0
    for i, j in combinations(range(len(first)), 2):
        one, other = _sign(first[i] - first[j]), _sign(second[i] - second[j])
        agreeing += one * other
        ordered_first += one != 0
        ordered_second += other != 0
    if not ordered_first or not ordered_second:
        return None
    return agreeing / math.sqrt(ordered_first * ordered_second)


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)
