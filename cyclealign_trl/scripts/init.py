"""`cyclealign init`: write a commented YAML file for the other commands."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

CONFIGS = Path(__file__).with_name("configs")
_COMMAND = "#   "  # begins the commands in the first comment of a file


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of the command."""
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser = argparse.ArgumentParser(
        prog="cyclealign init",
        description="Write a commented YAML file for the --config of another command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {name:24}{_summary(name)}" for name in names),
    )
    parser.add_argument(
        "method",
        nargs="?",
        choices=names,
        default="cyclealign",
        metavar="METHOD",
        help="One of the methods below. Defaults to cyclealign.",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="File to write. Defaults to METHOD.yaml in the current folder."
    )
    parser.add_argument("--force", action="store_true", help="Replace the file if it exists.")
    return parser


def main(argv: Sequence[str]) -> None:
    """Write the file, and print the commands that take it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    default = f"{args.method}.yaml"
    path = args.output or Path(default)
    text = (CONFIGS / default).read_text(encoding="utf-8")
    text = text.replace(f"--config {default}", f"--config {shlex.quote(str(path))}")
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
        with path.open("w" if args.force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        parser.error(f"{path} exists. Add --force to replace it, or --output FILE to write another file.")
    except OSError as error:
        parser.error(f"{path} cannot be written: {error.strerror}.")
    print(f"Written to {path}. Edit it, then run:")
    for line in takewhile(lambda line: line.startswith("#"), text.splitlines()):
        if line.startswith(_COMMAND):
            print(f"  {line.removeprefix(_COMMAND)}")


def _summary(name: str) -> str:
    """Return the first line of a file, which says what it is for."""
    return (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
