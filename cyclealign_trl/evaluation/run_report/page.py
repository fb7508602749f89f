"""One self-contained HTML page about runs: their curves, interactions, evaluations and settings."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2

from ..._files import atomic_write
from ...cycle.interaction_totals import summarize
from ...types import valid_text
from . import MAX_PROMPTS
from .charts import BOTTOM, HEIGHT, LEFT, NUM_COLOURS, RIGHT, TOP, WIDTH, draw, number
from .curves import Curve, curves_of, panels
from .documents import read_markdown
from .payload import make_payload
from .run_data import RunData, read_run, short_names

FILE_NAME = "report.html"
_KEPT_CONTROLS = "\n\t"
_HIDDEN = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029, 0xFEFF}


@dataclass(frozen=True)
class SettingRow:
    """A setting of all runs, as texts. `differs` says whether the runs do."""

    name: str
    values: Sequence[str]
    differs: bool


def write_run_report(
    runs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    output_file: str | os.PathLike[str] | None = None,
    max_prompts: int = MAX_PROMPTS,
) -> Path:
    """Write one HTML page about training runs and evaluations.

    The page shows losses, agreement, cost and every other logged metric over time, the interactions prompt by prompt,
    replies before and after, the tables of evaluations, settings and versions. It needs no network and no server.
    Prompts and completions are in it, so it is as confidential as they are.

    Args:
        runs: Output directory of a run, or several to show beside each other. Directories of evaluations, which have a
            `report.md`, add their tables.
        output_file: Page to write. Defaults to `report.html` in the first directory.
        max_prompts: Number of prompts whose interactions are included. Of more, as many are included, evenly spaced
            over the runs. The curves always use all.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If a directory does not exist.
        ValueError: If a directory has nothing to report, there is none, or `max_prompts` is less than 1.

    Example:
        ```python
        write_run_report(["outputs/pro", "outputs/rrhf"], "comparison.html")
        ```
    """
    folders = [Path(run) for run in ([runs] if isinstance(runs, str | os.PathLike) else runs)]
    if not folders:
        raise ValueError("There is no run to report: pass at least one output directory.")
    if max_prompts < 1:
        raise ValueError(f"max_prompts must be at least 1, got {max_prompts}.")
    data = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    path = folders[0] / FILE_NAME if output_file is None else Path(output_file)
    with atomic_write(path) as temporary:
        temporary.write_text(render(data, max_prompts), encoding="utf-8")
    return path


def render(data: Sequence[RunData], max_prompts: int = MAX_PROMPTS) -> str:
    """Return the page about what was read."""
    runs = [run for run in data if run.trained]
    known, others = panels(runs) if runs else ([], [])
    charts = [draw(panel, several_runs=len(runs) > 1) for panel in [*known, *others]]
    payload = make_payload(runs, [chart.data for chart in charts], max_prompts)
    figures = _figures(runs)
    script, style = _asset("page.js"), _asset("page.css")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    page: str = environment.from_string(_asset("page.html")).render(
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; "
        "form-action 'none'",
        script=script,
        style=style,
        data=data,
        runs=runs,
        leads=[_lead(run) for run in runs],
        figures=figures,
        has_arrows=any("→" in (value or "") for _, values in figures for value in values),
        charts=charts[: len(known)],
        other_charts=charts[len(known) :],
        plot={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        num_colours=NUM_COLOURS,
        payload=payload,
        has_held_out=any(run.held_out for run in runs),
        documents=[
            (f"{run.name}/{name}".rstrip("/"), read_markdown(text)) for run in data for name, text in run.tables
        ],
        changed=_settings(runs, changed=True),
        unchanged=_settings(runs, changed=False),
        about=_compare(runs, {"started": _started, "model": _of("model"), "ranker": _of("ranker"),
                              "training data": _data("training"), "evaluation data": _data("evaluation"),
                              "trainer": _of("trainer"), "processes": _of("processes"), "device": _of("device")}),
        versions=_compare(
            runs,
            {name: _of("versions", name) for name in _names(run.record.get("versions", {}) for run in runs)},
        ),
        notes=[(run.name, note) for run in runs for note in run.notes],
    )  # fmt: skip
    return page


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source expression by which the content security policy allows an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _visible(value: Any) -> Any:
    """Return text with control characters spelled out: nothing in it may hide or reorder what the page says."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(
        f"[U+{ord(letter):04X}]" if ord(letter) in _HIDDEN and letter not in _KEPT_CONTROLS else letter
        for letter in valid_text(value)
    )


# The part above the curves


def _lead(run: RunData) -> str:
    record = run.record
    parts = [
        record.get("trainer"),
        record.get("model"),
        f"ranked by {record['ranker']}" if record.get("ranker") else None,
    ]
    return ", ".join(str(part) for part in parts if part)


def _figures(runs: Sequence[RunData]) -> list[tuple[str, list[str | None]]]:
    """Return the main figures as rows of a title and a text per run. Figures that no run has are left out."""
    columns = [_figures_of(run) for run in runs]
    return [(title, [column.get(title) for column in columns]) for title in _names(columns)]


def _figures_of(run: RunData) -> dict[str, str]:
    curves = curves_of(run)
    figures = {}
    last_steps = [*(row["step"] + 1 for row in run.rows[-1:]), *(entry["step"] for entry in run.history[-1:])]
    figures["Optimiser steps"] = f"{max(last_steps):,}"
    for name, title in (
        ("score", "Score"),
        ("reward", "Reward"),
        ("agreement/rate", "Agreement"),
        ("loss", "Loss"),
    ):
        if name in curves:
            figures[title] = _first_and_last(curves[name])
    if "win_rate/rate" in curves:
        figures["Win rate"] = _with_interval(curves["win_rate/rate"])
    if run.rows:
        totals = summarize(run.rows, run.record.get("settings", {}).get("min_agreement", 2))
        failed = sum(totals.failures.values())
        asked = totals.rankings + failed
        figures["Rankings"] = f"{totals.rankings:,}"
        figures["Failed rankings"] = f"{failed:,}" + (f" ({failed / asked:.1%})" if failed else "")
        if totals.billed.answers:
            figures["Cost"] = totals.billed.cost_text
            tokens = totals.billed.prompt_tokens + totals.billed.completion_tokens
            figures["Tokens"] = f"{number(tokens)}"
    return figures


def _first_and_last(curve: Curve) -> str:
    """Return the means of the first and of the last tenth of a curve."""
    size = max(1, len(curve.values) // 10)
    first, last = fmean(curve.values[:size]), fmean(curve.values[-size:])
    return " → ".join(f"{value:.2f}" if abs(value) < 10 else number(value) for value in (first, last))


def _with_interval(curve: Curve) -> str:
    value = f"{curve.values[-1]:.1%}"
    if curve.low is None or curve.high is None:
        return value
    return f"{value} [{100 * curve.low[-1]:.1f}, {100 * curve.high[-1]:.1f}]"


# Settings


def _settings(runs: Sequence[RunData], changed: bool) -> list[SettingRow]:
    """Return the settings that some run changed, or all others."""
    named = set(_names(run.record.get("changed", ()) for run in runs))
    names = _names(run.record.get("settings", {}) for run in runs)
    return _compare(runs, {name: _of("settings", name) for name in names if (name in named) == changed})


def _compare(runs: Sequence[RunData], getters: Mapping[str, Any]) -> list[SettingRow]:
    rows = []
    for name, get in getters.items():
        values = [get(run.record) for run in runs]
        if any(value is not None for value in values):
            texts = ["" if value is None else value for value in values]
            rows.append(SettingRow(name, texts, differs=len(set(texts)) > 1))
    return rows


def _of(*path: str) -> Any:
    def get(record: Any) -> str | None:
        for key in path:
            record = record.get(key) if isinstance(record, Mapping) else None
        if record is None:
            return None
        return record if isinstance(record, str) else json.dumps(record, ensure_ascii=False)

    return get


def _data(name: str) -> Any:
    get = _of("data", name)
    return lambda record: (get(record) or "").replace("`", "") or None


def _started(record: Mapping[str, Any]) -> str | None:
    started = record.get("started")
    return str(started).replace("T", " ").replace("+00:00", " UTC") if started else None


def _names(parts: Any) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part))
