"""Learning curves of the demo: the policy's score and the agreement with the judge by optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..cycle.agreement import agreement_rate


def curves_by_step(
    rows: Sequence[dict[str, Any]], score: Callable[[str, str], float]
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the mean score of the policy's samples, and the mean agreement, by optimiser step."""
    scores: dict[int, list[float]] = {}
    agreements: dict[int, list[float]] = {}
    for row in rows:
        question = row["prompt"][-1]["content"]
        scores.setdefault(row["step"], []).extend(score(question, reply) for reply in row["completions"])
        if row["agreement"] is not None:
            agreements.setdefault(row["step"], []).append(agreement_rate(row["agreement"], row["ranks"]))
    return (
        {step: fmean(values) for step, values in scores.items()},
        {step: fmean(values) for step, values in agreements.items()},
    )


def plot_curves(scores: dict[int, float], agreements: dict[int, float], path: Path) -> None:
    """Plot the policy's score and the agreement by optimiser step."""
    from matplotlib.figure import Figure  # optional

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, values, label in (
        (panels[0], scores, "Score of the policy's samples"),
        (panels[1], agreements, "Agreed share of each ranking"),
    ):
        panel.plot(list(values), list(values.values()), color="#2a6f97", linewidth=1.6)
        panel.set(xlabel="Optimiser step", title=label, ylim=(0, 1.02))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)
