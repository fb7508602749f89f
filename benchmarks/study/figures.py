"""Figures of the study from stored results: means and paired differences, with intervals, and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.charts import BLUE, GREY, new_figure, save, style
from benchmarks.estimates import intercept_with_interval, mean_with_interval
from cyclealign_trl.evaluation.intervals import Estimate
from cyclealign_trl.evaluation.metrics.reward_score import transform_rewards

from .rows import ROWS


@dataclass(frozen=True)
class Results:
    """Results of a scale.

    Args:
        runs: Results of each row, one per seed.
        reward_models: Summaries of `evaluator` and `judge`.
    """

    runs: Mapping[str, Sequence[Mapping[str, Any]]]
    reward_models: Mapping[str, Mapping[str, Any]]

    def rewards(self, row: str, reward_model: str) -> np.ndarray:
        """Return 100 times the sigmoid of the rewards `(B,)` of a row, averaged over its seeds."""
        values: np.ndarray = self._by_seed(row, reward_model).mean(0)
        return values

    def means_by_seed(self, row: str, reward_model: str) -> list[float]:
        """Return the mean reward of a row with each of its seeds."""
        return list(self._by_seed(row, reward_model).mean(1))

    def _by_seed(self, row: str, reward_model: str) -> np.ndarray:
        """Return 100 times the sigmoid of the rewards `(seeds, B)` of a row."""
        rewards = np.array([run["rewards"][reward_model] for run in self.runs[row]], dtype=float)
        values: np.ndarray = transform_rewards(rewards, "sigmoid")
        return values

    def words(self, row: str) -> np.ndarray:
        """Return the number of words `(B,)` of the replies of a row, averaged over its seeds."""
        words: np.ndarray = np.array([run["words"] for run in self.runs[row]], dtype=float).mean(0)
        return words

    def length_correlation(self, reward_model: str) -> float:
        """Return the correlation of rewards and numbers of words, over the replies of all rows."""
        rewards = np.concatenate([self.rewards(row, reward_model) for row in self.runs])
        return float(np.corrcoef(rewards, np.concatenate([self.words(row) for row in self.runs]))[0, 1])

    def mean(self, row: str, reward_model: str) -> Estimate:
        """Return the mean reward of a row with its interval."""
        return mean_with_interval(self.rewards(row, reward_model))

    def difference(self, row: str, baseline: str | None, reward_model: str, *, equal_length: bool = False) -> Estimate:
        """Return the mean reward of a row minus that of another on the same prompts, with its interval.

        Args:
            row: The row.
            baseline: The other row.
            reward_model: `"evaluator"` or `"judge"`.
            equal_length: Whether to return the difference that a line through the differences of the prompts, by how
                many words the reply of the row has more than the other, predicts for replies of the same length.
        """
        if baseline is None or row == baseline or not {row, baseline} <= set(self.runs):
            return None, None
        difference = self.rewards(row, reward_model) - self.rewards(baseline, reward_model)
        if equal_length:
            return intercept_with_interval(difference, self.words(row) - self.words(baseline))
        return mean_with_interval(difference)


def load_results(folder: Path) -> Results:
    """Read the results of a scale, in the order of `ROWS`.

    Raises:
        ValueError: If rows were evaluated on different prompts, which happens if the dialogues were changed.
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for row in ROWS:
        paths = sorted(folder.glob(f"{row}-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
        if paths:
            runs[row] = [json.loads(path.read_text("utf-8")) for path in paths]
    prompts = {tuple(run["prompt_ids"]) for of_row in runs.values() for run in of_row}
    if len(prompts) > 1:
        raise ValueError(f"The results in {folder} belong to {len(prompts)} different sets of prompts.")
    return Results(runs, json.loads((folder / "reward_models.json").read_text("utf-8")))


def draw(results: Results, path: Path) -> None:
    """Draw the difference of each row from the initial policy by the evaluator, with intervals, as an SVG.

    A filled point is the difference, and a hollow one below it the difference at equal length. Random judges are grey.
    """
    rows = [row for row in results.runs if row != "zero_shot"][::-1]
    figure = new_figure(8, 1.2 + 0.45 * len(rows))
    axes = figure.add_subplot()
    for position, row in enumerate(rows):
        colour = GREY if ROWS[row].judge == "random" else BLUE
        for equal_length, height, fill in ((False, position + 0.13, colour), (True, position - 0.17, "none")):
            value, interval = results.difference(row, "zero_shot", "evaluator", equal_length=equal_length)
            if value is not None and interval is not None:
                axes.plot(interval, [height, height], color=colour, linewidth=1 if equal_length else 2)
                axes.plot([value], [height], "o", color=colour, markerfacecolor=fill, markersize=5)
    axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    style(axes, "Reward minus that of the initial policy", grid="x")
    save(figure, path)
