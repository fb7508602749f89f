"""Parse the arguments of the commands, from the command line and from YAML files."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from accelerate.commands.launch import launch_command_parser
from transformers import TrainingArguments
from trl import TrlParser

from .help_pages import HelpPage, Section


@dataclass
class RankerArguments:
    """Choice of the ranker: an LLM behind an OpenAI-compatible endpoint, or the result of a Python function."""

    ranker_model: str | None = field(
        default=None,
        metadata={
            "help": "Name of the ranking LLM at its endpoint. The API key is read from the environment variable "
            "OPENAI_API_KEY."
        },
    )
    ranker_base_url: str | None = field(
        default=None,
        metadata={"help": "Base URL of the endpoint. Defaults to OPENAI_BASE_URL if set, and to OpenAI's otherwise."},
    )
    ranker_factory: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of a class or function that returns a ranker, to use instead of an LLM: "
            "cyclealign_trl.RewardModelRanker, or my_module.make_ranker in the current directory. On the command "
            "line, it replaces an LLM from the YAML file and its ranker_kwargs; ranker_model replaces a factory."
        },
    )
    ranker_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for LLMRanker or for the factory, as JSON. The `members` of "
            "cyclealign_trl.JuryRanker are objects with ranker_model, ranker_base_url, ranker_factory and "
            "ranker_kwargs."
        },
    )


@dataclass
class CorrectorArguments:
    """Choice of the aligner that writes the SFT target if the ranker offers none, for `sft_target="corrector"`."""

    corrector: str | None = field(
        default=None, metadata={"help": "Name or path of an aligner, such as one trained by `cyclealign aligner`."}
    )
    corrector_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for Aligner.from_pretrained, as JSON."}
    )


class CommandParser(TrlParser):
    """`TrlParser` with a readable help, one-line errors and support for the arguments of `accelerate launch`.

    A ranker on the command line replaces a ranker of the other kind from the YAML file.

    Args:
        dataclass_types: Dataclasses to parse the arguments into.
        prog: Name of the command.
        description: Description of the command for its help.
        positional: Name of the argument that takes the values in front of all others, if there is one.
    """

    def __init__(
        self, dataclass_types: Iterable[type[Any]], prog: str, description: str, positional: str | None = None
    ) -> None:
        self._sections = tuple(dataclass_types)
        self._positional = positional
        super().__init__(self._sections, prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print the error without the usage, which has about two hundred arguments, and exit with status 2."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def split(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        """Split the arguments into those of the command and those of `accelerate launch`.

        The arguments of `accelerate launch` are read from the YAML file, too. No dataclass is built, because
        `TrainingArguments` would initialize a device. Exits with status 2 if an argument belongs to neither.
        """
        argv = self._normalize(argv)
        if argv[-1:] == ["--config"]:
            self.error("--config needs the path of a YAML file.")
        self.dataclass_types = []
        *_, from_file, from_command_line = self.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        self.dataclass_types = list(self._sections)
        known = launch_command_parser()._option_string_actions
        for token in [*from_file[::2], *from_command_line]:
            name = token.partition("=")[0]
            if token.startswith("--") and name not in known:
                close = difflib.get_close_matches(name, [*self._option_string_actions, *known], n=1)
                self.error(f"unknown argument {name}." + (f" Did you mean {close[0]}?" if close else ""))
        if from_command_line and not from_command_line[0].startswith("-"):
            self.error(f"unexpected {from_command_line[0]!r}: put an --argument in front of each value.")
        accelerate_argv = [
            token
            for name, value in zip(from_file[::2], from_file[1::2], strict=True)
            for token in _to_command_line(name, value, known)
        ]
        return _remove_subsequence(argv, from_command_line), accelerate_argv + from_command_line

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Parse the command's own arguments into the dataclasses. The command line takes precedence over YAML."""
        parsed: tuple[Any, ...] = self.parse_args_and_config(self._normalize(argv), fail_with_unknown_args=False)
        given = {token.partition("=")[0][2:].replace("-", "_") for token in argv if token.startswith("--")}
        return tuple(_replace_ranker(part, given) if isinstance(part, RankerArguments) else part for part in parsed)

    def _normalize(self, argv: Sequence[str]) -> list[str]:
        """Return the arguments with a name in front of positional ones, and `--config` apart from its value."""
        if self._positional is not None and argv and not argv[0].startswith("-"):
            argv = [f"--{self._positional}", *argv]
        return _separate_config_value(argv)

    def format_help(self) -> str:
        """Return the help as text."""
        return self.help_page().format()

    def help_page(self) -> HelpPage:
        """Return the help, with a section for each dataclass.

        Arguments that `TrainingArguments` defines and no subclass changes are listed by name only. Deprecated
        arguments and those marked with `argparse.SUPPRESS` are left out.
        """
        inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
        trains = any(issubclass(dataclass_type, TrainingArguments) for dataclass_type in self._sections)
        launch_usage = " [arguments of accelerate launch]" if trains else ""
        values_usage = "" if self._positional is None else f" [{self._positional.upper()} ...]"
        launch_note = " and those of `accelerate launch`" if trains else ""
        introduction = [
            f"usage: {self.prog}{values_usage} [--config FILE] [--argument VALUE ...]{launch_usage}",
            str(self.description),
            f"--config takes a YAML file with the arguments below{launch_note}. The command line takes precedence.",
        ]
        # Reversed, so that a switch is not replaced by its `--no_` twin.
        actions = {action.dest: action for action in reversed(self._actions)}
        listed = {"help"}
        sections: list[Section] = []
        for dataclass_type in self._sections:
            names = [field.name for field in dataclasses.fields(dataclass_type) if field.init]
            if issubclass(dataclass_type, TrainingArguments):
                changed = _fields_declared_below(dataclass_type, TrainingArguments)
                names = [name for name in names if name in changed or name not in inherited or name == "output_dir"]
            listed.update(names)
            title = f"{dataclass_type.__name__} ({dataclass_type.__module__.partition('.')[0]})"
            shown = [actions[name] for name in names if not _is_hidden(actions[name])]
            sections.append(Section(title, [(_invocation(action), self._help_of(action)) for action in shown]))
        if trains:
            others = [name for name, action in actions.items() if name not in listed and not _is_hidden(action)]
            title = "Other arguments of transformers.TrainingArguments"
            sections.append(Section(title, text=", ".join(sorted(others))))
        return HelpPage(self.prog, introduction, sections)

    def _help_of(self, action: argparse.Action) -> str:
        """Return the help of an argument with its default, unless that is `None`."""
        formatter = argparse.HelpFormatter if action.default is None else argparse.ArgumentDefaultsHelpFormatter
        return str(formatter(self.prog)._expand_help(action)) if action.help else ""


def _replace_ranker(args: RankerArguments, given: set[str]) -> RankerArguments:
    """Drop the ranker from the YAML file if the command line, with the arguments `given`, sets one of the other kind.

    Its `ranker_kwargs` are dropped, too: another ranker has other arguments.
    """
    llm, factory = {"ranker_model", "ranker_base_url"}, {"ranker_factory"}
    for chosen, other in ((factory, llm), ({"ranker_model"}, factory)):
        if chosen & given and not other & given and any(getattr(args, name) is not None for name in other):
            dropped = other | ({"ranker_kwargs"} - given)
            return dataclasses.replace(args, **dict.fromkeys(dropped, None))
    return args


def _invocation(action: argparse.Action) -> str:
    """Return an argument as `--num_generations INT`, without its other spellings."""
    kind = getattr(action.type, "__name__", "")
    value = {"int": "INT", "float": "FLOAT", "string_to_bool": "BOOL"}.get(kind, "VALUE")
    return f"{action.option_strings[0]} {value}"


def _is_hidden(action: argparse.Action) -> bool:
    return action.help == argparse.SUPPRESS or (action.help or "").startswith("Deprecated")


def _fields_declared_below(dataclass_type: type[Any], base: type[Any]) -> set[str]:
    """Return the fields that a dataclass, or a class between it and `base`, adds or changes."""
    classes = (parent for parent in dataclass_type.__mro__ if issubclass(parent, base) and parent is not base)
    return {name for parent in classes for name in parent.__annotations__}


def _separate_config_value(argv: Sequence[str]) -> list[str]:
    """Split `--config=FILE` into two tokens, because `TrlParser` looks for the token `--config`."""
    separated: list[str] = []
    for token in argv:
        separated.extend(token.split("=", 1) if token.startswith("--config=") else [token])
    return separated


def _remove_subsequence(tokens: Sequence[str], removed: Sequence[str]) -> list[str]:
    rest = iter(removed)
    next_removed = next(rest, None)
    kept = []
    for token in tokens:
        if token == next_removed:
            next_removed = next(rest, None)
        else:
            kept.append(token)
    return kept


def _to_command_line(name: str, value: str, known: Mapping[str, argparse.Action]) -> tuple[str, ...]:
    """Convert an argument of `accelerate launch` from YAML, in which a switch has a value, to tokens."""
    if known[name].nargs != 0:
        return name, value
    return (name,) if value == "True" else ()
