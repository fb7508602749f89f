"""The log of a run's interactions: writing and reading it, what it adds up to, and its export as training data.

The log is a folder of Parquet files, which `datasets.load_dataset("parquet", ...)` reads too.
"""

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
from .agreement import agreement_rate, without_ties
from .interaction import SKIPPED, InteractionResult

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
_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "step": (pa.int64(), "optimiser steps before the interaction"),
    "interaction": (pa.int64(), "position in the cycle of its prompt, from 0"),
    "prompt": (pa.string(), "text or messages"),
    "completions": (pa.list_(pa.string()), "completions that the policy sampled"),
    "black_box_order": (
        _ORDER,
        "order of the ranker: indices into `completions`, best first; equal texts are named once",
    ),
    "white_box_order": (
        _ORDER,
        "order of the policy, by its own probabilities before the step; null if the ranker was not asked",
    ),
    "agreement": (_ORDER, "completions that both order alike, best first, at most one of each rank"),
    "ranks": (_ORDER, "rank of each completion by the ranker, 0 = best, equal for ties"),
    "improved_completion": (pa.string(), "better completion that the ranker or a corrector wrote"),
    "failure": (pa.string(), "reason why there is no ranking"),
    "usage": (_USAGE, "tokens, cost in US dollars if known, attempts, and whether the answer came from a cache"),
    "consistency": (pa.float64(), "agreement between several passes of the ranker, Kendall's tau-b from -1 to 1"),
}
COLUMN_DESCRIPTIONS: Mapping[str, str] = {name: description for name, (_, description) in _COLUMNS.items()}
SUMMARY_COLUMNS = ["step", "agreement", "ranks", "failure", "usage"]
"""Columns that `summarize` reads."""


# Writing and reading


def schema(conversational: bool) -> pa.Schema:
    """Return the Arrow schema of the log. Prompts are messages if `conversational`, else text."""
    types = {name: dtype for name, (dtype, _) in _COLUMNS.items()}
    return pa.schema({**types, "prompt": _MESSAGES if conversational else pa.string()})


class InteractionLog:
    """Log of interactions in `<output_dir>/interactions`, one file `step-NNNNNN-R.parquet` per step and process R.

    A file appears when it is complete, and is overwritten if a resumed run repeats its step.

    Args:
        output_dir: Output directory of the run.
        process_index: Index of this process, R.
    """

    def __init__(self, output_dir: str | os.PathLike[str], process_index: int = 0) -> None:
        self.folder = Path(output_dir) / "interactions"
        self._process_index = process_index

    def write(self, step: int, interaction: int, results: Sequence[InteractionResult]) -> None:
        """Write the results of one step, one per prompt of this process.

        Args:
            step: Optimiser steps before this one.
            interaction: Position in the cycle, from 0.
            results: The results.
        """
        rows = [_row(step, interaction, result) for result in results]
        conversational = isinstance(results[0].prompt, list)
        path = self.folder / f"step-{step:06d}-{self._process_index}.parquet"
        with atomic_write(path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema(conversational)), temporary)

    @property
    def paths(self) -> list[Path]:
        """Files of all processes, by step."""
        return sorted(self.folder.glob("*.parquet"))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the log of all processes, by step.

        Args:
            columns: Columns to read. `None` reads all.

        Raises:
            FileNotFoundError: If there is no log.
        """
        if not self.paths:
            raise FileNotFoundError(
                f"No interaction log in {self.folder}. Train first, or pass the output directory of a CycleAlign run."
            )
        return pa.concat_tables(pq.read_table(path, columns=columns) for path in self.paths)


def _row(step: int, interaction: int, result: InteractionResult) -> dict[str, Any]:
    return {
        "step": step,
        "interaction": interaction,
        "prompt": result.prompt,
        "completions": result.completions,
        "black_box_order": result.black_box_order,
        "white_box_order": result.white_box_order or None,
        "agreement": result.agreement,
        "ranks": result.ranks,
        "improved_completion": result.improved_completion,
        "failure": result.failure,
        "usage": None if result.usage is None else asdict(result.usage),
        "consistency": result.consistency,
    }


# Summary

CurvePoint = tuple[int, float]
"""A step, and the mean agreement of the rankings since the point before it."""


@dataclass(frozen=True, slots=True)
class Expense:
    """Tokens and cost of some of the ranker's answers.

    Args:
        answers: Number of answers.
        prompt_tokens: Tokens sent.
        completion_tokens: Tokens received.
        cost: US dollars, over the answers with a known price.
        priced: Number of answers with a known price.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    priced: int = 0

    @property
    def tokens_text(self) -> str:
        """Tokens as text."""
        return f"{self.prompt_tokens:,} prompt, {self.completion_tokens:,} completion"

    @property
    def cost_text(self) -> str:
        """Cost as text: `unpriced`, not 0, if no price is known."""
        if self.priced == 0:
            return "unpriced"
        dollars = f"${self.cost:,.2f}" if self.cost >= 0.1 else f"${self.cost:.2g}"
        if self.priced == self.answers:
            return dollars
        return f"{dollars} for {self.priced:,} of {self.answers:,} answers, the others unpriced"


@dataclass(frozen=True, slots=True)
class InteractionSummary:
    """Totals of a log.

    Args:
        interactions: Number of rows.
        rankings: Number of rows with a ranking.
        agreed: Number of rankings whose agreement made a demonstration.
        failures: Number of failed rankings by reason.
        tied: Number of rankings that prefer no completion.
        skipped: Number of prompts that were not ranked by reason.
        billed: Expense of the answers that were paid for.
        cached: Expense of the cached answers, when they were first asked for.
        agreement: By step, the agreement rate of each ranking.
    """

    interactions: int
    rankings: int
    agreed: int
    tied: int
    failures: Mapping[str, int]
    skipped: Mapping[str, int]
    billed: Expense
    cached: Expense
    agreement: Mapping[int, Sequence[float]]

    def curve(self, max_points: int) -> list[CurvePoint]:
        """Return the mean agreement over the run in up to `max_points` points, all rankings weighted alike."""
        steps = sorted(self.agreement)
        size = max(1, math.ceil(len(steps) / max_points))
        parts = [steps[start : start + size] for start in range(0, len(steps), size)]
        return [(part[-1], fmean(rate for step in part for rate in self.agreement[step])) for part in parts]


def summarize(rows: Iterable[Mapping[str, Any]], min_agreement: int) -> InteractionSummary:
    """Add up the rows of a log.

    Args:
        rows: Rows with at least the columns `SUMMARY_COLUMNS`.
        min_agreement: Number of completions that make a demonstration.
    """
    number = rankings = agreed = tied = 0
    reasons: Counter[str] = Counter()
    agreement: defaultdict[int, list[float]] = defaultdict(list)
    usages: dict[bool, list[Mapping[str, Any]]] = {False: [], True: []}
    for row in rows:
        number += 1
        if row["failure"] is not None:
            reasons[row["failure"]] += 1
        if row["ranks"] is not None:
            rankings += 1
            tied += len(set(row["ranks"])) < 2
        if row["agreement"] is not None and len(set(row["ranks"])) > 1:
            agreed += len(without_ties(row["agreement"], row["ranks"])) >= min_agreement
            agreement[row["step"]].append(agreement_rate(row["agreement"], row["ranks"]))
        if row["usage"] is not None:
            usages[row["usage"]["cached"]].append(row["usage"])
    return InteractionSummary(
        interactions=number,
        rankings=rankings,
        agreed=agreed,
        tied=tied,
        failures={reason: count for reason, count in reasons.items() if reason not in SKIPPED},
        skipped={reason: count for reason, count in reasons.items() if reason in SKIPPED},
        billed=_expense(usages[False]),
        cached=_expense(usages[True]),
        agreement=dict(agreement),
    )


def _expense(usages: Sequence[Mapping[str, Any]]) -> Expense:
    costs = [usage["cost"] for usage in usages if usage["cost"] is not None]
    return Expense(
        answers=len(usages),
        prompt_tokens=sum(usage["prompt_tokens"] for usage in usages),
        completion_tokens=sum(usage["completion_tokens"] for usage in usages),
        cost=math.fsum(costs),
        priced=len(costs),
    )


# Export

ExportType = Literal["preference", "ranked", "prompt-completion"]


def export_interactions(run: str | os.PathLike[str], to: ExportType = "preference") -> Dataset:
    """Turn the interaction log of a `CycleAlignTrainer` run into a data set for another trainer.

    Interactions without a ranking are left out, and counted in `info.description`. Completions of a conversational
    prompt are lists of one assistant message.

    Args:
        run: Output directory of the run.
        to: `"preference"`, for TRL's `DPOTrainer`: `prompt`, `chosen` (the completion that is ranked first) and
            `rejected` (the one that is ranked last). Rankings that tie all completions are left out. `"ranked"`, for
            `RankingTrainer`: `prompt`, `completions` and `ranks` (equal for ties). `"prompt-completion"`, for TRL's
            `SFTTrainer`: `prompt` and `completion` (the improved completion, or the one that is ranked first if there
            is none).

    Returns:
        One row per ranked interaction, in the order of the run.

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
    log = InteractionLog(run)
    entries = log.read().to_pylist()
    rows = [row for entry in entries if entry["ranks"] is not None and (row := _export_row(entry, to)) is not None]
    description = f"{log.folder}: {len(entries)} interactions, {len(rows)} exported as {to}"
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
