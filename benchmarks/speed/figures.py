"""Draw the peak memory of a scoring step by number of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GREY, OURS, PADDED = "#808b96", "#3c82d2", "#dd7a34"  # readable on light and on dark pages
CURVES = (("ours_mib", "shared_tokens", "ours", "P + K C", OURS),
          ("padded_mib", "padded_tokens", "padded rows", "K (P + C)", PADDED))  # fmt: skip


def draw_memory(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write an SVG: measured peaks as points, and lines that the number of tokens predicts from the first."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text as outlines looks the same everywhere; a fixed salt and no date keep the file the same from run to run.
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "cyclealign", "font.family": "DejaVu Sans"})
    figure = Figure(figsize=(8, 3.7), layout="constrained")
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
    axes.set_title("Peak memory of forward and backward, above weights and gradients", color=GREY, loc="left")
    axes.set_xlabel("completions per prompt, K", color=GREY)
    axes.set_ylabel("MiB", color=GREY)
    axes.set_xticks([row["n"] for row in rows])
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GREY, linewidth=0.6, alpha=0.4)
    axes.tick_params(colors=GREY, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
