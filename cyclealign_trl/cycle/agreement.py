"""What two rankings agree on: their longest common subsequence, and how far they agree as a number."""

from __future__ import annotations

from collections.abc import Sequence


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
