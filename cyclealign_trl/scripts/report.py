"""`cyclealign report`: one HTML page about runs and evaluations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.run_report import MAX_PROMPTS
from .one_line_errors import one_line_errors


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="cyclealign report",
        description="Write one self-contained HTML page about training runs: curves, interactions, replies before and "
        "after, evaluations, settings. It needs no network and no server.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="Output directory of a run. Several are shown beside each other. Directories of evaluations add their "
        "tables.",
    )
    parser.add_argument(
        "--output_file",
        type=Path,
        metavar="FILE",
        help="Page to write. Defaults to report.html in the first directory.",
    )
    parser.add_argument(
        "--max_prompts",
        type=int,
        default=MAX_PROMPTS,
        metavar="INT",
        help="Number of prompts whose interactions are included. Of more, as many are included, evenly spaced over "
        "the runs. (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Write the page and print its address."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_line_errors(parser.prog, (ValueError, OSError)):
        from ..evaluation.run_report.page import write_run_report

        path = write_run_report(args.runs, args.output_file, args.max_prompts)
    print(f"Written to {path}. Open it in a browser: {path.absolute().as_uri()}")
