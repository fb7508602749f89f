"""Write a report as tables and as JSON."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "vllm", "unsloth", "deepspeed", "cyclealign-trl")
COLUMNS: dict[str, dict[str, str]] = {
    "loss": {
        "loss": "loss",
        "seconds": "s",
        "ours_to_it_seconds": "ours / it, time",
        "peak_mib": "peak MiB",
        "ours_to_it_memory": "ours / it, memory",
        "share_of_limit": "share of the limit",
        "note": "note",
    },
    "step": {
        "trainer": "trainer",
        "n": "K",
        "seconds": "s/step",
        "generate": "generate",
        "train": "train",
        "seconds_per_completion": "s/completion",
        "ours_to_it_seconds": "ours / it, time",
        "peak_mib": "peak MiB",
        "ours_to_it_memory": "ours / it, memory",
        "share_of_limit": "share of the limit",
        "note": "note",
    },
    "memory": {
        "n": "K",
        "ours_mib": "ours, MiB",
        "ours_growth": "growth",
        "shared_tokens_growth": "growth of P + K C",
        "padded_mib": "padded rows, MiB",
        "padded_growth": "growth",
        "padded_tokens_growth": "growth of K (P + C)",
        "note": "note",
    },
}
"""Columns of each part: keys of the rows and their headers."""


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each package, or `None` if it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def header(report: Mapping[str, Any]) -> str:
    """Return what was measured with: the machine, its matrix products, and versions."""
    installed = ", ".join(f"{name} {found or 'not installed'}" for name, found in report["versions"].items())
    return (
        f"# Speed, plan {report['plan']}, {report['machine']}\n\n"
        f"Matrix products attain {report['flops_per_second'] / 1e9:.4g} GFLOP/s. {report['clock']}\n\n{installed}\n"
    )


def tables(part: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of a part as Markdown: one table for each work, except that "memory" is one table."""
    if part == "memory":
        works = {f"memory by K, {rows[0]['work']}, and more completions": rows} if rows else {}
    else:
        works = {f"{part}: {work}": [row for row in rows if row["work"] == work]
                 for work in dict.fromkeys(row["work"] for row in rows)}  # fmt: skip
    return "\n".join(f"## {title}\n\n{_table(group, COLUMNS[part])}\n" for title, group in works.items())


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    shown = {key: title for key, title in columns.items() if key != "note" or any(row.get("note") for row in rows)}
    lines = [list(shown.values()), ["---"] * len(shown), *([_cell(row.get(key)) for key in shown] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
