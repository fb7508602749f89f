"""Means with bootstrap intervals, and their text."""

from __future__ import annotations

import numpy as np

from cyclealign_trl.evaluation.intervals import Estimate, bootstrap_group_means


def mean_with_interval(values: np.ndarray) -> Estimate:
    """Return the mean of values `(B,)` with its 95 % interval."""
    return bootstrap_group_means(values[:, None], ["all"] * len(values), None, 1000, 0.95, 0).micro[0]


def intercept_with_interval(values: np.ndarray, covariate: np.ndarray) -> Estimate:
    """Return the least-squares line through values `(B,)` where the covariate `(B,)` is 0, with its 95 % interval."""
    rng = np.random.default_rng(0)
    draws = [np.arange(len(values)), *rng.integers(len(values), size=(1000, len(values)))]
    designs = (np.stack([np.ones(len(values)), covariate[draw]], axis=1) for draw in draws)
    intercept, *resampled = [
        float(np.linalg.lstsq(design, values[draw])[0][0]) for design, draw in zip(designs, draws, strict=True)
    ]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return intercept, (float(low), float(high))


def to_text(estimate: Estimate, spec: str) -> str:
    """Return an estimate as text, with a format such as `"+.1f"`, or nothing if there is none."""
    value, interval = estimate
    if value is None or interval is None:
        return ""
    return f"{value:{spec}} ({interval[0]:{spec}} to {interval[1]:{spec}})"
