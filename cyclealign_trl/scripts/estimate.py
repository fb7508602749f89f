"""`cyclealign estimate`: what `cyclealign train` with the same arguments will ask of its ranker, before it asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

from ..chat.messages import BYTES_PER_TOKEN
from ..cycle.cyclealign_config import CycleAlignConfig
from ..cycle.cyclealign_trainer import CycleAlignTrainer
from ..cycle.interaction_log import Expense
from ..cycle.run_estimate import RunEstimate, assume_completions, estimate_run, sample_completions
from .arguments import CommandParser
from .inputs import add_model_arguments, load_splits, make_ranker
from .launch import WRONG_USE, errors_in_one_line, num_processes
from .train import SECTIONS


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
        (EstimateArguments, *SECTIONS),
        prog="cyclealign estimate",
        description="Says what `cyclealign train` with the same arguments will ask of its ranker, before it asks.",
    )


def main(argv: Sequence[str]) -> None:
    """Prints the estimate."""
    parser = make_parser()
    with errors_in_one_line(parser.prog, *WRONG_USE), TemporaryDirectory() as folder:
        own, accelerate_own = parser.split(argv)
        estimate_args, script_args, ranker_args, _, training_args, model_args, mixture_args = parser.parse(own)
        # A trainer would leave files in the folder of a run that has not begun.
        training_args.output_dir, training_args.cache_rankings, training_args.push_to_hub = folder, False, False
        training_args.sft_target = CycleAlignConfig.sft_target  # a corrector asks nothing of the ranker
        ranker = make_ranker(ranker_args, connect=False)
        train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
        if estimate_args.num_samples > 0:
            add_model_arguments(training_args, model_args)
            trainer = CycleAlignTrainer(
                model_args.model_name_or_path,
                ranker,
                training_args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
            )
            samples = sample_completions(trainer, estimate_args.num_samples)
        else:
            samples = assume_completions(training_args, train_dataset)
        estimate = estimate_run(
            training_args,
            ranker,
            samples,
            len(train_dataset),
            0 if eval_dataset is None else min(len(eval_dataset), training_args.max_eval_samples or len(eval_dataset)),
            num_processes=num_processes(accelerate_own),
        )
    print(describe(estimate, sampled=estimate_args.num_samples > 0))


def describe(estimate: RunEstimate, *, sampled: bool) -> str:
    """The estimate as a table, and what it assumes; `sampled` says whether the policy's completions were measured."""
    length = "as long as the policy's are now" if sampled else "max_completion_length tokens long"
    columns = (estimate.low, estimate.expected, estimate.high)
    rows = {"calls": [f"{usage.attempts:,}" for usage in columns]}
    if estimate.high.prompt_tokens:  # or the ranker says nothing of what a call takes
        rows["prompt tokens"] = [f"{usage.prompt_tokens:,}" for usage in columns]
        rows["completion tokens"] = [f"{usage.completion_tokens:,}" for usage in columns]
        rows["cost"] = [
            Expense(answers=1, cost=usage.cost or 0.0, priced=usage.cost is not None).cost_text for usage in columns
        ]
    table = [f"{name:17}" + "".join(f"{value:>14}" for value in values) for name, values in rows.items()]
    return "\n".join(
        [
            f"Optimiser steps: {estimate.num_steps:,}. Evaluations: {estimate.num_evaluations:,}. No retries.",
            "",
            f"{'':17}{'low':>14}{'expected':>14}{'high':>14}",
            *table,
            "",
            "low        policy and ranker never agree, so no dynamic demonstration is shown",
            f"expected   they agree as often as chance has it; completions are {length}",
            "high       they always agree; every completion is max_completion_length tokens long",
            "",
            f"A token is taken to be {BYTES_PER_TOKEN} bytes of text.",
        ]
    )
