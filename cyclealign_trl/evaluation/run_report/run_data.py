"""Reading what a run left on disk. No file is unpickled, and every text in them is untrusted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..._compat import PREFIX_CHECKPOINT_DIR
from ...cycle.interaction_log import InteractionLog
from ...training.checkpoints import EARLIER, TRAINER_STATE
from ...training.run_file import read_run_file
from ...types import Demonstration
from .shown_demonstrations import UNKNOWN_POOL, Shown, inexact, shown_demonstrations

HELD_OUT = "held_out.json"
"""Replies before and after training: a list of objects with `prompt`, `before` and `after` (lists of texts)."""
TABLES = "report.md"
"""Tables that `cyclealign judge` and the other evaluations write."""


@dataclass(frozen=True)
class RunData:
    """What a folder has about a run.

    Args:
        name: Name of the run in the report.
        record: Content of `run.json`, or nothing.
        history: `log_history` of the Trainer, by step.
        rows: Rows of the interaction log, by step.
        shown: Demonstrations in the request of each row, or nothing if they are not known.
        initial_demonstrations: Demonstrations that the run was started with.
        held_out: Replies before and after training.
        tables: Name and Markdown text of each evaluation.
        notes: What the reader should know about the data, as sentences.
    """

    name: str
    record: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    shown: Sequence[Shown] = ()
    initial_demonstrations: Sequence[Demonstration] = ()
    held_out: Sequence[Mapping[str, Any]] = ()
    tables: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()

    @property
    def trained(self) -> bool:
        """Whether the folder belongs to a training run, not only to an evaluation."""
        return bool(self.history or self.rows)


def read_run(folder: Path, name: str) -> RunData:
    """Read the output directory of a run, or of an evaluation.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If there is nothing to report in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Pass the output directory of a run.")
    record = read_run_file(folder) or {}
    log = InteractionLog(folder)
    rows = log.read().to_pylist() if log.paths else []
    notes: list[str] = []
    shown: list[Shown] = []
    initial: list[Demonstration] = []
    if rows and not record.get("demonstrations"):
        notes.append(UNKNOWN_POOL)
    elif rows:
        shown, initial = shown_demonstrations(rows, record)
        notes += inexact(rows, record)
    data = RunData(
        name,
        record,
        _read_history(folder),
        rows,
        shown,
        initial,
        _read_held_out(folder),
        _read_tables(folder),
        notes,
    )
    if not (data.trained or data.tables):
        raise ValueError(
            f"{folder} has nothing to report: no log of interactions, no trainer_state.json and no report.md. Pass "
            "the output directory of a run or of an evaluation."
        )
    return data


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as many parts as tell them apart."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _read_history(folder: Path) -> list[Mapping[str, Any]]:
    """Return the longest `log_history`, of the folder or of its checkpoints, without those of an earlier run."""
    states: list[dict[str, Any]] = []
    for path in [folder / TRAINER_STATE, *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE}")]:
        if not path.with_name(EARLIER).exists() and isinstance(state := _read_json(path), dict):
            states.append(state)
    if not states:
        return []
    history = max(states, key=lambda state: state.get("global_step") or 0).get("log_history")
    entries = [entry for entry in history or () if isinstance(entry, dict) and isinstance(entry.get("step"), int)]
    return sorted(entries, key=lambda entry: entry["step"])


def _read_held_out(folder: Path) -> list[Mapping[str, Any]]:
    content = _read_json(folder / HELD_OUT)
    return [entry for entry in content if {"prompt", "before", "after"} <= entry.keys()] if content else []


def _read_tables(folder: Path) -> list[tuple[str, str]]:
    paths = [path for pattern in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{pattern}{TABLES}"))]
    return [
        ("/".join(path.relative_to(folder).parts[:-1]), path.read_text(encoding="utf-8", errors="replace"))
        for path in paths
    ]


def _read_json(path: Path) -> Any:
    """Return the content of a file, or `None` if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
