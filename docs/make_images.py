"""Draw the pictures of README and docs: the loop, and the learning curve of the demo.

    cyclealign demo --output_dir outputs/demo
    cyclealign demo --output_dir outputs/control --control
    python docs/make_images.py outputs/demo outputs/control

Each picture is written to `docs/images/` twice: for light and for dark pages.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from cyclealign_trl import agreement_ranking
from cyclealign_trl.cycle.interaction_log import InteractionLog
from cyclealign_trl.demo.corpus import score

IMAGES = Path(__file__).parent / "images"

# Text as outlines looks the same everywhere; a fixed salt and no date keep the files the same from run to run.
mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "cyclealign", "font.family": "DejaVu Sans"})


@dataclass(frozen=True)
class Theme:
    """Colours for one kind of page."""

    name: str
    text: str
    muted: str
    line: str
    surface: str
    policy: str
    ranker: str
    agreed: str
    on_colour: str


THEMES = (
    Theme("light", "#1f2933", "#5f6c7b", "#cbd2d9", "#f7f9fb", "#2463a6", "#b4541a", "#2f7d4f", "#ffffff"),
    Theme("dark", "#e6ebf0", "#9aa7b4", "#46525e", "#1c232b", "#7db4ee", "#f0a36b", "#7ccb98", "#11161c"),
)


def draw_loop(theme: Theme) -> Figure:
    """Draw one interaction of policy and ranker."""
    figure = Figure(figsize=(10, 4.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, 49))
    axes.axis("off")

    _actor(axes, theme, 2, theme.policy, "Policy", "a model you train")
    _actor(axes, theme, 80, theme.ranker, "Ranker", "an LLM you call")

    ranker_order, policy_order = "CADB", "CDAB"
    indices = {name: index for index, name in enumerate("ABCD")}
    agreed = agreement_ranking([indices[name] for name in ranker_order], [indices[name] for name in policy_order])
    agreed_names = "".join("ABCD"[index] for index in agreed)

    _step(axes, theme, 44.6, 1, "The policy samples completions", theme.policy)
    _arrow(axes, theme.policy, (20.5, 40.2), (79.5, 40.2))
    _chips(axes, theme, 50, 40.2, "ABCD", theme.policy)

    _step(axes, theme, 35.0, 2, "The ranker orders them, and writes a better one", theme.ranker)
    _arrow(axes, theme.ranker, (79.5, 30.6), (20.5, 30.6))
    _chips(axes, theme, 50, 30.6, ranker_order + "★", theme.ranker)
    axes.text(
        50, 26.8, "the policy learns this order (PRO or RRHF) and the better completion (SFT)",
        color=theme.muted, size=9.5, ha="center", va="center",
    )  # fmt: skip

    axes.add_patch(_box(31, 2, 38, 20.4, theme.surface, theme.line))
    _step(axes, theme, 19.4, 3, "Both orders are compared", theme.agreed)
    for y, label, order, colour in (
        (14.9, "ranker", ranker_order, theme.ranker),
        (10.2, "policy", policy_order, theme.policy),
        (5.5, "agreed", agreed_names, theme.agreed),
    ):
        axes.text(40.5, y, label, color=theme.muted, size=10, ha="right", va="center")
        _chips(axes, theme, 53.4, y, order, colour, keep=agreed_names, size=3.3)
    _arrow(axes, theme.policy, (20.5, 12.2), (30.6, 12.2))
    axes.text(25.5, 15.7, "its own\norder", color=theme.muted, size=9.5, ha="center", va="center", linespacing=1.25)
    _arrow(axes, theme.agreed, (69.4, 12.2), (79.5, 12.2))
    axes.text(
        74.5, 15.7, "a new\ndemonstration", color=theme.muted, size=9.5, ha="center", va="center", linespacing=1.25
    )
    return figure


def _box(x: float, y: float, width: float, height: float, face: str, edge: str, line: float = 1.0) -> FancyBboxPatch:
    style = "round,pad=0,rounding_size=1.2"
    return FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=line)


def _actor(axes: Axes, theme: Theme, x: float, colour: str, name: str, description: str) -> None:
    axes.add_patch(_box(x, 2, 18, 45, theme.surface, colour, 1.6))
    axes.text(x + 9, 27.2, name, color=colour, size=17, weight="bold", ha="center", va="center")
    axes.text(x + 9, 23.4, description, color=theme.muted, size=10, ha="center", va="center")


def _arrow(axes: Axes, colour: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=15, color=colour, linewidth=1.6, shrinkA=0)
    axes.add_patch(arrow)


def _step(axes: Axes, theme: Theme, y: float, number: int, text: str, colour: str) -> None:
    label = axes.text(51.4, y, text, color=theme.text, size=11, ha="center", va="center")
    left = axes.transData.inverted().transform(label.get_window_extent())[0][0]
    axes.text(
        left - 2.4, y, str(number), color=theme.on_colour, size=9.5, weight="bold", ha="center", va="center",
        bbox={"boxstyle": "circle,pad=0.28", "facecolor": colour, "edgecolor": "none"},
    )  # fmt: skip


def _chips(
    axes: Axes, theme: Theme, x: float, y: float, names: str, colour: str, keep: str = "ABCD★", size: float = 3.8
) -> None:
    """Draw completions in a row around `x`; those not in `keep` are only outlined."""
    for position, name in enumerate(names):
        left = x + (position - len(names) / 2) * (size + 1.2) + 0.6
        axes.add_patch(_box(left, y - size / 2, size, size, colour if name in keep else theme.surface, colour, 1.4))
        axes.text(
            left + size / 2, y - 0.05, name, color=theme.on_colour if name in keep else colour, size=size * 2.9,
            weight="bold", ha="center", va="center_baseline",
        )  # fmt: skip


def draw_curve(theme: Theme, demo: Path, control: Path) -> Figure:
    """Draw the score of the policy's samples by optimiser step, for the demo and for random rankings."""
    figure = Figure(figsize=(10, 3.7))
    axes = figure.add_axes((0.055, 0.14, 0.78, 0.73))
    runs = (("rule-based judge", demo, theme.policy, 2.4), ("random rankings", control, theme.muted, 1.7))
    for label, folder, colour, width in runs:
        steps, scores = _scores_by_step(folder)
        axes.plot(steps, scores, color=colour, linewidth=width, solid_capstyle="round", solid_joinstyle="round")
        axes.annotate(
            label, (steps[-1], scores[-1]), (9, 0), textcoords="offset points", color=colour, size=11,
            weight="bold", va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set_title(
        "Mean score of the completions that the policy samples", color=theme.text, size=12.5, loc="left", pad=13
    )
    axes.set_xlabel("optimiser step", color=theme.muted, size=10.5)
    axes.set(xlim=(0.5, 50), ylim=(0, 1), xticks=[1, 10, 20, 30, 40, 50], yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="y", color=theme.line, linewidth=0.8, alpha=0.6)
    axes.tick_params(colors=theme.muted, length=0, labelsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.line)
    return figure


def _scores_by_step(run: Path) -> tuple[list[int], list[float]]:
    scores: dict[int, list[float]] = defaultdict(list)
    for row in InteractionLog(run).read().to_pylist():
        question = row["prompt"][-1]["content"]
        scores[row["step"] + 1] += [score(question, completion) for completion in row["completions"]]
    return sorted(scores), [fmean(scores[step]) for step in sorted(scores)]


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("demo", type=Path, help="Output directory of `cyclealign demo`.")
    parser.add_argument("control", type=Path, help="Output directory of `cyclealign demo --control`.")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    for theme in THEMES:
        for name, figure in (("loop", draw_loop(theme)), ("curve", draw_curve(theme, args.demo, args.control))):
            figure.savefig(IMAGES / f"{name}-{theme.name}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
