"""`cyclealign estimate`: what `cyclealign train` with the same arguments will ask of its ranker, before it asks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..rankers.base import Ranker
from ..rankers.context import BYTES_PER_TOKEN
from ..trainer.cyclealign_config import CycleAlignConfig
from ..trainer.cyclealign_trainer import CycleAlignTrainer
from ..trainer.estimate import RunEstimate, Sample, estimate_run, sample_completions
from ..types import Usage
from .arguments import CommandParser, RankerArguments
from .inputs import add_model_arguments, load_splits, make_ranker
from .launch import WRONG_USE, errors_in_one_line, num_processes


@dataclass
class EstimateArguments:
    """How the estimate is made."""

    num_samples: int = field(
        default=16,
        metadata={
            "help": "Prompts that the policy completes, to see how long its completions are. 0 loads no model, and "
            "takes every completion to be max_completion_length tokens long."
        },
    )


def make_parser() -> CommandParser:
    """The command's arguments."""
    return CommandParser(
        (EstimateArguments, ScriptArguments, RankerArguments, CycleAlignConfig, ModelConfig, DatasetMixtureConfig),
        prog="cyclealign estimate",
        description="Says what `cyclealign train` with the same arguments will ask of its ranker, before it asks.",
    )


def main(argv: Sequence[str]) -> None:
    """Prints the estimate."""
    parser = make_parser()
    with errors_in_one_line(parser.prog, *WRONG_USE), TemporaryDirectory() as folder:
        own, accelerate_own = parser.split(argv)
        estimate_args, script_args, ranker_args, training_args, model_args, mixture_args = parser.parse(own)
        # A trainer would leave files in the folder of a run that has not begun.
        training_args.output_dir, training_args.cache_rankings, training_args.push_to_hub = folder, False, False
        ranker = make_ranker(ranker_args, connect=False)
        train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
        if estimate_args.num_samples > 0:
            add_model_arguments(training_args, model_args)
            trainer = CycleAlignTrainer(
                model_args.model_name_or_path, ranker, training_args, train_dataset=train_dataset
            )
            samples = sample_completions(trainer, estimate_args.num_samples)
        else:
            samples = _assumed(training_args, train_dataset["prompt"])
        estimate = estimate_run(
            training_args,
            ranker,
            samples,
            len(train_dataset),
            0 if eval_dataset is None else min(len(eval_dataset), training_args.max_eval_samples or len(eval_dataset)),
            num_processes=num_processes(accelerate_own),
        )
    print(describe(estimate, ranker))


def describe(estimate: RunEstimate, ranker: Ranker) -> str:
    """The estimate as a table, and what it assumes."""
    evaluations = f", {estimate.num_evaluations} evaluations" if estimate.num_evaluations else ""
    columns = {"low": estimate.low, "expected": estimate.expected, "high": estimate.high}
    rows = {
        "calls": {name: f"{usage.attempts:,}" for name, usage in columns.items()},
        "prompt tokens": {name: f"{usage.prompt_tokens:,}" for name, usage in columns.items()},
        "completion tokens": {name: f"{usage.completion_tokens:,}" for name, usage in columns.items()},
        "cost": {name: _cost(usage) for name, usage in columns.items()},
    }
    if not hasattr(ranker, "estimate"):  # it says nothing of what its calls take
        rows = {"calls": rows["calls"]}
    lines = [
        f"{estimate.num_steps:,} optimiser steps{evaluations}; calls of the ranker, retries not among them",
        "",
        " " * 17 + "".join(f"{name:>16}" for name in columns),
        *(f"{row:17}" + "".join(f"{value:>16}" for value in values.values()) for row, values in rows.items()),
        "",
        "low       policy and ranker never agree: no dynamic demonstration is shown",
        "expected  they agree by chance; completions stay as long as the policy's are now",
        "high      they always agree; every completion is max_completion_length tokens long",
        f"A token is taken to be {BYTES_PER_TOKEN} bytes of text.",
    ]
    return "\n".join(lines)
