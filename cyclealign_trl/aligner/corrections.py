"""Corrections of answers: the published layout (arXiv 2402.02416) as rows for `AlignerTrainer`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, Features, Value, load_dataset

from ..data.drop_reports import dropped_rows
from ..data.files import reader_of
from ..data.formats import text_feature

HUB_ID = "aligner/aligner-20K"

COLUMNS = ("prompt", "answer", "correction")
_PUBLISHED = ("question", "answer", "correction")


def load_corrections(path: str | os.PathLike[str] = HUB_ID, split: str = "train") -> Dataset:
    """Loads question-answer-correction rows, from a file or the Hub.

    Args:
        path: A JSON, JSON lines, Parquet or CSV file, also with `.gz`; or a folder or a name on the Hub.
        split: The split; of a file, all is `"train"`.

    Returns:
        Rows of `prompt`, `answer`, `correction`, as `to_corrections` makes them.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If it has other columns, or no row of use.

    Example:
        ```python
        trainer = AlignerTrainer("Qwen/Qwen3-0.6B", train_dataset=load_corrections("aligner/aligner-20K"))
        ```
    """
    reader = reader_of(path)
    if reader is None:
        return to_corrections(load_dataset(str(path), split=split))
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return to_corrections(load_dataset(reader, data_files={"train": str(path)}, split=split))


def to_corrections(dataset: Dataset) -> Dataset:
    """Turns rows of the published layout into rows for `AlignerTrainer`; such rows themselves stay as they are.

    Left out are rows with an empty `question`, `answer` or `correction`, and repeated rows; how many, and in how many
    of those that are kept the answer is its own correction, is said in `info.description`.

    Raises:
        ValueError: If there are other columns, or no row is left.
    """
    if set(COLUMNS) <= set(dataset.column_names):
        return dataset
    if not set(_PUBLISHED) <= set(dataset.column_names):
        raise ValueError(
            f"Corrections have the columns 'question', 'answer' and 'correction' as published, or 'prompt', 'answer' "
            f"and 'correction'; there are {sorted(dataset.column_names)}."
        )
    rows: dict[tuple[str, ...], None] = {}
    dropped = Counter[str]()
    for row in dataset.select_columns([*_PUBLISHED]):
        reason = _useless(row) or ("repeated" if tuple(row[name] for name in _PUBLISHED) in rows else None)
        if reason:
            dropped[reason] += 1
        else:
            rows[tuple(row[name] for name in _PUBLISHED)] = None
    unchanged = sum(answer.strip() == correction.strip() for _, answer, correction in rows)
    report = f"{len(dataset)} rows, {len(rows)} kept, {unchanged} of them unchanged; {dropped_rows(dropped)}"
    if not rows:
        raise ValueError(f"No correction is left of {report}.")
    return corrections_dataset([*rows], report)


def corrections_dataset(rows: list[tuple[Any, ...]], report: str) -> Dataset:
    """Rows of prompt (text or messages), answer and correction as a data set."""
    conversational = not isinstance(rows[0][0], str) if rows else False
    string = Value("string")
    features = Features({"prompt": text_feature(conversational), "answer": string, "correction": string})
    columns = {name: [row[index] for row in rows] for index, name in enumerate(COLUMNS)}
    return Dataset.from_dict(columns, info=DatasetInfo(description=report, features=features))


def _useless(row: Mapping[str, Any]) -> str | None:
    return next((f"empty_{name}" for name in _PUBLISHED if not (row[name] or "").strip()), None)
