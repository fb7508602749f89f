"""What the commands are told, on the command line or in YAML."""

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


@dataclass
class RankerArguments:
    """Who ranks: an LLM behind an OpenAI-compatible endpoint, or whatever a function of yours returns."""

    ranker_model: str | None = field(
        default=None,
        metadata={"help": "Name of the ranking LLM at its endpoint. The key is read from OPENAI_API_KEY."},
    )
    ranker_base_url: str | None = field(
        default=None, metadata={"help": "The endpoint. If not set: OPENAI_BASE_URL, else OpenAI's."}
    )
    ranker_factory: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a ranking LLM: dotted path of a class or function that returns a ranker, such as "
            "cyclealign_trl.RewardModelRanker or my_module.make_ranker (looked for in the current directory, too)."
        },
    )
    ranker_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of LLMRanker, or the arguments of the factory, as JSON."}
    )


@dataclass
class CorrectorArguments:
    """Who writes the SFT target where the ranker offers no improved completion, with sft_target corrector."""

    corrector: str | None = field(
        default=None, metadata={"help": "Name or path of an aligner, such as `cyclealign aligner` trains."}
    )
    corrector_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of Aligner.from_pretrained, as JSON."}
    )


class CommandParser(TrlParser):
    """`TrlParser` with a help that can be read, errors of one line, and an eye for accelerate's arguments.

    Args:
        dataclass_types: What the arguments are parsed into.
        prog: The command.
        description: What it does.
    """

    def __init__(self, dataclass_types: Iterable[type[Any]], prog: str, description: str) -> None:
        self._sections = tuple(dataclass_types)
        super().__init__(
            self._sections, prog=prog, description=description, formatter_class=_OneNameEach, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, without the usage of two hundred arguments."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def split(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        """The arguments of the command itself, and those of `accelerate launch`, its configuration file included.

        Builds no dataclass: `TrainingArguments` would take hold of a device. Exits with 2 where an argument belongs
        to neither.
        """
        argv = _separate_config(argv)
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
            self.error(f"unexpected {from_command_line[0]!r}: every value follows its --argument.")
        flags = (_flag(name, value, known) for name, value in zip(from_file[::2], from_file[1::2], strict=True))
        own = _without(argv, from_command_line)
        return own, [token for flag in flags for token in flag] + from_command_line

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses, from YAML and the command's own arguments; the command line wins."""
        parsed: tuple[Any, ...] = self.parse_args_and_config(_separate_config(argv), fail_with_unknown_args=False)
        return parsed

    def format_help(self) -> str:
        """One section for each dataclass; of what `TrainingArguments` has, the names."""
        inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
        trains = any(issubclass(dataclass_type, TrainingArguments) for dataclass_type in self._sections)
        formatter = self._get_formatter()
        launch, included = (" [arguments of accelerate launch]", ", accelerate's included") if trains else ("", "")
        formatter.add_text(f"usage: {self.prog} [--config FILE] [--argument VALUE ...]{launch}")
        formatter.add_text(self.description)
        formatter.add_text(f"--config names a YAML file of the arguments below{included}. The command line wins.")
        actions = {action.dest: action for action in reversed(self._actions)}  # not the `--no_` twin of a switch
        shown = {"help"}
        for dataclass_type in self._sections:
            names = [field.name for field in dataclasses.fields(dataclass_type) if field.init]
            if issubclass(dataclass_type, TrainingArguments):
                # What it redefines has another default here.
                changed = {name for base in _below(dataclass_type, TrainingArguments) for name in base.__annotations__}
                names = [name for name in names if name in changed or name not in inherited or name == "output_dir"]
            shown.update(names)
            formatter.start_section(f"{dataclass_type.__name__} ({dataclass_type.__module__.partition('.')[0]})")
            formatter.add_arguments([actions[name] for name in names])
            formatter.end_section()
        if trains:
            formatter.start_section("Every other argument of transformers.TrainingArguments")
            formatter.add_text(", ".join(sorted(actions.keys() - shown)))
            formatter.end_section()
        return str(formatter.format_help())


class _OneNameEach(argparse.ArgumentDefaultsHelpFormatter):
    """`--num_generations INT` instead of each spelling with a metavariable of its own."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "")
        value = {"int": "INT", "float": "FLOAT", "string_to_bool": "BOOL"}.get(kind, "VALUE")
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _separate_config(argv: Sequence[str]) -> list[str]:
    """`--config=FILE` in two parts, as `TrlParser` looks for it."""
    separated: list[str] = []
    for token in argv:
        separated.extend(token.split("=", 1) if token.startswith("--config=") else [token])
    return separated


def _without(argv: Sequence[str], taken: Sequence[str]) -> list[str]:
    """The arguments less a subsequence of them."""
    rest = iter(taken)
    next_taken = next(rest, None)
    kept = []
    for token in argv:
        if token == next_taken:
            next_taken = next(rest, None)
        else:
            kept.append(token)
    return kept


def _flag(name: str, value: str, known: Mapping[str, argparse.Action]) -> tuple[str, ...]:
    """An argument of accelerate from YAML, where a switch has a value."""
    if known[name].nargs != 0:
        return name, value
    return (name,) if value == "True" else ()


def _below(dataclass_type: type[Any], base: type[Any]) -> list[type[Any]]:
    """The classes between a dataclass and one that it derives from."""
    return [parent for parent in dataclass_type.__mro__ if issubclass(parent, base) and parent is not base]
