"""Win rates of pairwise verdicts, plain and at equal lengths, with bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from .intervals import Interval, bootstrap_ratios, check_confidence_level

Verdict = Literal["win", "tie", "lose"]

SCORES: dict[Verdict, float] = {"win": 1.0, "tie": 0.5, "lose": 0.0}
"""Share of a win that each verdict counts as."""

# Too weak to move a rate by a tenth of a percent. It keeps the fit finite if all verdicts, or all of the longer
# replies, win.
_RIDGE = 0.01
_MAX_ITERATIONS = 100
_TOLERANCE = 1e-8


def win_rates(
    verdicts: Sequence[Verdict],
    length_differences: Sequence[float] | None = None,
    prompt_ids: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return win rates in percent, from 0 (always loses) to 100 (always wins), each with its interval.

    The length-controlled win rate answers what the rate would be if both replies were equally long. As in AlpacaEval 2
    (arXiv 2404.04475), it is the prediction of a logistic regression of the verdict on the length difference, at a
    difference of 0. The regressor is tanh(d / std(d)) for the differences d. There is one pair of models, so the
    regression has no terms for the model and the difficulty of the prompt beyond the intercept.

    Args:
        verdicts: Verdict on each pair of replies.
        length_differences: Length of the judged reply minus that of the other one, for each verdict, in any unit.
            `None` computes no length-controlled rate.
        prompt_ids: Id of the prompt of each verdict. Verdicts on the same prompt, such as those for both orders of
            its replies, are resampled together. `None` means that all prompts differ.
        n_resamples: Number of bootstrap resamples of the prompts.
        confidence_level: Coverage of the intervals.
        seed: Seed of the resamples.

    Returns:
        The counts `win`, `tie` and `lose`; `win_rate`, wins plus half of the ties; `net_win_rate`, wins minus losses
        (omega in the Aligner paper, arXiv 2402.02416, appendix E), from -100 to 100; `length_controlled_win_rate`; and
        the percentile bootstrap interval [low, high] of each rate, as "<rate>_interval". Rates and intervals are
        `None` without verdicts. The length-controlled ones are also `None` without lengths, and if all differences are
        the same number other than 0, which says nothing about equal lengths.

    Raises:
        ValueError: If a verdict is unknown, the arguments differ in length, or a setting is out of range.
    """
    check_confidence_level(confidence_level)
    for verdict in verdicts:
        if verdict not in SCORES:
            raise ValueError(f"A verdict must be one of {', '.join(map(repr, SCORES))}; got {verdict!r}.")
    for name, values in (("length_differences", length_differences), ("prompt_ids", prompt_ids)):
        if values is not None and len(values) != len(verdicts):
            raise ValueError(f"`{name}` needs one entry per verdict, got {len(values)} for {len(verdicts)} verdicts.")
    scores = np.array([100 * SCORES[verdict] for verdict in verdicts])  # (N,)
    clusters = _number(range(len(verdicts)) if prompt_ids is None else prompt_ids)  # (N,)
    sums, sizes = np.bincount(clusters, weights=scores), np.bincount(clusters)  # (B,)
    [(rate, interval)] = bootstrap_ratios(sums[:, None], sizes[:, None], n_resamples, confidence_level, seed)
    controlled, controlled_interval = None, None
    if length_differences is not None and len(verdicts):
        regressor = _regressor(np.asarray(length_differences, dtype=float))
        if regressor is not None:
            rates = _controlled_rates(regressor, scores / 100, clusters, n_resamples, seed)
            controlled = next(rates)
            controlled_interval = _percentiles([*rates], confidence_level)
    return {
        **{verdict: sum(one == verdict for one in verdicts) for verdict in SCORES},
        "win_rate": rate,
        "win_rate_interval": interval and list(interval),
        "net_win_rate": None if rate is None else _net(rate),
        "net_win_rate_interval": interval and [_net(bound) for bound in interval],
        "length_controlled_win_rate": controlled,
        "length_controlled_win_rate_interval": controlled_interval and list(controlled_interval),
    }


def _net(rate: float) -> float:
    return 2 * rate - 100


def _number(ids: Sequence[Hashable]) -> np.ndarray:
    """Return the number of each id, counted from 0 in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(one, len(numbers)) for one in ids], dtype=np.int64)


def _regressor(differences: np.ndarray) -> np.ndarray | None:
    """Return the normalised length differences, or `None` if they do not vary and are not 0."""
    spread = float(differences.std())
    if spread > 1e-9 * float(np.abs(differences).max()):
        return np.tanh(differences / spread)
    return None if differences.any() else differences


def _controlled_rates(
    regressor: np.ndarray, scores: np.ndarray, clusters: np.ndarray, n_resamples: int, seed: int
) -> Iterator[float]:
    """Yield the rate in percent at a regressor of 0: of all prompts, and then of each resample."""
    features = np.stack([np.ones_like(regressor), regressor], axis=1)  # (N, 2)
    fitted = _fit_logistic(features, scores, np.ones_like(scores), np.zeros(2))
    yield 100 * float(_sigmoid(fitted[0]))
    num_prompts = int(clusters.max()) + 1
    rng = np.random.default_rng(seed)  # gives the same resamples as `bootstrap_ratios`
    for _ in range(n_resamples):
        counts = np.bincount(rng.integers(num_prompts, size=num_prompts), minlength=num_prompts)  # (B,)
        yield 100 * float(_sigmoid(_fit_logistic(features, scores, counts[clusters], fitted)[0]))


def _fit_logistic(features: np.ndarray, targets: np.ndarray, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return the coefficients of a logistic regression, by Newton's method.

    Args:
        features: `(N, F)`: regressors.
        targets: `(N,)`: targets from 0 to 1.
        weights: `(N,)`: weight of each target.
        start: `(F,)`: coefficients to start from.
    """

    def objective(coefficients: np.ndarray) -> float:
        logits = features @ coefficients
        likelihood = weights @ (targets * logits - np.logaddexp(0, logits))
        return float(likelihood - _RIDGE / 2 * coefficients @ coefficients)

    coefficients, value = start, objective(start)
    for _ in range(_MAX_ITERATIONS):
        probabilities = _sigmoid(features @ coefficients)
        gradient = features.T @ (weights * (targets - probabilities)) - _RIDGE * coefficients
        curvature = features.T * (weights * probabilities * (1 - probabilities)) @ features
        step = np.linalg.solve(curvature + _RIDGE * np.eye(len(start)), gradient)
        # A full step can overshoot where the likelihood is nearly flat.
        while (reached := objective(coefficients + step)) < value and np.abs(step).max() > _TOLERANCE:
            step = step / 2
        coefficients, value = coefficients + step, reached
        if np.abs(step).max() <= _TOLERANCE:
            break
    return coefficients


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(logits / 2)) / 2  # does not overflow


def _percentiles(values: Sequence[float], confidence_level: float) -> Interval:
    tail = (1 - confidence_level) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)
