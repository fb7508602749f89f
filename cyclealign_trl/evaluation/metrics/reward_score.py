"""`evaluate` metric for the scores of a reward model; loads from this file without network access."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from cyclealign_trl.evaluation.intervals import bootstrap_group_means

TRANSFORMS = ("sigmoid", "none")

_DESCRIPTION = """\
Mean score of a reward model, by group of prompts and in total. By default, a score is 100 times the sigmoid of the
model's output, as in the tables of PRO (arXiv 2306.17492) and CycleAlign (arXiv 2310.16271).

- micro: mean over all prompts, which is the column "Total" of these tables.
- macro: mean over the groups, each with the same weight.
"""

_INPUTS = """\
Args:
    predictions (list of float): outputs of the reward model.
    groups (list of str): group of each prompt, such as the subset of the data.
    transform (str): "sigmoid" for 100 times the sigmoid, or "none" for the outputs themselves.
    n_resamples (int): number of bootstrap resamples of the prompts within their groups.
    confidence_level (float): coverage of the intervals.
    seed (int): seed of the resamples.

Returns:
    micro and macro; groups, the mean, interval and count of each group; and count, the number of predictions. Each
    mean has its percentile bootstrap interval, [low, high], as "<mean>_interval". Without predictions, means and
    intervals are None.
"""


class RewardScore(evaluate.Metric):
    """Mean reward by group and in total, with bootstrap intervals over prompts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float64"), "groups": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: Sequence[float],
        groups: Sequence[str],
        transform: str = "sigmoid",
        n_resamples: int = 1000,
        confidence_level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        rewards = np.array(predictions, dtype=float)
        if not np.isfinite(rewards).all():
            raise ValueError(f"Predictions must be finite numbers, got {rewards[~np.isfinite(rewards)][0]}.")
        values = transform_rewards(rewards, transform).reshape(-1, 1)  # (B, 1)
        means = bootstrap_group_means(values, groups, None, n_resamples, confidence_level, seed)
        result: dict[str, Any] = {}
        for name, [(value, interval)] in (("micro", means.micro), ("macro", means.macro)):
            result |= {name: value, f"{name}_interval": interval and list(interval)}
        result["groups"] = {
            name: {"mean": value, "mean_interval": interval and list(interval), "count": list(groups).count(name)}
            for name, [(value, interval)] in means.groups.items()
        }
        return result | {"count": len(predictions)}


def check_transform(transform: str) -> None:
    """Raise `ValueError` if `transform` is unknown."""
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {TRANSFORMS}, got {transform!r}.")


def transform_rewards(rewards: np.ndarray, transform: str) -> np.ndarray:
    """Return what is reported for outputs of a reward model.

    Args:
        rewards: Outputs, of any shape.
        transform: `"sigmoid"` for 100 times the sigmoid, `"none"` for the outputs themselves.

    Raises:
        ValueError: If `transform` has another value.
    """
    check_transform(transform)
    if transform == "none":
        return rewards
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        scores: np.ndarray = 100 * np.exp(-np.logaddexp(0, -rewards))  # does not overflow
    return scores
