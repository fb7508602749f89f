"""Data sets of corrections, and a loader for the published layout (arXiv 2402.02416)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, DatasetInfo, Features, Value, load_dataset

from ..data.drop_reports import dropped_rows
from ..data.formats import check_data_path, file_format, text_feature
from ..types import valid_text

HUB_ID = "aligner/aligner-20K"

CORRECTION_COLUMNS = ("prompt", "answer", "correction")
_PUBLISHED_COLUMNS = ("question", "answer", "correction")


def load_corrections(path: str | os.PathLike[str] = HUB_ID, split: str = "train") -> Dataset:
    """Load question-answer-correction rows from a file or the Hub.

    Args:
        path: JSON, JSON lines, Parquet or CSV file, optionally compressed as `.gz`; or a folder or name on the Hub.
        split: Split to load. A file has one split, `"train"`.

    Returns:
        Rows of `prompt`, `answer`, `correction`, as returned by `to_corrections`.

    Raises:
        FileNotFoundError: If the file or folder does not exist.
        ValueError: If the file is not of a supported type, the columns are wrong, or no row is usable.

    Example:
        ```python
        trainer = AlignerTrainer("Qwen/Qwen3-0.6B", train_dataset=load_corrections("aligner/aligner-20K"))
        ```
    """
    file_type = file_format(path)
    check_data_path(path)
    if file_type is None:
        return to_corrections(load_dataset(str(path), split=split))
    return to_corrections(load_dataset(file_type, data_files={"train": str(path)}, split=split))


def to_corrections(dataset: Dataset) -> Dataset:
    """Convert rows of the published layout to rows for `AlignerTrainer`.

    A data set with the columns of `AlignerTrainer` is returned unchanged. Otherwise rows with an empty `question`,
    `answer` or `correction` are dropped, and repeated rows too. `info.description` reports how many rows were dropped
    and why, and in how many of the others the correction equals the answer.

    Raises:
        ValueError: If the columns are wrong, or no row is usable.
    """
    if set(CORRECTION_COLUMNS) <= set(dataset.column_names):
        return dataset
    if not set(_PUBLISHED_COLUMNS) <= set(dataset.column_names):
        raise ValueError(
            f"Corrections need the columns 'question', 'answer' and 'correction' (the published layout), or 'prompt', "
            f"'answer' and 'correction', got {sorted(dataset.column_names)}."
        )
    rows: dict[tuple[str, ...], None] = {}
    dropped = Counter[str]()
    for row in dataset.select_columns([*_PUBLISHED_COLUMNS]):
        values = tuple(row[name] for name in _PUBLISHED_COLUMNS)
        reason = _empty_column(row) or ("repeated" if values in rows else None)
        if reason:
            dropped[reason] += 1
        else:
            rows[values] = None
    unchanged = sum(answer.strip() == correction.strip() for _, answer, correction in rows)
    report = f"{len(dataset)} rows, {len(rows)} kept, {unchanged} of them unchanged; {dropped_rows(dropped)}"
    if not rows:
        raise ValueError(f"No correction is usable: {report}.")
    return corrections_dataset([*rows], report)


def corrections_dataset(rows: list[tuple[Any, ...]], report: str) -> Dataset:
    """Return (prompt, answer, correction) rows as a data set with a report in `info.description`."""
    conversational = not isinstance(rows[0][0], str) if rows else False
    string = Value("string")
    features = Features({"prompt": text_feature(conversational), "answer": string, "correction": string})
    columns = {name: [_valid(row[index]) for row in rows] for index, name in enumerate(CORRECTION_COLUMNS)}
    return Dataset.from_dict(columns, info=DatasetInfo(description=report, features=features))


def _valid(value: Any) -> Any:
    """Return a value with valid text. Models behind an API can write characters that no file accepts."""
    return valid_text(value) if isinstance(value, str) else value


def _empty_column(row: Mapping[str, Any]) -> str | None:
    return next((f"empty_{name}" for name in _PUBLISHED_COLUMNS if not (row[name] or "").strip()), None)
