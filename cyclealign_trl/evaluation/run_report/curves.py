"""Values over the steps of runs, from their logs, as panels of comparable series."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from statistics import fmean
from typing import Any

from ...cycle.agreement import agreement_rate
from .run_data import RunData

MAX_POINTS = 240
"""Points of a drawn series. Longer ones are drawn as means of successive points."""
_REPLACED = (
    "agreement/rate", "agreement/full", "improved/ratio", "failures/", "ranker/cost", "ranker/prompt_tokens",
    "ranker/completion_tokens",
)  # fmt: skip
_NOT_METRICS = {"step", "epoch", "total_flos", "train_loss", "train_runtime"}


@dataclass(frozen=True)
class Curve:
    """Values of one metric by optimiser step, with the bounds of their intervals if there are any."""

    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    points_per_mean: int = 1


@dataclass(frozen=True)
class Series:
    """A curve in a panel.

    Args:
        label: Metric, and run if there are several.
        run: Index of the run.
        part: Index of the metric among those of the panel.
        curve: The values.
    """

    label: str
    run: int
    part: int
    curve: Curve


@dataclass(frozen=True)
class Panel:
    """Series that share their axes.

    Args:
        title: Heading.
        series: The series.
        unit: Text before each value.
        span: Values that the axis contains in any case.
    """

    title: str
    series: Sequence[Series]
    unit: str = ""
    span: Sequence[float] = ()


@dataclass(frozen=True)
class _Kind:
    """A panel of known metrics, as names with labels. A name that ends in `/` stands for all metrics of a folder."""

    title: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    unit: str = ""
    span: Sequence[float] = ()


_SHARE = (0.0, 1.0)
_KINDS = (
    _Kind("Score", {"score": "samples"}),
    _Kind("Reward", {"reward": "mean", "rewards/": ""}),
    _Kind(
        "Agreement of policy and ranker",
        {"agreement/rate": "share of the ranks", "agreement/full": "all ranks"},
        span=_SHARE,
    ),
    _Kind("Win rate against the start", {"win_rate/rate": "wins, ties as half", "win_rate/ties": "ties"}, span=_SHARE),
    _Kind(
        "Accuracy of the ranker on known orders",
        {
            "ranking_accuracy/full": "as in the run",
            "ranking_accuracy/without_d2": "without agreements",
            "ranking_accuracy/without_icl": "without demonstrations",
        },
        span=_SHARE,
    ),
    _Kind("Loss", {"loss": "training"}),
    _Kind("Ranking loss", {"ranking_loss": "training"}),
    _Kind("SFT loss", {"sft_loss": "training"}),
    _Kind("Pairs that the policy orders as the ranker", {"ranking/accuracy": "training"}, span=_SHARE),
    _Kind("Rankings with an improved completion", {"improved/ratio": "share"}, span=_SHARE),
    _Kind("Prompts without a ranking", {"failed/": ""}, span=(0.0,)),
    _Kind("Cost so far", {"spent/cost": "US dollars"}, "$"),
    _Kind("Tokens so far", {"spent/prompt": "sent", "spent/completion": "received"}),
)


def panels(runs: Sequence[RunData]) -> tuple[list[Panel], list[Panel]]:
    """Return the panels of known metrics, and those of all others."""
    curves = [curves_of(run) for run in runs]
    names = list(dict.fromkeys(name for own in curves for name in own))
    left = set(names)
    known = []
    for kind in _KINDS:
        members = {name: label for name in names if (label := _label(kind, name)) is not None}
        left -= members.keys()
        if members:
            known.append(_panel(kind.title, members, runs, curves, kind))
    return known, [_panel(name, {name: name.rpartition("/")[2]}, runs, curves) for name in names if name in left]


def curves_of(run: RunData) -> dict[str, Curve]:
    """Return all curves of a run by metric. What the interaction log has is taken from there, since it is complete."""
    points = _history_points(run.history)
    if run.rows:
        points = {name: curve for name, curve in points.items() if not name.startswith(_REPLACED)}
        points |= _log_points(run.rows)
    bounds = {name for name in points if _value_of_bound(name, points) is not None}
    return {
        name: shorten(Curve(list(values), list(values.values()), *_interval(name, points)))
        for name, values in points.items()
        if values and name not in bounds
    }


def shorten(curve: Curve) -> Curve:
    """Return a curve of at most `MAX_POINTS` points, each the mean of as many successive ones."""
    size = math.ceil(len(curve.steps) / MAX_POINTS)
    if size == 1:
        return curve

    def mean(values: Sequence[float] | None) -> list[float] | None:
        if values is None:
            return None
        return [fmean(values[start : start + size]) for start in range(0, len(values), size)]

    last = [curve.steps[min(start + size, len(curve.steps)) - 1] for start in range(0, len(curve.steps), size)]
    return Curve(last, mean(curve.values) or (), mean(curve.low), mean(curve.high), size)


_Points = dict[str, dict[int, float]]
"""Values by metric and step."""


def _history_points(history: Sequence[Mapping[str, Any]]) -> _Points:
    points: _Points = defaultdict(dict)
    for entry in history:
        for name, value in entry.items():
            if name not in _NOT_METRICS and isinstance(value, int | float) and math.isfinite(value):
                points[name][entry["step"]] = float(value)
    return points


def _log_points(rows: Sequence[Mapping[str, Any]]) -> _Points:
    """Return curves from the interactions. A row has the steps before it; a metric, those after it."""
    points: _Points = defaultdict(dict)
    reasons = sorted({row["failure"] for row in rows if row["failure"] is not None})
    spent = {"cost": 0.0, "prompt": 0, "completion": 0}
    priced = False
    for step, of_step in _by_step(rows):
        ordered = [row for row in of_step if row["agreement"] is not None and len(set(row["ranks"])) > 1]
        if ordered:
            rates = [agreement_rate(row["agreement"], row["ranks"]) for row in ordered]
            points["agreement/rate"][step + 1] = fmean(rates)
            points["agreement/full"][step + 1] = fmean(rate == 1 for rate in rates)
        ranked = [row for row in of_step if row["ranks"] is not None]
        if ranked:
            points["improved/ratio"][step + 1] = fmean(row["improved_completion"] is not None for row in ranked)
        for reason in reasons:
            points[f"failed/{reason}"][step + 1] = fmean(row["failure"] == reason for row in of_step)
        for usage in (row["usage"] for row in of_step if row["usage"] is not None and not row["usage"]["cached"]):
            spent["prompt"] += usage["prompt_tokens"]
            spent["completion"] += usage["completion_tokens"]
            spent["cost"] += usage["cost"] or 0.0
            priced = priced or usage["cost"] is not None
        points["spent/prompt"][step + 1] = spent["prompt"]
        points["spent/completion"][step + 1] = spent["completion"]
        if priced:
            points["spent/cost"][step + 1] = spent["cost"]
    if not any(spent.values()):
        del points["spent/prompt"], points["spent/completion"]
    return points


def _by_step(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    for step, of_step in groupby(rows, key=itemgetter("step")):
        yield step, list(of_step)


def _value_of_bound(name: str, points: Mapping[str, Any]) -> str | None:
    """Return the metric of which a metric is the low or high bound: `a/rate` of `a/low`, or `b` of `b_low`."""
    for bound in ("low", "high"):
        if name.endswith(f"/{bound}"):
            folder = name.removesuffix(bound)
            return next((f"{folder}{value}" for value in ("rate", "mean") if f"{folder}{value}" in points), None)
        if name.endswith(f"_{bound}") and (value := name.removesuffix(f"_{bound}")) in points:
            return value
    return None


def _interval(name: str, points: _Points) -> tuple[list[float] | None, list[float] | None]:
    """Return the bounds of a metric's values, if both are there for each of them."""
    bounds: dict[str, dict[int, float]] = {}
    for other, values in points.items():
        if _value_of_bound(other, points) == name:
            bounds[other.rpartition("_")[2].rpartition("/")[2]] = values
    low, high = bounds.get("low", {}), bounds.get("high", {})
    if not points[name].keys() <= low.keys() & high.keys():
        return None, None
    return [low[step] for step in points[name]], [high[step] for step in points[name]]


def _label(kind: _Kind, name: str) -> str | None:
    """Return how a panel calls a metric, or `None` if it does not show it."""
    plain = name.removeprefix("eval_")
    evaluated = "evaluation" if plain != name else ""
    for metric, label in kind.metrics.items():
        if metric.endswith("/") and plain.startswith(metric):
            return " ".join(filter(None, [plain.removeprefix(metric).replace("_", " "), evaluated and "(evaluation)"]))
        if metric == plain:
            return evaluated or label
    return None


def _panel(
    title: str,
    members: Mapping[str, str],
    runs: Sequence[RunData],
    curves: Sequence[Mapping[str, Curve]],
    kind: _Kind | None = None,
) -> Panel:
    several = len(runs) > 1
    series = []
    for part, (name, label) in enumerate(members.items()):
        for index, (run, own) in enumerate(zip(runs, curves, strict=True)):
            if name in own:
                full = (f"{run.name}, {label}" if len(members) > 1 else run.name) if several else label
                series.append(Series(full, index, part, own[name]))
    return Panel(title, series) if kind is None else Panel(title, series, kind.unit, kind.span)
