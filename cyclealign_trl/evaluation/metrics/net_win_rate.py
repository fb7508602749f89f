"""`evaluate` metric for the net win rate of pairwise comparisons; loads from this file without network access."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from cyclealign_trl.evaluation.intervals import bootstrap_ratios

VERDICTS = {"win": 1.0, "tie": 0.0, "lose": -1.0}

_DESCRIPTION = """\
Net win rate of pairwise verdicts: wins minus losses, in percent of all verdicts. It ranges from -100 (always loses) to
100 (always wins); 0 means as many wins as losses. The Aligner paper (arXiv 2402.02416, appendix E) calls it omega and
uses it to compare corrections with the answers that they correct.
"""

_INPUTS = """\
Args:
    predictions (list of str): verdicts, each "win", "tie" or "lose".
    n_resamples (int): number of bootstrap resamples of the verdicts.
    confidence_level (float): coverage of the interval.
    seed (int): seed of the resamples.

Returns:
    net_win_rate; net_win_rate_interval, its percentile bootstrap interval [low, high]; and the counts win, tie, lose.
    Without verdicts, the first two are None.
"""


class NetWinRate(evaluate.Metric):
    """Wins minus losses in percent of all verdicts, with a bootstrap interval."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        n_resamples: int = 1000,
        confidence_level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        unknown = sorted(set(predictions) - VERDICTS.keys())
        if unknown:
            raise ValueError(f"A verdict must be one of {', '.join(map(repr, VERDICTS))}; got {unknown[0]!r}.")
        points = np.array([100 * VERDICTS[verdict] for verdict in predictions]).reshape(-1, 1)  # (B, 1)
        [(rate, interval)] = bootstrap_ratios(points, np.ones_like(points), n_resamples, confidence_level, seed)
        counts = {verdict: list(predictions).count(verdict) for verdict in VERDICTS}
        return {"net_win_rate": rate, "net_win_rate_interval": interval and list(interval), **counts}
