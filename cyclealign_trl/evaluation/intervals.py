"""Intervals of figures that are ratios of sums over prompts, by resampling the prompts."""

from __future__ import annotations

import numpy as np

Interval = tuple[float, float]


def ratios(
    numerators: np.ndarray, denominators: np.ndarray, n_resamples: int, confidence_level: float, seed: int
) -> list[tuple[float | None, Interval | None]]:
    """F ratios of sums, each with its percentile bootstrap interval.

    Completions of one prompt share their fate, so it is prompts that are drawn, with replacement, each with all that
    belongs to it. All figures are computed from the same draws.

    Args:
        numerators: `(B, F)`: what each of B prompts adds to the numerator of each figure.
        denominators: `(B, F)`: likewise.
        n_resamples: How many times the prompts are drawn.
        confidence_level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the draws.

    Returns:
        Per figure its value and (low, high); `None` for both where the denominator is 0.
    """
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must lie between 0 and 1, got {confidence_level}.")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}.")
    count = len(numerators)
    rng = np.random.default_rng(seed)
    drawn = np.full((n_resamples, numerators.shape[1]), np.nan)
    for resample in drawn if count else ():
        weights = np.bincount(rng.integers(count, size=count), minlength=count)  # (B,)
        below = weights @ denominators  # (F,)
        np.divide(weights @ numerators, below, out=resample, where=below > 0)
    tail = (1 - confidence_level) / 2
    figures: list[tuple[float | None, Interval | None]] = []
    for figure, (above, below) in enumerate(zip(numerators.sum(0), denominators.sum(0), strict=True)):
        if below > 0:
            low, high = np.nanquantile(drawn[:, figure], (tail, 1 - tail))
            figures.append((float(above / below), (float(low), float(high))))
        else:
            figures.append((None, None))
    return figures
