"""Bootstrap intervals for ratios of sums over prompts, and for means of groups of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Interval = tuple[float, float]
Estimate = tuple[float | None, Interval | None]
"""A value and its interval; both are `None` without data."""

_BLOCK = 4_000_000  # draws at once, which bounds the memory


def bootstrap_ratios(
    numerators: np.ndarray, denominators: np.ndarray, n_resamples: int, confidence_level: float, seed: int
) -> list[Estimate]:
    """Return F ratios of sums, each with its percentile bootstrap interval.

    Values of the same prompt depend on each other, so whole prompts are resampled, with replacement. All ratios use
    the same resamples.

    Args:
        numerators: `(B, F)`: contribution of each of B prompts to the numerator of each ratio.
        denominators: `(B, F)`: contribution of each prompt to the denominator of each ratio.
        n_resamples: Number of resamples.
        confidence_level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the resamples.

    Returns:
        The value and the interval (low, high) of each ratio; both are `None` if the denominator is 0.

    Raises:
        ValueError: If `confidence_level` or `n_resamples` is out of range.
    """
    _check(n_resamples, confidence_level)
    num_prompts = len(numerators)
    rng = np.random.default_rng(seed)
    resampled = np.full((n_resamples, numerators.shape[1]), np.nan)
    for ratios in resampled if num_prompts else ():
        counts = np.bincount(rng.integers(num_prompts, size=num_prompts), minlength=num_prompts)  # (B,)
        totals = counts @ denominators  # (F,)
        np.divide(counts @ numerators, totals, out=ratios, where=totals > 0)
    tail = (1 - confidence_level) / 2
    results: list[Estimate] = []
    for index, (numerator, denominator) in enumerate(zip(numerators.sum(0), denominators.sum(0), strict=True)):
        if denominator > 0:
            low, high = np.nanquantile(resampled[:, index], (tail, 1 - tail))
            results.append((float(numerator / denominator), (float(low), float(high))))
        else:
            results.append((None, None))
    return results


@dataclass(frozen=True, slots=True)
class GroupMeans:
    """Means of F columns of values, each with its percentile bootstrap interval.

    Args:
        groups: F means of each group.
        micro: F weighted means of the groups.
        macro: F unweighted means of the groups.
    """

    groups: dict[str, list[Estimate]]
    micro: list[Estimate]
    macro: list[Estimate]


def bootstrap_group_means(
    values: np.ndarray,
    groups: Sequence[str],
    weights: Mapping[str, float] | None,
    n_resamples: int,
    confidence_level: float,
    seed: int,
) -> GroupMeans:
    """Return the mean of each group and of all groups, with percentile bootstrap intervals.

    Prompts are resampled with replacement within their group, because the groups and their weights are given and not
    drawn. All columns use the same resamples, so a column of differences gives the interval of a paired comparison.

    Args:
        values: `(B, F)`: F values of each of B prompts. NaN means that there is none.
        groups: Group of each prompt.
        weights: Weight of each group in `micro`. `None` weights by the number of prompts.
        n_resamples: Number of resamples, R.
        confidence_level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the resamples.

    Returns:
        The means. One without any value is `None`, and so are the totals over a group without any value.

    Raises:
        ValueError: If `confidence_level` or `n_resamples` is out of range.
    """
    _check(n_resamples, confidence_level)
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(groups))
    labels = np.array([names.index(group) for group in groups], dtype=int)
    num_columns = values.shape[1]
    means = np.full((len(names), num_columns), np.nan)
    resampled = np.full((len(names), n_resamples, num_columns), np.nan)
    for index in range(len(names)):
        rows = values[labels == index]  # (n, F)
        present = ~np.isnan(rows)
        filled = np.where(present, rows, 0.0)
        np.divide(filled.sum(0), present.sum(0), out=means[index], where=present.any(0))
        for start in range(0, n_resamples, block := max(1, _BLOCK // len(rows))):
            counts = _draw_counts(rng, min(block, n_resamples - start), len(rows))  # (R, n)
            drawn = counts @ present  # (R, F)
            np.divide(counts @ filled, drawn, out=resampled[index, start : start + block], where=drawn > 0)
    shares = np.array([labels.tolist().count(i) if weights is None else weights[name] for i, name in enumerate(names)])
    tail = (1 - confidence_level) / 2

    def estimates(mean: np.ndarray, samples: np.ndarray) -> list[Estimate]:
        """Return F values with their intervals, given `(F,)` and `(R, F)`."""
        return [
            (None, None) if np.isnan(value) else (float(value), _interval(samples[:, column], tail))
            for column, value in enumerate(mean)
        ]

    def average(weights: np.ndarray) -> list[Estimate]:
        if not names:
            return [(None, None)] * num_columns
        return estimates(np.average(means, 0, weights), np.average(resampled, 0, weights))

    return GroupMeans(
        {name: estimates(means[index], resampled[index]) for index, name in enumerate(names)},
        average(shares),
        average(np.ones(len(names))),
    )


def _draw_counts(rng: np.random.Generator, n_resamples: int, size: int) -> np.ndarray:
    """Return how often each of n prompts occurs in each of R resamples, `(R, n)`."""
    draws = rng.integers(size, size=(n_resamples, size))
    flat = (draws + size * np.arange(n_resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=n_resamples * size).reshape(n_resamples, size).astype(float)


def _interval(samples: np.ndarray, tail: float) -> Interval:
    low, high = np.nanquantile(samples, (tail, 1 - tail))
    return float(low), float(high)


def _check(n_resamples: int, confidence_level: float) -> None:
    check_confidence_level(confidence_level)
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}.")


def check_confidence_level(confidence_level: float) -> None:
    """Raise `ValueError` if `confidence_level` is not between 0 and 1."""
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must be between 0 and 1, got {confidence_level}.")
