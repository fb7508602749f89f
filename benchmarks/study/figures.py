"""Figures of the study from stored results: means and paired differences, with intervals, and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.figures import GREY, OURS
from cyclealign_trl.evaluation.intervals import Estimate, bootstrap_group_means
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
        table = np.array([run["rewards"][reward_model] for run in self.runs[row]], dtype=float)
        values: np.ndarray = transform_rewards(table, "sigmoid").mean(0)
        return values

    def mean(self, row: str, reward_model: str) -> Estimate:
        """Return the mean reward of a row with its interval."""
        return _estimate(self.rewards(row, reward_model))

    def difference(self, row: str, baseline: str | None, reward_model: str) -> Estimate:
        """Return the mean reward of a row minus that of another on the same prompts, with its interval."""
        if baseline is None or row == baseline or not {row, baseline} <= set(self.runs):
            return None, None
        return _estimate(self.rewards(row, reward_model) - self.rewards(baseline, reward_model))


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
    """Draw the difference of each row from the initial policy by the evaluator, with intervals, as an SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text as outlines looks the same everywhere; a fixed salt and no date keep the file the same from run to run.
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "cyclealign", "font.family": "DejaVu Sans"})
    rows = [row for row in results.runs if row != "zero_shot"][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for position, row in enumerate(rows):
        value, interval = results.difference(row, "zero_shot", "evaluator")
        if value is not None and interval is not None:
            colour = GREY if ROWS[row].judge == "random" else OURS
            axes.plot(interval, [position, position], color=colour, linewidth=2)
            axes.plot([value], [position], "o", color=colour)
    axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_title("Reward of the evaluator, minus that of the initial policy", color=GREY, loc="left")
    axes.grid(axis="x", color=GREY, linewidth=0.6, alpha=0.4)
    axes.tick_params(colors=GREY, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def _estimate(values: np.ndarray) -> Estimate:
    return bootstrap_group_means(values[:, None], ["all"] * len(values), None, 1000, 0.95, 0).micro[0]
