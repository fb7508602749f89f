"""`evaluate` metric for win rates of pairwise comparisons; loads from this file without network access."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from cyclealign_trl.evaluation.win_rates import Verdict, win_rates

_DESCRIPTION = """\
Win rates of pairwise verdicts, in percent of all verdicts.

- win_rate: wins, and half of the ties. 50 means that neither side is better.
- length_controlled_win_rate: what the win rate would be for replies of equal length, by a logistic regression of the
  verdict on the length difference, after the idea of AlpacaEval 2 (arXiv 2404.04475).
- net_win_rate: wins minus losses, from -100 to 100. The Aligner paper (arXiv 2402.02416, appendix E) calls it omega.
"""

_INPUTS = """\
Args:
    predictions (list of str): verdicts, each "win", "tie" or "lose".
    length_differences (list of float): for each verdict, the length of the judged reply minus that of the other one.
    prompt_ids (list of str): id of the prompt of each verdict. Verdicts on one prompt are resampled together.
    length_control (bool): whether to compute the length-controlled win rate. If not, lengths are ignored.
    n_resamples (int): number of bootstrap resamples of the prompts.
    confidence_level (float): coverage of the intervals.
    seed (int): seed of the resamples.

Returns:
    The rates; the percentile bootstrap interval [low, high] of each, as "<rate>_interval"; and the counts win, tie,
    lose. Rates and intervals are None without verdicts.
"""


class WinRate(evaluate.Metric):
    """Plain and length-controlled win rate, with bootstrap intervals over prompts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "length_differences": datasets.Value("float64"),
                    "prompt_ids": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Verdict],
        length_differences: Sequence[float],
        prompt_ids: Sequence[str],
        length_control: bool = True,
        n_resamples: int = 1000,
        confidence_level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        return win_rates(
            predictions,
            length_differences if length_control else None,
            prompt_ids,
            n_resamples=n_resamples,
            confidence_level=confidence_level,
            seed=seed,
        )
