"""Run a training command: in this process, or in one process per device through `accelerate launch`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CalledProcessError

import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import CycleAlignError
from ..training.base_trainer import BaseTrainer
from .arguments import CommandParser
from .one_line_errors import one_line_errors

# Environment variable with the requested number of processes, for the launched processes to check.
_NUM_PROCESSES = "CYCLEALIGN_NUM_PROCESSES"


def run_training(
    module: str, parser: CommandParser, make_trainer: Callable[..., BaseTrainer], argv: Sequence[str]
) -> None:
    """Check the arguments, then train in this process or through `accelerate launch`.

    `accelerate launch` is used if one of its arguments is given, a default configuration of accelerate exists, or
    there are several devices.

    Args:
        module: Name of the command's module, which each launched process runs.
        parser: Parser of the command.
        make_trainer: Function from the parsed dataclasses to the trainer.
        argv: Arguments of the command and of `accelerate launch`.
    """
    with one_line_errors(parser.prog):
        own_argv, accelerate_argv = parser.split(argv)
    if not accelerate_argv and not Path(default_config_file).is_file() and torch.accelerator.device_count() < 2:
        train_in_process(parser, make_trainer, own_argv)
        return
    # accelerate would warn about each default that it uses.
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    launch_args = launch_command_parser().parse_args([*accelerate_argv, "--module", module, *own_argv])
    if launch_args.num_processes is not None:
        os.environ[_NUM_PROCESSES] = str(launch_args.num_processes)
    try:
        launch_command(launch_args)
    except (CalledProcessError, ChildFailedError):  # the processes have printed their errors
        sys.exit(1)


def train_in_process(parser: CommandParser, make_trainer: Callable[..., BaseTrainer], argv: Sequence[str]) -> None:
    """Train in this process, which may be one of several, save the model, and publish it if asked to."""
    with one_line_errors(parser.prog):
        parser.split(argv)
        script_args, *others = parser.parse(argv)
        trainer = make_trainer(script_args, *others)
        requested, started = int(os.environ.get(_NUM_PROCESSES, 0)), trainer.args.world_size
        if requested > started:
            raise ValueError(
                f"{requested} processes were requested, but accelerate started {started}. On a CPU, add "
                "--use_deepspeed or --config_file with a configuration for several processes."
            )
    if script_args.ignore_bias_buffers:  # DDP cannot broadcast boolean buffers
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    try:
        with one_line_errors(parser.prog, (CycleAlignError,)):
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted. Add --resume_from_checkpoint true to continue from the last checkpoint.")
        sys.exit(130)
    trainer.save_model()
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset=script_args.dataset_name)
    trainer.end()


def num_processes(accelerate_argv: Sequence[str]) -> int:
    """Return the number of processes that a command starts with these arguments of `accelerate launch`."""
    launch_args = launch_command_parser().parse_args([*accelerate_argv, "script"])
    if launch_args.num_processes is not None:
        return int(launch_args.num_processes)
    if launch_args.config_file is not None or Path(default_config_file).is_file():
        return int(load_config_from_file(launch_args.config_file).num_processes)
    return max(1, torch.accelerator.device_count())
