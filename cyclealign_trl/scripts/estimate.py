"""`cyclealign estimate`: estimate the ranker calls, tokens and cost of a `cyclealign train` run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

from ..chat.messages import BYTES_PER_TOKEN
from ..cycle.cyclealign_config import CycleAlignConfig
from ..cycle.cyclealign_trainer import CycleAlignTrainer
from ..cycle.interaction_log import Expense
from ..cycle.run_estimate import RunEstimate, assume_completions, estimate_run, sample_completions
from ..data.hh_rlhf import is_published, read_published
from .arguments import CommandParser
from .inputs import add_model_init_kwargs, load_splits, make_ranker
from .launch import num_processes
from .one_line_errors import one_line_errors
from .train import DATACLASSES


@dataclass
class EstimateArguments:
    """Settings of the estimate."""

    num_samples: int = field(
        default=16,
        metadata={
            "help": "Number of prompts to complete with the policy, to measure the length of its completions. 0 loads "
            "no model and assumes max_completion_length tokens for each completion."
        },
    )


def make_parser() -> CommandParser:
    """Create the parser of the command."""
    return CommandParser(
        (EstimateArguments, *DATACLASSES),
        prog="cyclealign estimate",
        description="Estimate the ranker calls, tokens and cost of `cyclealign train` with the same arguments, "
        "without calling the ranker.",
    )


def main(argv: Sequence[str]) -> None:
    """Print the estimate."""
    parser = make_parser()
    with one_line_errors(parser.prog), TemporaryDirectory() as folder:
        own_argv, accelerate_argv = parser.split(argv)
        estimate_args, script_args, ranker_args, _, training_args, model_args, mixture_args = parser.parse(own_argv)
        # The trainer must not leave files in the output directory of the run.
        training_args.output_dir, training_args.cache_rankings, training_args.push_to_hub = folder, False, False
        training_args.sft_target = CycleAlignConfig.sft_target  # a corrector does not call the ranker
        ranker = make_ranker(ranker_args, connect=False)
        train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
        if estimate_args.num_samples > 0:
            add_model_init_kwargs(training_args, model_args)
            trainer = CycleAlignTrainer(
                model_args.model_name_or_path,
                ranker,
                training_args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
            )
            samples = sample_completions(trainer, estimate_args.num_samples)
            train_dataset, eval_dataset = trainer.train_dataset, trainer.eval_dataset
        else:
            train_dataset, eval_dataset = (
                read_published(dataset, "prompt-only", conversational=True) if is_published(dataset) else dataset
                for dataset in (train_dataset, eval_dataset)
            )
            samples = assume_completions(training_args, train_dataset)
        estimate = estimate_run(
            training_args,
            ranker,
            samples,
            len(train_dataset),
            0 if eval_dataset is None else min(len(eval_dataset), training_args.max_eval_samples or len(eval_dataset)),
            num_processes=num_processes(accelerate_argv),
        )
    print(describe(estimate, sampled=estimate_args.num_samples > 0))


def describe(estimate: RunEstimate, *, sampled: bool) -> str:
    """Return the estimate as a table with its assumptions.

    Args:
        estimate: The estimate.
        sampled: Whether the length of the policy's completions was measured.
    """
    length = "as long as the policy's are now" if sampled else "max_completion_length tokens long"
    columns = (estimate.low, estimate.expected, estimate.high)
    rows = {"calls": [f"{usage.attempts:,}" for usage in columns]}
    if estimate.high.prompt_tokens:  # 0 if the ranker reports no tokens
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
            "low        policy and ranker never agree, so requests show no dynamic demonstrations",
            f"expected   policy and ranker agree as often as chance predicts; completions are {length}",
            "high       policy and ranker always agree; completions are max_completion_length tokens long",
            "",
            f"Tokens are estimated at {BYTES_PER_TOKEN} bytes of text each.",
        ]
    )
