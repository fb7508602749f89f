"""Help of the commands whose parsers are built from dataclasses of TRL and transformers, which take seconds to import.

`help_pages.json` stores the pages. They are shown only with the versions of the libraries that they were made with;
with others, the command builds its parser. After a change of an argument, or an update of the libraries, run
`python -m cyclealign_trl.scripts.help_pages` to store them again.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

COMMANDS = ("train", "train-ranked", "estimate", "dlma", "aligner", "judge", "evaluate", "compare")
"""Commands with a stored page."""
_FILE = Path(__file__).with_suffix(".json")
_LIBRARIES = ("accelerate", "torch", "transformers", "trl")


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a help page.

    Args:
        title: Its heading.
        arguments: Arguments as they are listed, such as `--num_generations INT`, with their help.
        text: Text below the arguments.
    """

    title: str
    arguments: Sequence[tuple[str, str]] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class HelpPage:
    """The help of a command, for any width of the terminal.

    Args:
        prog: Name of the command.
        introduction: Paragraphs above the sections.
        sections: The sections.
    """

    prog: str
    introduction: Sequence[str]
    sections: Sequence[Section]

    @classmethod
    def from_json(cls, page: dict[str, Any]) -> HelpPage:
        """Return a stored page."""
        sections = [
            Section(part["title"], [(name, text) for name, text in part["arguments"]], part["text"])
            for part in page["sections"]
        ]
        return cls(page["prog"], page["introduction"], sections)

    def format(self) -> str:
        """Return the page as text, as wide as the terminal."""
        formatter = _Formatter(self.prog, max_help_position=36)
        for paragraph in self.introduction:
            formatter.add_text(paragraph)
        for section in self.sections:
            formatter.start_section(section.title)
            formatter.add_arguments(
                [argparse.Action([name], "", help=text.replace("%", "%%")) for name, text in section.arguments]
            )
            formatter.add_text(section.text)
            formatter.end_section()
        return formatter.format_help()


class _Formatter(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.option_strings[0]


def stored_help(command: str) -> str | None:
    """Return the stored help of a command, or `None` if there is none for the installed versions of the libraries."""
    if command not in COMMANDS:
        return None
    stored = json.loads(_FILE.read_text(encoding="utf-8"))
    if stored["versions"] != _versions():
        return None
    return HelpPage.from_json(stored["pages"][command]).format()


def make_pages() -> dict[str, Any]:
    """Return the content of `help_pages.json`, from the parsers of the commands."""
    pages = {}
    for command in COMMANDS:
        module = importlib.import_module(f".{command.replace('-', '_')}", __package__)
        pages[command] = asdict(module.make_parser().help_page())
    return {"versions": _versions(), "pages": pages}


def _versions() -> dict[str, str | None]:
    """Return the public versions of the libraries: without the label of a build, such as `+cpu`."""
    versions: dict[str, str | None] = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library).partition("+")[0]
        except PackageNotFoundError:
            versions[library] = None
    return versions


if __name__ == "__main__":
    _FILE.write_text(json.dumps(make_pages(), indent=1) + "\n", encoding="utf-8")
