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


def mark_complete(checkpoint: Path) -> None:
    """Says that every process has written its state. Call it on one process, after a barrier."""
    (checkpoint / COMPLETE).touch()


def load(checkpoint: Path, process_index: int) -> dict[str, Any]:
    """Reads one process's state.

    Raises:
        ValueError: If the checkpoint is incomplete, or was written by a run with other processes or another version.
    """
    path = _path(checkpoint, process_index)
    if not (checkpoint / COMPLETE).exists():
        raise ValueError(
            f"{checkpoint} holds no complete CycleAlign state: CycleAlignTrainer did not write it, or the run was "
            "killed before it was whole. Resume from another checkpoint."
        )
    if not path.exists():
        num_saved = len(list(checkpoint.glob(_path(checkpoint, 0).name.replace("0", "*"))))
        raise ValueError(
            f"{checkpoint} was saved by {num_saved} processes and has no state for process {process_index}. Resume "
            "with as many processes as it was saved with."
        )
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
