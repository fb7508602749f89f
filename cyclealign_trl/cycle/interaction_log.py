"""Every interaction of a run, as Parquet files that `datasets.load_dataset("parquet", ...)` reads."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, List, Value

from .._files import atomic_write
from ..data.formats import text_feature
from ..types import as_completion
from .interaction import SKIPPED, Settlement

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_ORDER = pa.list_(pa.int64())
_USAGE = pa.struct(
    [
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("cost", pa.float64()),
        ("attempts", pa.int64()),
        ("cached", pa.bool_()),
    ]
)


def schema(conversational: bool) -> pa.Schema:
    """The columns of the log. Prompts are chat messages or text, orders list indices into `completions`.

    `ranks` holds the rank of each completion (0 = best), where ties show, which orders cannot.
    """
    return pa.schema(
        [
            ("step", pa.int64()),
            ("interaction", pa.int64()),
            ("prompt", _MESSAGES if conversational else pa.string()),
            ("completions", pa.list_(pa.string())),
            ("black_box_order", _ORDER),
            ("white_box_order", _ORDER),
            ("agreement", _ORDER),
            ("ranks", _ORDER),
            ("improved_completion", pa.string()),
            ("failure", pa.string()),
            ("usage", _USAGE),
            ("consistency", pa.float64()),
        ]
    )


class InteractionLog:
    """Writes `interactions/step-NNNNNN-R.parquet`: one file per optimiser step and process.

    A file is renamed into place when it is complete, and overwritten when a resumed run replays its step.

    Args:
        output_dir: The run's output directory.
        process_index: This process, R.
    """

    def __init__(self, output_dir: str | os.PathLike[str], process_index: int) -> None:
        self.folder = Path(output_dir) / "interactions"
        self._process_index = process_index

    def write(self, step: int, interaction: int, settlements: Sequence[Settlement]) -> None:
        """Writes what became of each of the process's prompts in one step.

        Args:
            step: Optimiser steps finished before this one.
            interaction: Position in the cycle, from 0.
            settlements: One per prompt.
        """
        rows = [_row(step, interaction, settlement) for settlement in settlements]
        conversational = isinstance(settlements[0].prompt, list)
        path = self.folder / f"step-{step:06d}-{self._process_index}.parquet"
        with atomic_write(path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema(conversational)), temporary)

    @property
    def paths(self) -> list[Path]:
        """The files of all processes, by step."""
        return sorted(self.folder.glob("*.parquet"))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The log of all processes, by step.

        Args:
            columns: Those to read; `None` reads all.

        Raises:
            FileNotFoundError: If there is none.
        """
        if not self.paths:
            raise FileNotFoundError(f"No interaction log in {self.folder}: train first, in this output directory.")
        return pa.concat_tables(pq.read_table(path, columns=columns) for path in self.paths)


def _row(step: int, interaction: int, settlement: Settlement) -> dict[str, Any]:
    return {
        "step": step,
        "interaction": interaction,
        "prompt": settlement.prompt,
        "completions": settlement.completions,
        "black_box_order": settlement.black_box_order,
        "white_box_order": settlement.white_box_order,
        "agreement": settlement.agreement,
        "ranks": settlement.ranks,
        "improved_completion": settlement.improved_completion,
        "failure": settlement.failure,
        "usage": None if settlement.usage is None else asdict(settlement.usage),
        "consistency": settlement.consistency,
    }


COLUMNS = ["step", "black_box_order", "agreement", "ranks", "failure", "usage"]
"""The columns of the log that a summary reads."""


CurvePoint = tuple[int, float]
"""A step, and the agreement of the rankings since the point before it."""


@dataclass(frozen=True, slots=True)
class Expense:
    """What some of the ranker's answers took.

    Args:
        answers: How many.
        prompt_tokens: Tokens sent.
        completion_tokens: Tokens received.
        cost: US dollars, of the answers whose price is known.
        priced: How many those are.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    priced: int = 0

    @property
    def tokens_text(self) -> str:
        """The tokens in words."""
        return f"{self.prompt_tokens:,} prompt, {self.completion_tokens:,} completion"

    @property
    def cost_text(self) -> str:
        """The cost in words. Where no price is known it is none, and never 0."""
        if self.priced == 0:
            return "unpriced"
        dollars = f"${self.cost:,.2f}" if self.cost >= 0.1 else f"${self.cost:.2g}"
        if self.priced == self.answers:
            return dollars
        return f"{dollars} for {self.priced:,} of {self.answers:,} answers, the others unpriced"


@dataclass(frozen=True, slots=True)
class InteractionSummary:
    """The sums of a log.

    Args:
        interactions: Rows.
        rankings: Those with a ranking.
        agreed: Rankings whose agreement is long enough for a demonstration.
        failures: Failed rankings by kind.
        skipped: Prompts that were not ranked, by why.
        billed: What the answers took that were paid for.
        cached: What those took that came from the cache, when they were first asked for.
        agreement: Per step, the share of completions that policy and ranker order alike, for each ranking.
    """

    interactions: int
    rankings: int
    agreed: int
    failures: Mapping[str, int]
    skipped: Mapping[str, int]
    billed: Expense
    cached: Expense
    agreement: Mapping[int, Sequence[float]]

    def curve(self, max_points: int) -> list[CurvePoint]:
        """The mean agreement over the run, in so many points at most; every ranking weighs the same in its point."""
        steps = sorted(self.agreement)
        size = max(1, math.ceil(len(steps) / max_points))
        parts = [steps[start : start + size] for start in range(0, len(steps), size)]
        return [(part[-1], fmean(rate for step in part for rate in self.agreement[step])) for part in parts]


def summarize(rows: Iterable[Mapping[str, Any]], min_agreement: int) -> InteractionSummary:
    """Adds up the rows of a log.

    Args:
        rows: With the columns `COLUMNS` at least.
        min_agreement: How many completions make a demonstration.
    """
    number = rankings = agreed = 0
    reasons: Counter[str] = Counter()
    agreement: defaultdict[int, list[float]] = defaultdict(list)
    usages: dict[bool, list[Mapping[str, Any]]] = {False: [], True: []}
    for row in rows:
        number += 1
        if row["failure"] is not None:
            reasons[row["failure"]] += 1
        if row["agreement"] is not None:
            rankings += 1
            agreed += len({row["ranks"][index] for index in row["agreement"]}) >= min_agreement  # ties show no order
            agreement[row["step"]].append(len(row["agreement"]) / len(row["black_box_order"]))
        if row["usage"] is not None:
            usages[row["usage"]["cached"]].append(row["usage"])
    return InteractionSummary(
        interactions=number,
        rankings=rankings,
        agreed=agreed,
        failures={reason: count for reason, count in reasons.items() if reason not in SKIPPED},
        skipped={reason: count for reason, count in reasons.items() if reason in SKIPPED},
        billed=_expense(usages[False]),
        cached=_expense(usages[True]),
        agreement=dict(agreement),
    )


def plot_agreement(curve: Sequence[CurvePoint], path: Path) -> None:
    """Draws the curve as a PNG. Needs `matplotlib`."""
    from matplotlib.figure import Figure  # without pyplot, which would keep the figure and ask for a display
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), marker="o", markersize=3)
    axes.set(xlabel="optimiser step", ylabel="agreement", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _expense(usages: Sequence[Mapping[str, Any]]) -> Expense:
    costs = [usage["cost"] for usage in usages if usage["cost"] is not None]
    return Expense(
        answers=len(usages),
        prompt_tokens=sum(usage["prompt_tokens"] for usage in usages),
        completion_tokens=sum(usage["completion_tokens"] for usage in usages),
        cost=math.fsum(costs),
        priced=len(costs),
    )


ExportType = Literal["preference", "ranked", "prompt-completion"]


def export_interactions(run: str | os.PathLike[str], to: ExportType = "preference") -> Dataset:
    """Turns the interaction log of a `CycleAlignTrainer` run into a dataset for another trainer.

    Interactions without a ranking are left out, and counted in `info.description`. Completions of a conversational
    prompt are lists of one assistant message.

    Args:
        run: The run's output directory.
        to: `"preference"`, for TRL's `DPOTrainer`: `prompt`, `chosen` (the top-ranked completion), `rejected` (the
            one ranked last; none where all are tied). `"ranked"`, for `RankingTrainer`: `prompt`, `completions`,
            `ranks` (equal where the ranker saw a tie). `"prompt-completion"`, for TRL's `SFTTrainer`: `prompt`,
            `completion` (the ranker's improved completion; the top-ranked one where there is none).

    Returns:
        One row per ranked interaction, in the order in which they were made.

    Raises:
        FileNotFoundError: If there is no log in the directory.
        ValueError: If `to` is none of these.

    Example:
        ```python
        DPOTrainer("org/policy", train_dataset=export_interactions("outputs/demo", "preference"))
        ```
    """
    if to not in get_args(ExportType):
        raise ValueError(f"to must be one of {get_args(ExportType)}, got {to!r}.")
    folder = Path(run) / "interactions"
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise FileNotFoundError(f"No interaction log in {folder}: name the output directory of a CycleAlign run.")
    entries = [entry for path in paths for entry in pq.read_table(path).to_pylist()]
    rows = [row for entry in entries if entry["ranks"] is not None and (row := _export_row(entry, to)) is not None]
    description = f"{folder}: {len(entries)} interactions, {len(rows)} exported as {to}"
    conversational = bool(entries) and isinstance(entries[0]["prompt"], list)
    features = _export_features(to, conversational)
    columns = {name: [row[name] for row in rows] for name in features}
    return Dataset.from_dict(columns, info=DatasetInfo(description=description, features=features))


def _export_row(entry: dict[str, Any], to: ExportType) -> dict[str, Any] | None:
    prompt, ranks = entry["prompt"], entry["ranks"]
    wrap = partial(as_completion, prompt)
    completions = [wrap(text) for text in entry["completions"]]
    best = ranks.index(min(ranks))
    if to == "ranked":
        return {"prompt": prompt, "completions": completions, "ranks": ranks}
    if to == "prompt-completion":
        improved = entry["improved_completion"]
        return {"prompt": prompt, "completion": completions[best] if improved is None else wrap(improved)}
    if min(ranks) == max(ranks):
        return None
    return {"prompt": prompt, "chosen": completions[best], "rejected": completions[ranks.index(max(ranks))]}


def _export_features(to: ExportType, conversational: bool) -> Features:
    text = text_feature(conversational)
    columns = {
        "preference": {"chosen": text, "rejected": text},
        "ranked": {"completions": List(text), "ranks": List(Value("int64"))},
        "prompt-completion": {"completion": text},
    }
    return Features({"prompt": text, **columns[to]})
