"""Data sets in one file."""

from __future__ import annotations

import os
from pathlib import Path

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def reader_of(path: str | os.PathLike[str]) -> str | None:
    """What `datasets.load_dataset` calls the format that a file's name says; `None` for any other name."""
    return _READERS.get(Path(str(path).removesuffix(".gz")).suffix)
