"""The part of a checkpoint that the package adds: one JSON file per process, and a marker of completeness."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._compat import PREFIX_CHECKPOINT_DIR
from .._files import atomic_write
from ..errors import CheckpointError

logger = logging.getLogger(__name__)

VERSION = 2
COMPLETE = "cyclealign.complete"
EARLIER = "cyclealign.earlier"  # the marker of a checkpoint that an earlier run in the same folder completed
TRAINER_STATE = "trainer_state.json"  # the last file that the Trainer writes


def save(checkpoint: Path, process_index: int, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state of one process into a checkpoint folder.

    Args:
        checkpoint: The folder.
        process_index: Index of the process.
        settings: Settings that a resumed run must share, by name.
        state: State to restore on resume.
    """
    text = json.dumps({"version": VERSION, "settings": dict(settings), "state": dict(state)})
    with atomic_write(_path(checkpoint, process_index)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def mark_incomplete(checkpoint: Path) -> None:
    """Remove the markers from a folder that is about to be overwritten.

    Call it on one process, before a barrier.
    """
    for mark in (COMPLETE, EARLIER, TRAINER_STATE):
        (checkpoint / mark).unlink(missing_ok=True)


def mark_complete(checkpoint: Path, num_processes: int) -> None:
    """Mark a checkpoint that all processes have written. Call it on one process, after a barrier."""
    (checkpoint / COMPLETE).write_text(f"{num_processes}\n", encoding="utf-8")


def set_aside(output_dir: Path) -> None:
    """Exclude the checkpoints of an earlier run in the same folder from automatic resumption."""
    for mark in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}"):
        mark.rename(mark.with_name(EARLIER))
        logger.warning("%s belongs to an earlier run. It is resumed only if it is passed by name.", mark.parent)


def set_folder_aside(folder: Path) -> None:
    """Rename a folder that an earlier run left to `FOLDER-K`, so that two runs do not mix."""
    if not folder.exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    folder.rename(target)


def is_complete(checkpoint: Path, mark: str = COMPLETE) -> bool:
    """Return whether a checkpoint was written completely, including the last file of the Trainer."""
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        return bool((checkpoint / mark).read_text(encoding="utf-8").strip())
    except (FileNotFoundError, ValueError):  # missing or truncated
        return False


def load(checkpoint: Path, process_index: int, num_processes: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read the state of one process.

    Raises:
        CheckpointError: If the checkpoint is incomplete, or was written by another number of processes, by another
            version, or with other settings.
    """
    mark = COMPLETE if is_complete(checkpoint) else EARLIER
    if not is_complete(checkpoint, mark):
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint: a trainer of another package wrote it, the run was killed "
            "while it was written, or save_only_model left out the optimiser. Resume from another checkpoint."
        )
    num_saved = int((checkpoint / mark).read_text(encoding="utf-8"))
    if num_saved != num_processes:
        raise CheckpointError(
            f"{checkpoint} was saved by {num_saved} processes, and this run has {num_processes}. Resume with "
            f"{num_saved}."
        )
    path = _path(checkpoint, process_index)
    if not path.exists():
        raise CheckpointError(
            f"{path}, the state of process {process_index}, is missing. If each machine has its own output "
            "directory, start each with the rank that it had."
        )
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if saved["version"] != VERSION:
        raise CheckpointError(f"{path} has version {saved['version']}; this package reads version {VERSION}.")
    changed = [
        f"{name} was {saved['settings'].get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if saved["settings"].get(name) != value
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed with changed settings that decide which rows come in which step: "
            f"{'; '.join(changed)}. Restore them, or start a new run."
        )
    state: dict[str, Any] = saved["state"]
    return state


def has_state(checkpoint: Path, process_index: int) -> bool:
    """Return whether a checkpoint has the state of a process."""
    return _path(checkpoint, process_index).exists()


def complete_checkpoints(output_dir: Path) -> dict[int, Path]:
    """Return the complete checkpoints of an output directory by step."""
    return {step: folder for step, folder in _by_step(output_dir).items() if is_complete(folder)}


def newest_of(output_dir: Path, complete_steps: Sequence[int]) -> Path:
    """Return the newest of the checkpoints that are complete, and warn of newer ones.

    Raises:
        CheckpointError: If no checkpoint is complete.
    """
    if not complete_steps:
        raise CheckpointError(f"No complete checkpoint found in {output_dir}: there is nothing to resume from.")
    folders = _by_step(output_dir)
    newest = max(complete_steps)
    for step in sorted(folders):
        if step > newest:
            logger.warning("%s is incomplete: resuming from %s instead.", folders[step], folders[newest].name)
    return folders[newest]


def _by_step(output_dir: Path) -> dict[int, Path]:
    return {
        int(match.group(1)): folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
    }


def _path(checkpoint: Path, process_index: int) -> Path:
    return checkpoint / f"cyclealign-{process_index}.json"
