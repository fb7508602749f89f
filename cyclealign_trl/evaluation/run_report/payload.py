"""The interactions as data for the page: grouped by prompt, in compressed blocks that are unpacked when needed."""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...cycle.agreement import agreement_rate
from ...types import Demonstration, prompt_key
from .run_data import RunData

BLOCK_CHARACTERS = 500_000
"""JSON characters of a block: a compromise between few steps of unpacking and little to unpack for one prompt."""
EXCERPT = 110  # characters of a prompt in the list
FAILED, NOT_ORDERED = "x", "-"


@dataclass
class PromptGroup:
    """All interactions of one prompt, by run.

    Args:
        prompt: The prompt.
        rows: Rows of the log of each run, by step.
        index: Position of the group in the page, set when it is included.
    """

    prompt: Any
    rows: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    index: int | None = None


@dataclass(frozen=True)
class Payload:
    """Data of a page.

    Args:
        index: What the page reads first, packed.
        blocks: Interactions, packed.
        num_prompts: Number of included prompts.
        num_left_out: Number of prompts that were left out.
    """

    index: str
    blocks: Sequence[str]
    num_prompts: int
    num_left_out: int


def pack(data: Any) -> str:
    """Return JSON data, compressed, as Base64: whatever the texts contain, the page holds only letters and digits."""
    # ASCII, because a text from a JSON file can contain surrogates that UTF-8 cannot encode.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), compresslevel=6, mtime=0)).decode("ascii")


def make_payload(runs: Sequence[RunData], charts: Sequence[Mapping[str, Any]], max_prompts: int) -> Payload:
    """Collect the data of a page.

    Args:
        runs: The runs.
        charts: Values of the charts.
        max_prompts: Maximum number of prompts. Of more, as many are included, evenly spaced over the runs.
    """
    groups = group_by_prompt(runs)
    included = _evenly(groups, max_prompts)
    for index, group in enumerate(included):
        group.index = index
    places = _places(groups)
    blocks: list[list[Any]] = [[]]
    listed, size = [], 0
    for group in included:
        entry = _group_entry(group, runs, places)
        characters = len(json.dumps(entry))
        if blocks[-1] and size + characters > BLOCK_CHARACTERS:
            blocks.append([])
            size = 0
        size += characters
        listed.append([_excerpt(group.prompt), len(blocks) - 1, len(blocks[-1]), _levels(group, runs)])
        blocks[-1].append(entry)
    content = {
        "runs": [run.name for run in runs],
        "demonstrations": [[_demonstration(demo) for demo in run.initial_demonstrations] for run in runs],
        "known": [bool(run.shown) for run in runs],
        "groups": listed,
        "held": _held_out(runs),
        "charts": list(charts),
    }
    packed = [pack(block) for block in blocks] if listed else []
    return Payload(pack(content), packed, len(included), len(groups) - len(included))


def group_by_prompt(runs: Sequence[RunData]) -> list[PromptGroup]:
    """Return the prompts of all runs in the order in which they first occur. Copies within a step are kept apart."""
    groups: dict[tuple[str, int], PromptGroup] = {}
    for run_index, run in enumerate(runs):
        step, copies = None, Counter[str]()
        for row_index, row in enumerate(run.rows):
            if row["step"] != step:
                step, copies = row["step"], Counter()
            key = prompt_key(row["prompt"])
            group = groups.setdefault((key, copies[key]), PromptGroup(row["prompt"]))
            group.rows[run_index].append(row_index)
            copies[key] += 1
    return list(groups.values())


def _evenly(groups: Sequence[PromptGroup], number: int) -> list[PromptGroup]:
    if len(groups) <= number:
        return list(groups)
    return [groups[index * len(groups) // number] for index in range(number)]


def _places(groups: Sequence[PromptGroup]) -> dict[tuple[int, int], tuple[int, int]]:
    """Return the group, and the position in it, of each included row of each run."""
    return {
        (run, row): (group.index, position)
        for group in groups
        if group.index is not None
        for run, rows in group.rows.items()
        for position, row in enumerate(rows)
    }


def _group_entry(
    group: PromptGroup, runs: Sequence[RunData], places: Mapping[tuple[int, int], tuple[int, int]]
) -> list[Any]:
    by_run = []
    for run_index, rows in group.rows.items():
        run = runs[run_index]
        entries = []
        for row in rows:
            shown = run.shown[row] if run.shown else None
            entries.append(_interaction(run.rows[row], _references(shown, run_index, places)))
        by_run.append([run_index, entries])
    return [group.prompt, by_run]


def _references(
    shown: Sequence[int] | None, run: int, places: Mapping[tuple[int, int], tuple[int, int]]
) -> list[Any] | None:
    """Return the demonstrations of a request: -1, -2, ... for initial ones, group and position for agreements.

    An agreement of a prompt that the page leaves out is 0.
    """
    if shown is None:
        return None
    return [source if source < 0 else list(places.get((run, source), ())) or 0 for source in shown]


def _interaction(row: Mapping[str, Any], shown: list[Any] | None) -> list[Any]:
    usage = row["usage"]
    return [
        row["step"],
        row["interaction"],
        row["completions"],
        row["black_box_order"],
        row["white_box_order"],
        row["agreement"],
        row["ranks"],
        row["improved_completion"],
        row["failure"],
        usage and [usage[key] for key in ("prompt_tokens", "completion_tokens", "cost", "attempts", "cached")],
        row["consistency"],
        shown,
    ]


def _levels(group: PromptGroup, runs: Sequence[RunData]) -> list[list[Any]]:
    """Return the agreement of each interaction by run: a digit from 0 to 9, or why there is none."""
    return [[run, "".join(_level(runs[run].rows[row]) for row in rows)] for run, rows in group.rows.items()]


def _level(row: Mapping[str, Any]) -> str:
    if row["failure"] is not None:
        return FAILED
    if row["agreement"] is None or row["ranks"] is None or len(set(row["ranks"])) < 2:
        return NOT_ORDERED
    return str(round(9 * agreement_rate(row["agreement"], row["ranks"])))


def _excerpt(prompt: Any) -> str:
    """Return the end of the last message, which tells prompts apart better than their beginning."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if isinstance(prompt, str):
        text = text.rpartition("Human:")[2].removesuffix("Assistant:").strip() or text
    return " ".join(str(text)[: 4 * EXCERPT].split())[:EXCERPT]


def _demonstration(demonstration: Demonstration) -> list[Any]:
    return [demonstration.prompt, list(demonstration.completions), list(demonstration.order)]


def _held_out(runs: Sequence[RunData]) -> list[list[Any]]:
    """Return the held-out prompts of all runs with their replies by run: before, and after training."""
    prompts: dict[str, list[Any]] = {}
    for index, run in enumerate(runs):
        for entry in run.held_out:
            held = prompts.setdefault(prompt_key(entry["prompt"]), [entry["prompt"], []])
            held[1].append([index, entry["before"], entry["after"]])
    return list(prompts.values())
