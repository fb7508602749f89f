"""The agreement of two rankings: their longest common subsequence."""

from __future__ import annotations

from collections.abc import Sequence


def agreement_ranking(
    black_box: Sequence[int], white_box: Sequence[int], ranks: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the longest common subsequence of two rankings, preferring what the black box ranks highest.

    CycleAlign (arXiv 2310.16271, section 2.2) keeps the part of the black box's ranking that the policy's own
    probabilities confirm. Of several longest common subsequences, this is the one with the lexicographically smallest
    positions in `black_box`. For rankings without repeats, every rule that favours high black-box ranks picks the same
    one.

    Args:
        black_box: Indices of completions, best first. The ranking can be partial. Of a repeated index, the first
            mention counts.
        white_box: Ranking of the policy, in the same form. Indices that only one ranking has are left out.
        ranks: The black box's rank of each completion, by index, if some are tied. At most one completion of each
            rank is part of the agreement, because the black box does not order the others.

    Returns:
        Indices in black-box order, best first. Empty if the rankings share no index.

    Example:
        >>> agreement_ranking([1, 3, 2, 0], [3, 1, 0, 2])
        (1, 2)
    """
    white_position: dict[int, int] = {}
    for index in white_box:
        white_position.setdefault(index, len(white_position))
    shared = [index for index in dict.fromkeys(black_box) if index in white_position]
    positions = [white_position[index] for index in shared]

    def below(lower: int, upper: int) -> bool:
        return ranks is None or ranks[shared[lower]] > ranks[shared[upper]]

    # chain[i]: length of the longest common subsequence that starts at shared[i].
    chain = [1] * len(shared)
    for i in reversed(range(len(shared))):
        followers = (chain[j] for j in range(i + 1, len(shared)) if positions[j] > positions[i] and below(j, i))
        chain[i] = 1 + max(followers, default=0)

    # Walk down the black box's ranking and take each completion that still leaves room for the rest: this gives the
    # lexicographically smallest positions.
    agreed: list[int] = []
    remaining, last = max(chain, default=0), -1
    for i, length in enumerate(chain):
        if length == remaining and (last < 0 or (positions[i] > positions[last] and below(i, last))):
            agreed.append(shared[i])
            remaining, last = remaining - 1, i
    return tuple(agreed)


def agreement_rate(agreement: Sequence[int], ranks: Sequence[int]) -> float:
    """Return the share of the black box's ranks that the agreement covers, from 0 to 1.

    Without ties, this is the share of the completions that both rankings order alike.

    Args:
        agreement: Indices of completions, best first.
        ranks: The black box's rank of each completion.
    """
    return len(without_ties(agreement, ranks)) / len(set(ranks))


def without_ties(agreement: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the first completion of each rank in an agreement, which logs of older versions do not ensure.

    Args:
        agreement: Indices of completions, best first.
        ranks: Rank of each completion.
    """
    first_of_rank: dict[int, int] = {}
    for index in agreement:
        first_of_rank.setdefault(ranks[index], index)
    return tuple(first_of_rank.values())
