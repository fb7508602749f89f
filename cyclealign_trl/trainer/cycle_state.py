"""What the cycle adds to a checkpoint: plain JSON, one file per process, and a mark that all of them are there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .._compat import PREFIX_CHECKPOINT_DIR

VERSION = 1
COMPLETE = "cyclealign.complete"
TRAINER_STATE = "trainer_state.json"  # the last file that the Trainer writes


def save(checkpoint: Path, process_index: int, state: dict[str, Any]) -> None:
    """Writes one process's state into a checkpoint folder."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    path = _path(checkpoint, process_index)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"version": VERSION, **state}), encoding="utf-8")
    unfinished.replace(path)


def mark_incomplete(checkpoint: Path) -> None:
    """Takes the marks of an earlier run off a folder that is about to be overwritten.

    Call it on one process, before a barrier.
    """
    for mark in (COMPLETE, TRAINER_STATE):
        (checkpoint / mark).unlink(missing_ok=True)


def mark_complete(checkpoint: Path, num_processes: int) -> None:
    """Says that all processes have written their state. Call it on one of them, after a barrier."""
    (checkpoint / COMPLETE).write_text(f"{num_processes}\n", encoding="utf-8")


def load(checkpoint: Path, process_index: int, num_processes: int) -> dict[str, Any]:
    """Reads one process's state.

    Raises:
        ValueError: If the checkpoint is incomplete, or was written by another number of processes or another version.
    """
    if not (checkpoint / COMPLETE).exists():
        raise ValueError(
            f"{checkpoint} holds no complete CycleAlign state: CycleAlignTrainer did not write it, or the run was "
            "killed before it was whole. Resume from another checkpoint."
        )
    num_saved = int((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    if num_saved != num_processes:
        raise ValueError(
            f"{checkpoint} was saved by {num_saved} processes, and this run has {num_processes}. Resume with as many "
            "as it was saved with."
        )
    path = _path(checkpoint, process_index)
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if state["version"] != VERSION:
        raise ValueError(f"{path} has version {state['version']}; this package reads version {VERSION}.")
    return state


def last_complete_checkpoint(output_dir: Path) -> Path:
    """The newest checkpoint that was written to the end.

    Raises:
        ValueError: If there is none.
    """
    steps = {
        int(match.group(1)): folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
        and (folder / COMPLETE).exists()
        and (folder / TRAINER_STATE).exists()
    }
    if not steps:
        raise ValueError(f"No complete checkpoint found in {output_dir}: there is nothing to resume from.")
    return steps[max(steps)]


def _path(checkpoint: Path, process_index: int) -> Path:
    return checkpoint / f"cyclealign-{process_index}.json"
