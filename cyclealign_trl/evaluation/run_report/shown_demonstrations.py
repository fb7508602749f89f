"""Which demonstrations each ranking request of a run contained, by replaying the log.

The log does not store them, but everything that they follow from: the settings of the pool (in `run.json`) and the
agreements. The replay uses the pool itself, in the order in which the trainer does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from ...chat.budget import BUDGET_EXHAUSTED
from ...cycle.demonstrations import DemonstrationPool, from_agreement
from ...cycle.interaction import SKIPPED
from ...types import Demonstration

Row = Mapping[str, Any]
Shown = list[int] | None
"""Demonstrations of one request, in order: rows of the log whose agreement is shown, and -1, -2, ... for those that
the run was started with. `None` if the ranker was not asked."""

UNKNOWN_POOL = (
    "The demonstrations that the ranker was shown are not known: the run left no run.json (earlier versions did not "
    "write it), or it had a pool of another class."
)
LOOKAHEAD = (
    "With ranking_lookahead=1 and demonstrations of the whole run, those shown in the first step of an epoch can be "
    "newer than listed here."
)
DUPLICATES = (
    "Some steps contain a prompt several times, in several processes. Its demonstrations are listed as if "
    "one process had run them all."
)


def shown_demonstrations(rows: Sequence[Row], run: Mapping[str, Any]) -> tuple[list[Shown], list[Demonstration]]:
    """Replay a run.

    Args:
        rows: The log, by step.
        run: Content of `run.json`, with the settings of the pool.

    Returns:
        The demonstrations of each row, and those that the run was started with: the static ones, then dynamic ones
        that the pool already had.
    """
    pool = DemonstrationPool.from_settings(run["demonstrations"])
    settings = run["settings"]
    min_agreement, ahead = settings["min_agreement"], settings["ranking_lookahead"]
    initial = [*pool.static, *pool.dynamic]
    sources = {id(demonstration): -1 - index for index, demonstration in enumerate(initial)}
    kept: list[Demonstration] = []  # keeps the ids in `sources` unique

    shown: list[Shown] = []
    waiting: list[list[tuple[int, Row]]] = []  # steps whose agreements the next request does not know yet
    for _, of_step in groupby(enumerate(rows), key=lambda entry: entry[1]["step"]):
        step = list(of_step)
        starts_window = step[0][1]["interaction"] == 0
        while len(waiting) > (0 if starts_window and pool.scope == "prompt" else ahead):
            kept += _close(waiting.pop(0), pool, sources, min_agreement, settings["num_interactions"])
        for _, row in step:
            demonstrations = pool.select(row["prompt"])
            asked = row["failure"] not in (*SKIPPED, BUDGET_EXHAUSTED)
            shown.append([sources[id(demo)] for demo in demonstrations] if asked else None)
        waiting.append(step)
    return shown, initial


def inexact(rows: Sequence[Row], run: Mapping[str, Any]) -> list[str]:
    """Return why a replay of the log may differ from what was shown, as sentences."""
    scope, settings = run["demonstrations"]["state"]["scope"], run["settings"]
    reasons = []
    if scope == "run" and settings["ranking_lookahead"]:
        reasons.append(LOOKAHEAD)
    if scope == "prompt" and run.get("processes", 1) > 1 and _has_duplicates(rows):
        reasons.append(DUPLICATES)
    return reasons


def _close(
    step: Sequence[tuple[int, Row]],
    pool: DemonstrationPool,
    sources: dict[int, int],
    min_agreement: int,
    num_interactions: int,
) -> list[Demonstration]:
    """Add the agreements of a step to the pool, as the trainer does at its end."""
    added = []
    for index, row in step:
        if row["agreement"] is not None and len(row["agreement"]) >= min_agreement:
            demonstration = from_agreement(row["prompt"], row["completions"], row["agreement"])
            sources[id(demonstration)] = index
            added.append(demonstration)
    pool.observe(added)
    if step[0][1]["interaction"] == num_interactions - 1:
        pool.forget(row["prompt"] for _, row in step)
    return added


def _has_duplicates(rows: Sequence[Row]) -> bool:
    for _, of_step in groupby(rows, key=itemgetter("step")):
        prompts = [str(row["prompt"]) for row in of_step]
        if len(set(prompts)) < len(prompts):
            return True
    return False
