"""Plot of a judge report."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLOURS = {"pairwise_accuracy": "#2a6f97", "top_1": "#bc6c25", "exact_match": "#6a994e", "kendall_tau": "#7b5ea7"}


def plot_report(figures: Sequence[dict[str, Any]], path: str | PathLike[str]) -> None:
    """Plot agreement by number of demonstrations, and the share of first places by shown position.

    Args:
        figures: `JudgeReport.figures`.
        path: Path of the image. Its suffix determines the format.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    agreement, positions = figure.subplots(1, 2)
    # Without a second number of demonstrations there is nothing to connect: each figure becomes a bar.
    bars = len(figures) == 1
    for offset, (name, colour) in enumerate(_COLOURS.items()):
        points = [
            (entry["num_demonstrations"], entry["agreement"][name], entry["agreement"][f"{name}_interval"])
            for entry in figures
            if entry["agreement"][name] is not None
        ]
        positions_of = [offset if bars else number + 0.06 * (offset - 1.5) for number, _, _ in points]
        if bars:
            agreement.bar(positions_of, [value for _, value, _ in points], color=colour, alpha=0.35, width=0.6)
        agreement.errorbar(
            positions_of,
            [value for _, value, _ in points],
            # A percentile interval does not always contain the value, and bars must not have a negative length.
            [
                [max(0.0, value - interval[0]) for _, value, interval in points],
                [max(0.0, interval[1] - value) for _, value, interval in points],
            ],
            color=colour,
            label=name.replace("_", " "),
            marker="o",
            markersize=4,
            capsize=2,
        )
    agreement.set(title="Agreement with the reference")
    if bars:
        agreement.set_xticks(range(len(_COLOURS)), [name.replace("_", "\n") for name in _COLOURS])
        agreement.axhline(0, color="#777777", linewidth=0.8)
    else:
        agreement.set_xlabel("Demonstrations")
        agreement.xaxis.set_major_locator(MaxNLocator(integer=True))

    expected: list[float] = max((entry["position_bias"]["expected_by_position"] for entry in figures), key=len)
    positions.plot(range(1, len(expected) + 1), expected, color="#777777", linestyle="--", label="without bias")
    for entry in figures:
        shares = entry["position_bias"]["first_place_by_position"]
        label = f"demonstrations: {entry['num_demonstrations']}"
        positions.plot(range(1, len(shares) + 1), shares, marker="o", markersize=4, label=label)
    positions.set(xlabel="Shown position", title="Share of first places", ylim=(0, None))
    positions.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (positions,) if bars else (agreement, positions):
        # Below the panel, so that no line crosses the legend.
        panel.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    for panel in (agreement, positions):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)
