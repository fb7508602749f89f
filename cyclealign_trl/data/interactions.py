"""A run's interaction log as training data in TRL's formats: feedback paid for once serves other trainers too."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, List, Value

from ..types import as_completion

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
    rows = [row for entry in entries if entry["ranks"] is not None and (row := _row(entry, to)) is not None]
    description = f"{folder}: {len(entries)} interactions, {len(rows)} exported as {to}"
    conversational = bool(entries) and isinstance(entries[0]["prompt"], list)
    features = _features(to, conversational)
    columns = {name: [row[name] for row in rows] for name in features}
    return Dataset.from_dict(columns, info=DatasetInfo(description=description, features=features))


def _row(entry: dict[str, Any], to: ExportType) -> dict[str, Any] | None:
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


def _features(to: ExportType, conversational: bool) -> Features:
    string = Value("string")
    text = List({"role": string, "content": string}) if conversational else string
    columns = {
        "preference": {"chosen": text, "rejected": text},
        "ranked": {"completions": List(text), "ranks": List(Value("int64"))},
        "prompt-completion": {"completion": text},
    }
    return Features({"prompt": text, **columns[to]})
