"""What our trainers add to a checkpoint: plain JSON, one file per process, and a mark that the checkpoint is whole."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._compat import PREFIX_CHECKPOINT_DIR
from .._files import atomic_write
from ..errors import CheckpointError

logger = logging.getLogger(__name__)

VERSION = 2
COMPLETE = "cyclealign.complete"
EARLIER = "cyclealign.earlier"  # the same mark, of a run before the present one in the same folder
TRAINER_STATE = "trainer_state.json"  # the last file that the Trainer writes


def save(checkpoint: Path, process_index: int, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes one process's state into a checkpoint folder.

    Args:
        checkpoint: The folder.
        process_index: The process.
        settings: Arguments that a resumed run must share, by name.
        state: What the trainer needs back.
    """
    text = json.dumps({"version": VERSION, "settings": dict(settings), "state": dict(state)})
    with atomic_write(_path(checkpoint, process_index)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def mark_incomplete(checkpoint: Path) -> None:
    """Takes the marks of an earlier run off a folder that is about to be overwritten.

    Call it on one process, before a barrier.
    """
    for mark in (COMPLETE, EARLIER, TRAINER_STATE):
        (checkpoint / mark).unlink(missing_ok=True)


def mark_complete(checkpoint: Path, num_processes: int) -> None:
    """Says that all processes have written all that is theirs. Call it on one of them, after a barrier."""
    (checkpoint / COMPLETE).write_text(f"{num_processes}\n", encoding="utf-8")


def set_aside(output_dir: Path) -> None:
    """Has a run that starts afresh in a used folder never go on from another run's checkpoints unless told to."""
    for mark in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}"):
        mark.rename(mark.with_name(EARLIER))
        logger.warning("%s belongs to an earlier run: it is resumed from only where it is named.", mark.parent)


def set_folder_aside(folder: Path) -> None:
    """Moves what an earlier run in the same directory left to `FOLDER-K`, so that no two runs mix."""
    if not folder.exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    folder.rename(target)


def is_complete(checkpoint: Path, mark: str = COMPLETE) -> bool:
    """Whether a checkpoint was written to its end, the Trainer's own last file included."""
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        return bool((checkpoint / mark).read_text(encoding="utf-8").strip())
    except (FileNotFoundError, ValueError):  # not there, or cut off in the middle
        return False


def load(checkpoint: Path, process_index: int, num_processes: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads one process's state.

    Raises:
        CheckpointError: If the checkpoint is incomplete, was written by another number of processes or another
            version, or its run had other settings.
    """
    mark = COMPLETE if is_complete(checkpoint) else EARLIER
    if not is_complete(checkpoint, mark):
        raise CheckpointError(
            f"{checkpoint} cannot be resumed from: one of our trainers did not write it, the run was killed before it "
            "was whole, or save_only_model left out what resuming takes. Resume from another checkpoint."
        )
    num_saved = int((checkpoint / mark).read_text(encoding="utf-8"))
    if num_saved != num_processes:
        raise CheckpointError(
            f"{checkpoint} was saved by {num_saved} processes, and this run has {num_processes}. Resume with as many "
            "as it was saved with."
        )
    path = _path(checkpoint, process_index)
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
            f"{checkpoint} cannot be resumed with these settings, which say what comes in which step: "
            f"{'; '.join(changed)}. Set them back, or start afresh."
        )
    state: dict[str, Any] = saved["state"]
    return state


def last_complete_checkpoint(output_dir: Path) -> Path:
    """The newest checkpoint that was written to the end; says which newer ones were not.

    Raises:
        CheckpointError: If there is none.
    """
    steps = {
        int(match.group(1)): folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
    }
    whole = [step for step, folder in steps.items() if is_complete(folder)]
    if not whole:
        raise CheckpointError(f"No complete checkpoint found in {output_dir}: there is nothing to resume from.")
    newest = steps[max(whole)]
    for step in sorted(steps):
        if step > max(whole):
            logger.warning("%s was not written to its end: resuming from %s instead.", steps[step], newest.name)
    return newest


def _path(checkpoint: Path, process_index: int) -> Path:
    return checkpoint / f"cyclealign-{process_index}.json"
