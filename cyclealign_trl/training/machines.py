"""Runs on several machines: one output directory for all of them, or one for each."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from accelerate.utils import gather_object
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

_WAIT = 2.0  # seconds until a file is visible on the other machines, as network file systems cache directories


def check_output_dir(args: TrainingArguments) -> None:
    """Check that `save_on_each_node` fits the output directory. With several machines, every process must call this.

    Process 0 writes a file, and the first process of each machine looks for it.

    Raises:
        ValueError: On all processes, if the machines have separate directories and `save_on_each_node` is off, so that
            checkpoints could not be resumed; or if it is on and they share one, where all would write the same files.
    """
    if args.world_size == int(os.environ.get("LOCAL_WORLD_SIZE", 0)):  # launchers set it
        return
    first_of_machine = args.local_process_index == 0
    firsts = [index for index, first in enumerate(gather_object([first_of_machine])) if first]
    if len(firsts) < 2:
        return
    file = Path(args.output_dir, f".shared-{uuid4().hex}")
    file = file.with_name(gather_object([file.name])[0])
    if args.process_index == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    gather_object([None])  # a barrier
    found = gather_object([_appears(file) if first_of_machine else None])
    if args.process_index == 0:
        file.unlink()
    others = firsts[1:]
    if args.save_on_each_node and (sharing := [index for index in others if found[index]]):
        raise ValueError(
            f"{args.output_dir} is one directory for several machines (those of processes {_listed([0, *sharing])}), "
            "and with save_on_each_node=True each of them would write the same files. Leave save_on_each_node out."
        )
    separate = [index for index in others if not found[index]]
    if separate and not args.save_on_each_node and args.save_strategy != SaveStrategy.NO:
        raise ValueError(
            f"{args.output_dir} is not one directory for all {len(firsts)} machines: the machines of processes "
            f"{_listed(separate)} do not see what process 0 writes, so no checkpoint could be resumed. Pass "
            "save_on_each_node=True, or a directory on a file system that all machines share."
        )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _WAIT
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))
