"""Markdown tables of a reward report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markdown_table import markdown_table, printable

Figures = Mapping[str, Any]
"""`RewardReport.figures`."""


def means_table(title: str, figures: Figures) -> str:
    """Return the mean rewards, with models as rows and groups as columns, like Table 1 of the paper."""
    header = [title, *(f"{name} ({group['prompts']})" for name, group in figures["groups"].items()), "Total"]
    rows = {name: [_mean(figure) for figure in _cells(model)] for name, model in figures["models"].items()}
    return markdown_table(header, rows)


def totals_table(figures: Figures, confidence_level: float) -> str:
    """Return the mean rewards with their intervals, with groups as rows."""
    models = figures["models"]
    return _with_intervals(f"With {confidence_level:.0%} intervals", figures, models)


def differences_table(figures: Figures, confidence_level: float) -> str:
    """Return the differences of the other models from the first one, on the same prompts."""
    baseline = next(iter(figures["models"]))
    columns = {entry["model"]: entry for entry in figures["differences"] if entry["baseline"] == baseline}
    return _with_intervals(f"Minus {baseline}, with {confidence_level:.0%} intervals", figures, columns)


def notes(figures: Figures) -> list[str]:
    """Return paragraphs on what the figures leave out or are limited by."""
    groups = figures["groups"].values()
    paragraphs = []
    if any(group["prompts"] < group["size"] for group in groups):
        total = sum(group["size"] for group in groups)
        paragraphs.append(
            f"Groups are samples. The total weights them by their sizes in the data set, {total} prompts in all."
        )
    for name, model in figures["models"].items():
        for count, meaning in ((model["failed"], "refused by the endpoint"), (model["unscored"], "without a score")):
            if count:
                paragraphs.append(f"{printable(name)}: {count} replies {meaning}, left out.")
        if model["length_limited"]:
            paragraphs.append(
                f"{printable(name)}: {model['length_limited']:.0%} of the replies reached the token limit."
            )
    return paragraphs


def _with_intervals(title: str, figures: Figures, columns: Mapping[str, Figures]) -> str:
    names = [*(f"{name} ({group['prompts']})" for name, group in figures["groups"].items()), "Total"]
    cells = [[_mean_and_interval(figure) for figure in _cells(column)] for column in columns.values()]
    return markdown_table([title, *columns], dict(zip(names, map(list, zip(*cells, strict=True)), strict=True)))


def _cells(model: Figures) -> list[Figures]:
    return [*model["groups"].values(), model["micro"]]


def _mean(figure: Figures) -> str:
    return "-" if figure["mean"] is None else f"{figure['mean']:.2f}"


def _mean_and_interval(figure: Figures) -> str:
    interval = figure["interval"]
    return "-" if interval is None else f"{_mean(figure)} [{interval[0]:.2f}, {interval[1]:.2f}]"
