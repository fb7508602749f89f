"""The checkpoint that all processes of a run resume from, on one machine or on several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from ..errors import CheckpointError
from . import checkpoints


def choose_checkpoint(requested: Path | bool | None, output_dir: Path, process_index: int) -> Path | None:
    """Return the checkpoint to resume from, or `None` for a new run. Every process must call this.

    Args:
        requested: `True` for the newest checkpoint that is complete on all machines, or a path.
        output_dir: Output directory of the run on this machine.
        process_index: Index of this process.

    Raises:
        CheckpointError: On all processes, if there is no such checkpoint, or if they were asked for different ones.
    """
    # Each machine can have its own directory for the same checkpoint.
    names = gather_object([requested.name if isinstance(requested, Path) else requested])
    if any(name != names[0] for name in names):
        other = next(index for index, name in enumerate(names) if name != names[0])
        raise CheckpointError(
            f"The processes do not resume from the same checkpoint: process 0 was started with {names[0]}, process "
            f"{other} with {names[other]}. Pass the same resume_from_checkpoint on all machines."
        )
    if requested is not True:
        return requested or None
    return newest_checkpoint(output_dir, process_index)


def newest_checkpoint(output_dir: Path, process_index: int) -> Path:
    """Return the newest checkpoint that is complete on all machines. Every process must call this.

    Raises:
        CheckpointError: On all processes, if there is none.
    """
    complete = checkpoints.complete_checkpoints(output_dir)
    own = {step for step, folder in complete.items() if checkpoints.has_state(folder, process_index)}
    gathered: list[tuple[set[int], set[int]]] = gather_object([(set(complete), own)])
    found, usable = (set.union(*sets) for sets in zip(*gathered, strict=True))
    common = set.intersection(*(steps for _, steps in gathered))
    if found and not common:
        newest = max(usable or found)
        lacking = ", ".join(str(index) for index, (_, steps) in enumerate(gathered) if newest not in steps)
        raise CheckpointError(
            f"No checkpoint in {output_dir} is complete on all machines: the newest one, of step {newest}, is not "
            f"complete for processes {lacking}. Machines with separate directories need save_on_each_node=True from "
            "the start of a run, and each the rank that it had."
        )
    return checkpoints.newest_of(output_dir, sorted(common))


def load_state(
    checkpoint: Path, process_index: int, num_processes: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Read the state of this process; see `checkpoints.load`. Every process must call this.

    Raises:
        CheckpointError: On all processes, if one of them cannot read its state.
    """
    state: dict[str, Any] = {}
    own_error: CheckpointError | None = None
    try:
        state = checkpoints.load(checkpoint, process_index, num_processes, settings)
    except CheckpointError as error:  # raised below: the other processes would wait for this one
        own_error = error
    messages = gather_object([None if own_error is None else str(own_error)])
    if own_error is not None:
        raise own_error
    for index, message in enumerate(messages):
        if message is not None:
            raise CheckpointError(f"Process {index} cannot resume. {message}")
    return state
