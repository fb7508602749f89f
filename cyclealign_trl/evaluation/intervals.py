"""Bootstrap intervals for ratios of sums over prompts."""

from __future__ import annotations

import numpy as np

Interval = tuple[float, float]


def bootstrap_ratios(
    numerators: np.ndarray, denominators: np.ndarray, n_resamples: int, confidence_level: float, seed: int
) -> list[tuple[float | None, Interval | None]]:
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
    check_confidence_level(confidence_level)
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}.")
    num_prompts = len(numerators)
    rng = np.random.default_rng(seed)
    resampled = np.full((n_resamples, numerators.shape[1]), np.nan)
    for ratios in resampled if num_prompts else ():
        counts = np.bincount(rng.integers(num_prompts, size=num_prompts), minlength=num_prompts)  # (B,)
        totals = counts @ denominators  # (F,)
        np.divide(counts @ numerators, totals, out=ratios, where=totals > 0)
    tail = (1 - confidence_level) / 2
    results: list[tuple[float | None, Interval | None]] = []
    for index, (numerator, denominator) in enumerate(zip(numerators.sum(0), denominators.sum(0), strict=True)):
        if denominator > 0:
            low, high = np.nanquantile(resampled[:, index], (tail, 1 - tail))
            results.append((float(numerator / denominator), (float(low), float(high))))
        else:
            results.append((None, None))
    return results


def check_confidence_level(confidence_level: float) -> None:
    """Raise `ValueError` if `confidence_level` is not between 0 and 1."""
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must be between 0 and 1, got {confidence_level}.")
