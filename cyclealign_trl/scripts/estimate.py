"""`cyclealign estimate`: estimate the ranker calls, tokens and cost of a `cyclealign train` run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from tempfile import TemporaryDirectory

from ..chat.messages import BYTES_PER_TOKEN
from ..cycle.cyclealign_config import CycleAlignConfig
from ..cycle.cyclealign_trainer import CycleAlignTrainer
from ..cycle.interaction_totals import Expense
from ..cycle.run_estimate import (
    Probe,
    RunEstimate,
    assume_completions,
    estimate_run,
    probe_ranker,
    sample_completions,
)
from ..data.hh_rlhf import read_published
from ..types import RankingFailure
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
    probe: int = field(
        default=0,
        metadata={
            "help": "Number of real rankings to request, to measure the tokens of a reply, the latency and the "
            "failures. They are paid for. 0 makes no call."
        },
    )


def make_parser() -> CommandParser:
    """Create the parser of the command."""
    return CommandParser(
        (EstimateArguments, *DATACLASSES),
        prog="cyclealign estimate",
        description="Estimate the ranker calls, tokens and cost of `cyclealign train` with the same arguments, "
        "without calling the ranker (except with --probe).",
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
        ranker = make_ranker(ranker_args, connect=estimate_args.probe > 0)
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
                None if dataset is None else read_published(dataset, "prompt-only", conversational=True)
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
        probe = None
        if estimate_args.probe > 0:
            probe = probe_ranker(training_args, ranker, samples, estimate_args.probe)
    print(describe(estimate, sampled=estimate_args.num_samples > 0, probe=probe))


def describe(estimate: RunEstimate, *, sampled: bool, probe: Probe | None = None) -> str:
    """Return the estimate as a table with its assumptions.

    Args:
        estimate: The estimate.
        sampled: Whether the length of the policy's completions was measured.
        probe: Real rankings.
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
            f"Tokens are estimated at {BYTES_PER_TOKEN} bytes of text each. Tokens that a ranker spends on reasoning "
            "are not counted." + (" To measure them, add --probe 8." if probe is None else ""),
            *([] if probe is None else ["", *describe_probe(probe, estimate)]),
        ]
    )


def describe_probe(probe: Probe, estimate: RunEstimate) -> list[str]:
    """Return the lines of a report on real rankings."""
    if not probe.outcomes:
        return ["Probe: there was no ranking to request, because the sampled completions are equal."]
    usage, number = probe.usage, len(probe.outcomes)
    failures = [outcome for outcome in probe.outcomes if isinstance(outcome, RankingFailure)]
    calls = max(1, usage.attempts)
    reasoning = probe.reasoning_tokens or 0
    lines = [
        f"Probe: {number} rankings in {usage.attempts} calls, {len(failures)} failed. "
        f"Latency {median(probe.seconds):.1f} s (median), {max(probe.seconds):.1f} s (maximum).",
    ]
    if usage.completion_tokens:
        total = usage.completion_tokens * estimate.expected.attempts // calls
        lines += [
            f"A call took {usage.prompt_tokens / calls:,.0f} prompt tokens, "
            f"{(usage.completion_tokens - reasoning) / calls:,.0f} tokens of reply and "
            f"{reasoning / calls:,.0f} of reasoning.",
            f"At this rate, the expected run takes {total:,} completion tokens, reasoning included.",
        ]
    if usage.cost is not None:
        lines.append(f"The probe cost {Expense(answers=1, cost=usage.cost, priced=1).cost_text}.")
    for reason, count in Counter(failure.reason for failure in failures).most_common():
        detail = next(failure.detail for failure in failures if failure.reason == reason)
        lines.append(f"Failed ({reason}): {count}. {detail}")
    return lines
