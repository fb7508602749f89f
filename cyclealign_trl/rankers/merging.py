"""Merge several rankings of the same completions: ranks, agreement and usage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import combinations
from statistics import fmean

from ..types import Usage
from .base import Outcome
from .kendall_tau import kendall_tau


def borda_ranks(rankings: Sequence[Sequence[int]], weights: Sequence[float] | None = None) -> tuple[int, ...]:
    """Merge rankings by Borda count: completions are ordered by the weighted sum of their positions.

    Completions that a ranking ties share the mean of their positions, so that each ranking has the same number of
    points to give, however many ties it has. Completions with equal sums share a rank.

    Args:
        rankings: Ranks of the K completions in each ranking, 0 = best, equal for ties.
        weights: Weight of each ranking. `None` weights all with 1.

    Returns:
        The rank of each completion, 0 = best.

    Example:
        >>> borda_ranks([(0, 1, 2), (0, 2, 1), (1, 0, 1)])
        (0, 1, 2)
    """
    # Exact arithmetic on the decimals that were written: with floats, 0.1 + 0.2 would not tie with 0.3.
    factors = [Fraction(str(float(weight))) for weight in weights or [1] * len(rankings)]
    sums = [
        sum(factor * position for factor, position in zip(factors, positions, strict=True))
        for positions in zip(*map(_doubled_positions, rankings), strict=True)
    ]
    distinct = sorted(set(sums))
    return tuple(distinct.index(total) for total in sums)


def _doubled_positions(ranks: Sequence[int]) -> list[int]:
    """Return twice the position of each completion, 0 = best, where tied ones share the mean of theirs."""
    return [2 * sum(other < rank for other in ranks) + ranks.count(rank) - 1 for rank in ranks]


def mean_tau(rankings: Sequence[Sequence[int]]) -> float | None:
    """Return the mean of Kendall's tau-b over all pairs of rankings, or `None` if no pair defines it."""
    taus = [kendall_tau(first, second) for first, second in combinations(rankings, 2)]
    defined = [tau for tau in taus if tau is not None]
    return fmean(defined) if defined else None


def total_usage(outcomes: Iterable[Outcome]) -> Usage | None:
    """Sum the usage of several outcomes, failures included. Cached outcomes count only if all are cached."""
    usages = [outcome.usage for outcome in outcomes if outcome.usage is not None]
    counted = [usage for usage in usages if not usage.cached] or usages
    if not counted:
        return None
    return sum(counted[1:], start=counted[0])
