"""Dispatch `cyclealign <command>` to the module of the command."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from . import __version__
from .scripts.help_pages import stored_help

# Each command is a module of `cyclealign_trl.scripts` with `make_parser()` and `main(argv)`. It is imported on use.
COMMANDS = {
    "demo": "Align a tiny policy with a rule-based judge, offline, in under three minutes on two CPU cores.",
    "init": "Write a commented YAML file for the commands below.",
    "train": "Align a policy with the feedback of a black-box ranker (CycleAlign).",
    "train-ranked": "Train a policy on ranked completions or preference pairs (PRO, RRHF).",
    "estimate": "Estimate the ranker calls, tokens and cost of a `train` run.",
    "dlma": "Align a policy with its own scores of contrastive pairs (DLMA).",
    "aligner": "Train a model to correct the answers of other models (Aligner).",
    "serve": "Serve an upstream model and its aligner as one model, behind an OpenAI-compatible endpoint.",
    "evaluate": "Evaluate models by the rewards of their replies to test prompts.",
    "compare": "Compare two models by the verdicts of a judge on their replies.",
    "judge": "Measure a ranker on data with reference orders, before paying for a run.",
    "report": "Write one HTML page about runs: curves, interactions, evaluations, settings.",
    "export": "Export the feedback of a run as data for DPO, PRO, RRHF or SFT.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: Name of the command and its arguments. Defaults to the arguments of the process.
    """
    parser = argparse.ArgumentParser(
        prog="cyclealign",
        description="Align a language model with the feedback of a black-box ranker.",
        epilog="Run `cyclealign COMMAND --help` for the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"cyclealign-trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or not (arguments[0] in COMMANDS or arguments[0].startswith("-")):
        parser.print_help(sys.stderr)
        print(f"\n{parser.prog}: error: {_wrong_command(arguments)}", file=sys.stderr)
        sys.exit(2)
    # Each command parses its own arguments, including --help.
    command = parser.parse_args(arguments[:1]).command
    if arguments[1:] in (["--help"], ["-h"]) and (text := stored_help(command)) is not None:
        print(text, end="")
        sys.exit()
    importlib.import_module(f".scripts.{command.replace('-', '_')}", __package__).main(arguments[1:])


def _wrong_command(arguments: Sequence[str]) -> str:
    """Return the message for arguments that do not start with a command."""
    if not arguments:
        return "no command. Choose one of the commands above."
    close = difflib.get_close_matches(arguments[0].lower(), COMMANDS, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}?" if close else "Choose one of the commands above."
    return f"unknown command {arguments[0]!r}. {hint}"
