"""`cyclealign compare`: measure how often the replies of one model are better than those of another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..chat.messages import BYTES_PER_TOKEN
from ..evaluation.compare_models import collect_pairs, compare_models, judges_by_criteria
from ..evaluation.comparison import estimate_comparison
from ..evaluation.pairwise_judge import PairwiseJudge
from ..evaluation.prompts import load_prompts
from ..evaluation.sources import parse_source
from ..types import Usage
from .arguments import CommandParser, RankerArguments
from .evaluate import GenerationArguments, PromptArguments
from .inputs import make_ranker
from .one_line_errors import one_line_errors


@dataclass
class CompareArguments:
    """The models and the judge's criteria."""

    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Two models, the one whose wins are counted first: a model or a PEFT adapter (folder or name on "
            "the Hub), endpoint:MODEL@URL, ALIGNER+MODEL, or replies (a file, or dataset:NAME, with columns prompt "
            "and completion). LABEL=MODEL names one in the tables."
        },
    )
    criteria: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Criteria to judge by, one after another: overall (helpfulness and harmlessness, the default), "
            "helpfulness, harmlessness, or descriptions in several words."
        },
    )
    estimate: bool = field(
        default=False,
        metadata={"help": "Collect the replies, and print the calls, tokens and cost of the verdicts instead."},
    )
    output_dir: str = field(
        default="outputs/comparison", metadata={"help": "Folder for the report, the replies and the verdicts."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for sampled prompts and confidence intervals."})


def make_parser() -> CommandParser:
    """Create the parser of the command."""
    return CommandParser(
        (CompareArguments, RankerArguments, PromptArguments, GenerationArguments),
        prog="cyclealign compare",
        description="Compare two models by the verdicts of a judge, which is shown both replies in both orders. "
        "--ranker_model names the judge.",
        positional="models",
    )


def main(argv: Sequence[str]) -> None:
    """Collect replies and verdicts, print the tables and write the report."""
    parser = make_parser()
    with one_line_errors(parser.prog):
        own_argv, accelerate_argv = parser.split(argv)
        if accelerate_argv:
            parser.error(f"unknown argument {accelerate_argv[0]}.")
        args, ranker_args, prompt_args, generation_args = parser.parse(own_argv)
        if len(args.models) != 2:
            parser.error(f"two models are compared, got {len(args.models)}. Name them before the other arguments.")
        sources = [parse_source(model) for model in args.models]
        settings = generation_args.to_settings()
        judge = make_ranker(ranker_args, connect=not args.estimate, llm=PairwiseJudge)
        judges = judges_by_criteria(judge, args.criteria)
        prompts = load_prompts(
            prompt_args.dataset_name,
            prompt_args.dataset_config,
            prompt_args.dataset_split,
            group_column=prompt_args.group_column,
            max_samples=prompt_args.max_samples,
            seed=args.seed,
        )
        try:
            if args.estimate:
                pairs, _ = collect_pairs(sources[0], sources[1], prompts, args.output_dir, settings)
                estimates = [estimate_comparison(each, pairs) for each in judges.values()]
                print(describe_estimate(estimates))
                return
            report = compare_models(
                sources[0],
                sources[1],
                judge,
                prompts,
                criteria=args.criteria,
                output_dir=args.output_dir,
                settings=settings,
                seed=args.seed,
            )
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted. Run the same command again to continue.")
            sys.exit(130)
        written = report.save(args.output_dir)
    print(report.to_markdown())
    print(f"\nWritten to {args.output_dir}: {', '.join(written)}.")


def describe_estimate(estimates: Sequence[Usage | None]) -> str:
    """Return the estimated usage of all criteria as text."""
    known = [usage for usage in estimates if usage is not None]
    if len(known) < len(estimates):
        return "The judge gives no estimate: it is not a PairwiseJudge."
    total = sum(known, Usage(attempts=0))
    cost = "unpriced: add prices to ranker_kwargs" if total.cost is None else f"${total.cost:,.2f}"
    return (
        f"{total.attempts:,} calls, about {total.prompt_tokens:,} prompt and {total.completion_tokens:,} completion "
        f"tokens, {cost}. Tokens are estimated at {BYTES_PER_TOKEN} bytes of text each, without retries and reasoning "
        "tokens. Verdicts that are stored already cost nothing."
    )
