"""`cyclealign judge`: measure a ranker on data with reference orders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluation.evaluate_ranker import evaluate_ranker
from ..evaluation.report import JudgeReport
from ..rankers.cache import is_cacheable
from .arguments import CommandParser, RankerArguments
from .inputs import load_references, make_ranker
from .one_line_errors import one_line_errors


@dataclass
class JudgeArguments:
    """Data and settings of the measurement."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset with reference orders: a name on the Hub (Anthropic/hh-rlhf, allenai/reward-bench-2, "
            "preference data in TRL's format), a folder, or a JSON, Parquet or CSV file."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset. For HH-RLHF, the subset."}
    )
    dataset_split: str = field(default="test", metadata={"help": "Split of the dataset."})
    output_dir: str = field(default="outputs/judge", metadata={"help": "Folder for the report and the rankings."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Number of rows to rank, drawn at random. Defaults to all rows."}
    )
    max_demonstrations: int = field(
        default=0,
        metadata={"help": "Measure with 0, 1, ... up to this number of demonstrations, taken from held-out rows."},
    )
    reverse: bool = field(
        default=True,
        metadata={
            "help": "Whether to rank each row a second time with its completions in reverse order, to measure "
            "position bias. --no_reverse halves the number of calls."
        },
    )
    max_concurrency: int = field(default=32, metadata={"help": "Maximum number of concurrent rankings."})
    seed: int = field(
        default=0, metadata={"help": "Seed for shown orders, sampled rows, demonstrations and confidence intervals."}
    )


def make_parser() -> CommandParser:
    """Create the parser of the command."""
    return CommandParser(
        (JudgeArguments, RankerArguments),
        prog="cyclealign judge",
        description="Measure the accuracy, position bias, failures and cost of a ranker on completions with a known "
        "order.",
    )


def main(argv: Sequence[str]) -> None:
    """Rank the rows, print the figures and write the report."""
    parser = make_parser()
    with one_line_errors(parser.prog):
        own_argv, accelerate_argv = parser.split(argv)
        if accelerate_argv:
            parser.error(f"unknown argument {accelerate_argv[0]}.")
        args, ranker_args = parser.parse(own_argv)
        try:
            report = _measure(args, ranker_args)
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted. Run the same command again to rank the remaining rows.")
            sys.exit(130)
        written = report.save(args.output_dir)
    print(report.to_markdown())
    for reason, count in report.dropped.items():
        print(f"Dropped {count} rows ({reason}).")
    print(f"Written to {args.output_dir}: {', '.join(written)}.")
    if "report.png" not in written:
        print("To plot the report: pip install 'cyclealign-trl[report]'.")


def _measure(args: JudgeArguments, ranker_args: RankerArguments) -> JudgeReport:
    dataset = load_references(args.dataset_name, args.dataset_config, args.dataset_split)
    # A ranker that shuffles hides its position bias. `evaluate_ranker` chooses the shown orders instead.
    ranker = make_ranker(ranker_args, shuffle=False)
    return evaluate_ranker(
        ranker,
        dataset,
        cache_path=Path(args.output_dir) / "rankings.sqlite" if is_cacheable(ranker) else None,
        max_demonstrations=args.max_demonstrations,
        reverse=args.reverse,
        max_samples=args.max_samples,
        max_concurrency=args.max_concurrency,
        seed=args.seed,
    )
