"""`cyclealign export`: export the feedback of a run as training data for other trainers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ..types import ExportType
from .one_line_errors import one_line_errors


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="cyclealign export",
        description="Export the interaction log of a run as training data for TRL's trainers or for "
        "`cyclealign train-ranked`.",
    )
    parser.add_argument("run", type=Path, help="Output directory of the run.")
    parser.add_argument(
        "--to",
        choices=get_args(ExportType),
        default="preference",
        help="Format of the data, for DPO (preference), PRO and RRHF (ranked) or SFT. (default: %(default)s)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="Folder to write, which datasets.load_dataset can read. Defaults to the subfolder of the run that is "
        "named like the format.",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Write the data as one Parquet file and print the number of interactions in it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    folder = args.output_dir or args.run / args.to
    with one_line_errors(parser.prog, (ValueError, OSError)):
        from ..cycle.interaction_log import export_interactions

        dataset = export_interactions(args.run, args.to)
        if not len(dataset):
            raise ValueError(f"Nothing to export: {dataset.info.description}.")
        folder.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / "train.parquet")
    print(f"{dataset.info.description}\nWritten to {folder / 'train.parquet'}.")
