"""Charts of the documentation: SVG files that are readable on light and on dark pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, BLUE, ORANGE = "#808b96", "#3c82d2", "#dd7a34"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, with sizes in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text as outlines looks the same everywhere, and a fixed salt keeps the file the same from run to run.
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "cyclealign", "font.family": "DejaVu Sans"})
    return Figure(figsize=(width, height), layout="constrained")


def style(axes: Axes, title: str, *, grid: Literal["x", "y", "both"] = "both") -> None:
    """Set the title, the colours and the grid of a panel."""
    axes.set_title(title, color=GREY, loc="left")
    axes.grid(axis=grid, color=GREY, linewidth=0.6, alpha=0.4)
    axes.tick_params(colors=GREY, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)


def save(figure: Figure, path: Path) -> None:
    """Write a figure without a date, so that the same results give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
