"""The log of a run's interactions: writing and reading it, and its export as training data.

The log is a folder of Parquet files, which `datasets.load_dataset("parquet", ...)` reads too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, List, Value

from .._files import atomic_write
from ..data.formats import text_feature
from ..training.run_file import read_run_file
from ..types import ExportType, as_completion
from .interaction import InteractionResult
from .log_files import LogFile, merge_full_block, read_files

logger = logging.getLogger(__name__)

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

# Writing and reading


def schema(conversational: bool) -> pa.Schema:
    """Return the Arrow schema of the log. Prompts are messages if `conversational`, else text."""
    types = {name: dtype for name, (dtype, _) in _COLUMNS.items()}
    return pa.schema({**types, "prompt": _MESSAGES if conversational else pa.string()})


class InteractionLog:
    """Log of interactions in `<output_dir>/interactions`.

    Process R writes a file `step-NNNNNN-R.parquet` per step, and merges its files of 32, 1,024, ... steps into one,
    `step-NNNNNN-MMMMMM-R.parquet`. A file appears when it is complete. If a resumed run repeats a step, its new rows
    replace the old ones.

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
        rows = [to_row(step, interaction, result) for result in results]
        conversational = isinstance(results[0].prompt, list)
        file = LogFile.of_steps(self.folder, step, step, self._process_index)
        with atomic_write(file.path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema(conversational)), temporary)
        merge_full_block(self.folder, step, self._process_index)

    @property
    def paths(self) -> list[Path]:
        """Files of all processes, by their first step."""
        return sorted(self.folder.glob("*.parquet"))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the log of all processes, by step.

        Args:
            columns: Columns to read. `None` reads all.

        Raises:
            FileNotFoundError: If there is no log.
        """
        paths: list[Path] | None = None
        while paths != (current := self.paths) and current:
            paths = current
            try:
                table = read_files(paths, columns)
            except FileNotFoundError:  # another process has merged some of the files since they were listed
                continue
            self._warn_of_missing(paths)
            return table
        raise FileNotFoundError(
            f"No interaction log in {self.folder}. Train first, or pass the output directory of a CycleAlign run."
        )

    def _warn_of_missing(self, paths: Sequence[Path]) -> None:
        """Warn of processes of the run that wrote to the directory of another machine."""
        files = [file for file in map(LogFile.from_path, paths) if file is not None]
        run = read_run_file(self.folder.parent)
        if run is None or not files:
            return
        missing = sorted(set(range(run["processes"])) - {file.process_index for file in files})
        if missing:
            logger.warning(
                "%s has no interactions of processes %s, of %d in the run. If its machines had separate output "
                "directories, copy the files in their `interactions` folders here.",
                self.folder,
                ", ".join(map(str, missing)),
                run["processes"],
            )


def to_row(step: int, interaction: int, result: InteractionResult) -> dict[str, Any]:
    """Return a result as a row of the log."""
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


# Export


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
