"""Draw the peak memory of a scoring step by number of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.charts import BLUE, GREY, ORANGE, new_figure, save, style

CURVES = (("ours_mib", "shared_tokens", "ours", "P + K C", BLUE),
          ("padded_mib", "padded_tokens", "padded rows", "K (P + C)", ORANGE))  # fmt: skip


def draw_memory(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write an SVG: measured peaks as points, and lines that the number of tokens predicts from the first."""
    figure = new_figure(8, 3.7)
    axes = figure.add_subplot()
    for measured, tokens, label, prediction, colour in CURVES:
        points = [(row["n"], row[measured], row[tokens]) for row in rows if row.get(measured)]
        if not points:
            continue
        ns = [n for n, _, _ in points]
        _, first_peak, first_tokens = points[0]
        predicted = [first_peak * count / first_tokens for _, _, count in points]
        axes.plot(ns, predicted, color=colour, linewidth=1.4, linestyle="--", label=f"grows as {prediction}")
        axes.plot(ns, [peak for _, peak, _ in points], "o", color=colour, label=label)
    style(axes, "Peak memory of forward and backward, above weights and gradients", grid="y")
    axes.set_xlabel("completions per prompt, K", color=GREY)
    axes.set_ylabel("MiB", color=GREY)
    axes.set_xticks([row["n"] for row in rows])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=GREY)
    save(figure, path)
