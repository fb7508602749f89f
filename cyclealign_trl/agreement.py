"""What two rankings agree on: their longest common subsequence, and how far they agree as a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations


def agreement_ranking(black_box: Sequence[int], white_box: Sequence[int]) -> tuple[int, ...]:
    """The longest common subsequence of two rankings, preferring what the black box ranks highest.

    CycleAlign (arXiv 2310.16271, section 2.2) keeps the part of the black box's ranking that the policy's own
    probabilities confirm. Where several common subsequences are longest, the one with the lexicographically smallest
    positions in `black_box` is taken; for rankings without repeats any other rule that favours high black-box ranks
    picks the same one.

    Args:
        black_box: Indices of completions, best first. May be partial; of a repeated index the first mention counts.
        white_box: Likewise, by the policy. Indices that only one side names are left out.

    Returns:
        Indices in black-box order, best first; empty if the rankings share nothing.

    Example:
        >>> agreement_ranking([1, 3, 2, 0], [3, 1, 0, 2])
        (1, 2)
    """
    white_position: dict[int, int] = {}
    for index in white_box:
        white_position.setdefault(index, len(white_position))
    shared = [index for index in dict.fromkeys(black_box) if index in white_position]
    positions = [white_position[index] for index in shared]

    # chain[i]: length of the longest common subsequence that starts at shared[i].
    chain = [1] * len(shared)
    for i in reversed(range(len(shared))):
        followers = (chain[j] for j in range(i + 1, len(shared)) if positions[j] > positions[i])
        chain[i] = 1 + max(followers, default=0)

    # Walking down the black box's ranking and taking the first completion that still leaves room for the rest gives
    # the lexicographically smallest positions.
    agreed: list[int] = []
    remaining, last_position = max(chain, default=0), -1
    for index, position, length in zip(shared, positions, chain, strict=True):
        if length == remaining and position > last_position:
            agreed.append(index)
            remaining, last_position = remaining - 1, position
    return tuple(agreed)


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
