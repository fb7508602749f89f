"""`cyclealign judge`: how good a ranker is, measured on data with reference orders."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..evaluation.evaluate_ranker import evaluate_ranker
from ..evaluation.report import JudgeReport
from .arguments import CommandParser, RankerArguments
from .inputs import load_references, make_ranker, ranker_options
from .launch import WRONG_USE, errors_in_one_line


@dataclass
class JudgeArguments:
    """What the ranker is measured on, and how."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Rows with a reference order: a name on the Hub (Anthropic/hh-rlhf, allenai/reward-bench-2, TRL's "
            "preference data), a folder, or a JSON, Parquet or CSV file."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set; of HH-RLHF, the subset."}
    )
    dataset_split: str = field(default="test", metadata={"help": "Split of the data set."})
    output_dir: str = field(
        default="outputs/judge", metadata={"help": "Where the report and the answers are written."}
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "How many rows to rank, drawn at random. If not set: all."}
    )
    max_demonstrations: int = field(
        default=0, metadata={"help": "Figures are given for 0, 1, ... up to this many demonstrations (held-out rows)."}
    )
    reverse: bool = field(
        default=True,
        metadata={
            "help": "Whether to rank each row again, its completions in reverse order, which shows position bias "
            "beyond doubt. --no_reverse halves the price."
        },
    )
    max_concurrency: int = field(default=32, metadata={"help": "Rankings asked for at once."})
    seed: int = field(default=0, metadata={"help": "Seed of shown orders, samples, demonstrations and intervals."})


def make_parser() -> CommandParser:
    """The command's arguments."""
    return CommandParser(
        (JudgeArguments, RankerArguments),
        prog="cyclealign judge",
        description="Measures a ranker on completions whose order is known: accuracy, position bias, failures, cost.",
    )


def main(argv: Sequence[str]) -> None:
    """Ranks the rows, prints the figures and writes the report."""
    parser = make_parser()
    with errors_in_one_line(parser.prog, *WRONG_USE):
        own, foreign = parser.split(argv)
        if foreign:
            parser.error(f"unknown argument {foreign[0]}.")
        args, ranker_args = parser.parse(own)
        try:
            report = _judge(args, ranker_args)
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted. The same command goes on with what is missing.")
            sys.exit(130)
        written = report.save(args.output_dir)
    print(report.to_markdown())
    for reason, count in report.dropped.items():
        print(f"Left out: {count} rows ({reason}).")
    print(f"Written to {args.output_dir}: {', '.join(written)}.")
    if "report.png" not in written:
        print("For the plot: pip install 'cyclealign-trl[report]'.")


def _judge(args: JudgeArguments, ranker_args: RankerArguments) -> JudgeReport:
    dataset = load_references(args.dataset_name, args.dataset_config, args.dataset_split)
    options = ranker_options(ranker_args)
    if ranker_args.ranker_model is not None and not {"shuffle", "num_passes"} & options.keys():
        # Shown orders are set here, or nothing could be said of them. Who asks for shuffling measures that, too.
        options["shuffle"] = False
    ranker = make_ranker(replace(ranker_args, ranker_kwargs=json.dumps(options)))
    cacheable = getattr(ranker, "fingerprint", None) is not None
    return evaluate_ranker(
        ranker,
        dataset,
        cache_path=Path(args.output_dir) / "rankings.sqlite" if cacheable else None,
        max_demonstrations=args.max_demonstrations,
        reverse=args.reverse,
        max_samples=args.max_samples,
        max_concurrency=args.max_concurrency,
        seed=args.seed,
    )
