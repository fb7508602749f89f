"""`cyclealign export`: a run's feedback as training data for other trainers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ..cycle.interaction_log import ExportType, export_interactions


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="cyclealign export",
        description="Turns a run's interaction log into data for TRL's trainers, or for `cyclealign train-ranked`.",
    )
    parser.add_argument("run", type=Path, help="The run's output directory.")
    parser.add_argument(
        "--to",
        choices=get_args(ExportType),
        default="preference",
        help="preference (DPO), ranked (PRO, RRHF) or prompt-completion (SFT). Default: preference.",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="Folder that datasets.load_dataset can read. Default: RUN/<what --to says>."
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Writes one Parquet file, and says how many interactions went into it."""
    args = make_parser().parse_args(argv)
    folder = args.output_dir or args.run / args.to
    try:
        dataset = export_interactions(args.run, args.to)
        if not len(dataset):
            raise ValueError(f"{dataset.info.description}: there is nothing to write.")
        folder.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / "train.parquet")
    except (ValueError, OSError) as error:
        sys.exit(f"cyclealign export: error: {error}")
    print(f"{dataset.info.description}\nWritten: {folder / 'train.parquet'}")
