"""How much more often one side wins than loses: an `evaluate` metric, loaded from this file, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from cyclealign_trl.evaluation.intervals import ratios

VERDICTS = {"win": 1.0, "tie": 0.0, "lose": -1.0}

_DESCRIPTION = """\
Net win rate of pairwise verdicts: wins less losses, as a share of all, in percent. From 100 (always wins) over 0 (wins
as often as it loses) to -100. The Aligner paper's omega (arXiv 2402.02416, appendix E), for corrections against the
answers that they correct.
"""

_INPUTS = """\
Args:
    predictions (list of str): the verdicts, each "win", "tie" or "lose".
    n_resamples (int): how many times the verdicts are drawn for the interval.
    confidence_level (float): coverage of the interval.
    seed (int): seed of the draws.

Returns:
    net_win_rate and its percentile bootstrap interval, net_win_rate_interval; the counts win, tie and lose.
"""


class NetWinRate(evaluate.Metric):
    """Wins less losses, in percent of all verdicts, with a bootstrap interval."""

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
            raise ValueError(f"A verdict is one of {', '.join(map(repr, VERDICTS))}; got {unknown[0]!r}.")
        points = np.array([100 * VERDICTS[verdict] for verdict in predictions]).reshape(-1, 1)  # (B, 1)
        [(rate, interval)] = ratios(points, np.ones_like(points), n_resamples, confidence_level, seed)
        counts = {verdict: list(predictions).count(verdict) for verdict in VERDICTS}
        return {"net_win_rate": rate, "net_win_rate_interval": interval and list(interval), **counts}
