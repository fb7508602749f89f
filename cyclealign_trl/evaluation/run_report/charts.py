"""Geometry of the charts: panels to paths in an SVG view box. The template writes the markup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .curves import Panel, Series

WIDTH, HEIGHT = 340, 176
LEFT, RIGHT, TOP, BOTTOM = 42, 16, 10, 22
NUM_COLOURS = 6


@dataclass(frozen=True)
class Line:
    """A series as it is drawn.

    Args:
        label: Text of the legend.
        colour: Index of the colour.
        dash: Index of the dash pattern.
        path: Path of the line.
        band: Path of the area between the bounds, if there are any.
        dots: Positions of the points, if they are few.
        last: The last value, as text.
    """

    label: str
    colour: int
    dash: int
    path: str
    band: str | None
    dots: Sequence[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class Chart:
    """A panel as it is drawn.

    Args:
        title: Heading.
        lines: The series.
        x_ticks: Position and text of each tick.
        y_ticks: The same, for the values.
        note: What the points are, if they are means.
        summary: The series in words, for who does not see them.
        data: Values for the readout, as JSON data.
    """

    title: str
    lines: Sequence[Line]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    note: str
    summary: str
    data: dict[str, Any]


def draw(panel: Panel, several_runs: bool) -> Chart:
    """Lay out a panel.

    Args:
        panel: The panel.
        several_runs: Whether colours tell runs apart. Otherwise they tell the metrics of the panel apart.
    """
    x_low, x_high = _range([step for series in panel.series for step in series.curve.steps])
    values = [value for series in panel.series for value in _extent(series)]
    values += panel.span
    y_ticks = ticks(min(values), max(values))
    y_low, y_high = min(min(values), y_ticks[0]), max(max(values), y_ticks[-1])

    def x(step: float) -> float:
        return round(LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(steps: Sequence[float], values: Sequence[float]) -> str:
        points = (f"{x(step):g} {y(value):g}" for step, value in zip(steps, values, strict=True))
        return "M" + "L".join(points)

    lines = []
    for series in panel.series:
        curve = series.curve
        band = None
        if curve.low is not None and curve.high is not None:
            band = path([*curve.steps, *reversed(curve.steps)], [*curve.high, *reversed(curve.low)]) + "Z"
        dots = [(x(step), y(value)) for step, value in zip(curve.steps, curve.values, strict=True)]
        lines.append(
            Line(
                series.label,
                colour=(series.run if several_runs else series.part) % NUM_COLOURS,
                dash=(series.part if several_runs else series.part // NUM_COLOURS) % 4,
                path=path(curve.steps, curve.values),
                band=band,
                dots=dots if len(dots) <= 12 else (),
                last=panel.unit + number(curve.values[-1]),
            )
        )
    size = max(series.curve.points_per_mean for series in panel.series)
    return Chart(
        panel.title,
        lines,
        [(x(tick), number(tick)) for tick in ticks(x_low, x_high, 5, whole=True) if x_low <= tick <= x_high],
        [(y(tick), panel.unit + number(tick)) for tick in y_ticks],
        note=f"Each point is the mean of {size} values." if size > 1 else "",
        summary="; ".join(_in_words(series) for series in panel.series),
        data={"x": [x_low, x_high], "unit": panel.unit, "series": [_readout(series) for series in panel.series]},
    )


def ticks(low: float, high: float, number: int = 4, whole: bool = False) -> list[float]:
    """Return round values, about `number` of them, from at most `low` to at least `high`."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """Return a number in few characters."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}"


def _range(steps: Sequence[float]) -> tuple[float, float]:
    return (min(steps), max(steps)) if min(steps) < max(steps) else (min(steps) - 1, max(steps) + 1)


def _extent(series: Series) -> list[float]:
    curve = series.curve
    return [*curve.values, *(curve.low or ()), *(curve.high or ())]


def _in_words(series: Series) -> str:
    curve = series.curve
    first, last = number(curve.values[0]), number(curve.values[-1])
    return f"{series.label}: {first} at step {curve.steps[0]:g}, {last} at step {curve.steps[-1]:g}"


def _readout(series: Series) -> dict[str, Any]:
    curve = series.curve
    readout: dict[str, Any] = {"x": list(curve.steps), "y": [float(f"{value:.4g}") for value in curve.values]}
    if curve.low is not None and curve.high is not None:
        readout["low"] = [float(f"{value:.4g}") for value in curve.low]
        readout["high"] = [float(f"{value:.4g}") for value in curve.high]
    return readout
