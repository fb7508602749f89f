"""`cyclealign <command>`: finds the command's script and runs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__

# Each command is a module of `cyclealign_trl.scripts` with `make_parser()` and `main(argv)`, imported when it is run.
COMMANDS = {
    "demo": "Align a tiny policy with a rule-based judge, offline, in under three minutes on two CPU cores.",
    "train": "Align a policy with a black-box ranker (CycleAlign).",
    "train-ranked": "Train a policy on ranked completions or preference pairs (PRO, RRHF).",
    "estimate": "Say what `train` with the same arguments will ask of its ranker: calls, tokens, cost.",
    "dlma": "Align a policy with its own opinion of contrastive pairs (DLMA).",
    "aligner": "Train a model to correct the answers of others (Aligner).",
    "serve": "Serve an upstream and its aligner as one model, behind an OpenAI-compatible endpoint.",
    "judge": "Measure a ranker on data with reference orders, before you pay for a run.",
    "export": "Turn a run's feedback into data for DPO, PRO, RRHF or SFT.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `cyclealign` command."""
    parser = argparse.ArgumentParser(prog="cyclealign", description="CycleAlign for the Hugging Face ecosystem.")
    parser.add_argument("--version", action="version", version=f"cyclealign-trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What follows the command is the command's own to parse, its --help included.
    command = parser.parse_args(arguments[:1]).command
    importlib.import_module(f".scripts.{command.replace('-', '_')}", __package__).main(arguments[1:])
