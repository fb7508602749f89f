"""How a training command runs: its arguments checked first, then one process per device; errors of one line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError

import torch
import yaml
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import CycleAlignError
from ..training.base_trainer import ResumableTrainer
from .arguments import CommandParser

# What wrong arguments raise before the first step. After it, an error not ours is a defect, and a traceback helps.
WRONG_USE = (ValueError, RuntimeError, OSError, ImportError, yaml.YAMLError, CycleAlignError)
_PROCESSES = "CYCLEALIGN_NUM_PROCESSES"  # how many were asked for, for the processes that come of it


@contextmanager
def errors_in_one_line(prog: str, *kinds: type[Exception]) -> Iterator[None]:
    """Ends the program with status 1 and the error's text in one line, instead of a traceback."""
    try:
        yield
    except kinds as error:
        sys.exit(f"{prog}: error: {' '.join(str(error).split())}")


def start(
    module: str, parser: CommandParser, make_trainer: Callable[..., ResumableTrainer], argv: Sequence[str]
) -> None:
    """Trains in this process, or through `accelerate launch` where its arguments, its configuration or devices ask so.

    Args:
        module: The command's module, which every launched process runs.
        parser: The command's parser.
        make_trainer: Takes what the parser returns.
        argv: The command's arguments, those of accelerate among them.
    """
    with errors_in_one_line(parser.prog, *WRONG_USE):
        own, accelerate_own = parser.split(argv)
    if not accelerate_own and not Path(default_config_file).is_file() and torch.accelerator.device_count() < 2:
        work(parser, make_trainer, own)
        return
    # It would list the defaults that it takes, as a warning.
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    arguments = launch_command_parser().parse_args([*accelerate_own, "--module", module, *own])
    if arguments.num_processes is not None:
        os.environ[_PROCESSES] = str(arguments.num_processes)
    try:
        launch_command(arguments)
    except (CalledProcessError, ChildFailedError):  # the processes have said why
        sys.exit(1)


def num_processes(accelerate_own: Sequence[str]) -> int:
    """The processes that a command starts with these arguments of `accelerate launch`."""
    arguments = launch_command_parser().parse_args([*accelerate_own, "script"])
    if arguments.num_processes is not None:
        return int(arguments.num_processes)
    if arguments.config_file is not None or Path(default_config_file).is_file():
        return int(load_config_from_file(arguments.config_file).num_processes)
    return max(1, torch.accelerator.device_count())


def work(parser: CommandParser, make_trainer: Callable[..., ResumableTrainer], argv: Sequence[str]) -> None:
    """What each process does: train, save, publish where asked to."""
    with errors_in_one_line(parser.prog, *WRONG_USE):
        parser.split(argv)
        script_args, *others = parser.parse(argv)
        trainer = make_trainer(script_args, *others)
        asked, there = int(os.environ.get(_PROCESSES, 0)), trainer.args.world_size
        if asked > there:
            raise ValueError(
                f"{asked} processes were asked for, and accelerate started {there}: on a CPU it takes --use_deepspeed "
                "or a configuration with several processes (--config_file)."
            )
    if script_args.ignore_bias_buffers:  # DDP cannot broadcast them
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    try:
        with errors_in_one_line(parser.prog, CycleAlignError):
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted. --resume_from_checkpoint true goes on from the last checkpoint.")
        sys.exit(130)
    trainer.save_model()
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset=script_args.dataset_name)
    trainer.end()
