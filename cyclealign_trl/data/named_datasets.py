"""Load data sets that are given by a name on the Hub, a folder or a file."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from . import hh_rlhf
from .formats import check_data_path, file_format


def load_named_splits(name: str, config: str | None, file_split: str, argument: str = "dataset_name") -> Any:
    """Load all splits of a data set on the Hub or in a folder, or one file as a split.

    Args:
        name: Name on the Hub, folder, or file (JSON, JSON lines, Parquet, CSV).
        config: Configuration of the data set. For HH-RLHF on the Hub, the subset. Has no effect on a file.
        file_split: Name of the split that a file is.
        argument: Argument that named the data set, for error messages.

    Raises:
        ValueError: If there is no such data set on the Hub, or it has no readable rows.
        FileNotFoundError: If a file or folder is missing.
    """
    try:
        check_data_path(name)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{str(error).rstrip('.')} (--{argument}).") from error
    reader = file_format(name)
    if reader is None:
        # The subsets of HH-RLHF are folders, not configurations.
        part = {"data_dir": config} if name == hh_rlhf.HUB_ID else {"name": config}
        return _load_dataset(name, **part)
    return _load_dataset(reader, data_files={file_split: name})


def select_split(splits: Any, name: str, argument: str) -> Dataset:
    """Return a split.

    Args:
        splits: All splits.
        name: Name of the split.
        argument: Argument that named the split, for error messages.

    Raises:
        ValueError: If there is no such split.
    """
    if name not in splits:
        raise ValueError(f"The dataset has no split {name!r} (--{argument}), only {', '.join(splits)}.")
    return splits[name]


def _load_dataset(path: str, **kwargs: Any) -> Any:
    try:
        return load_dataset(path, **kwargs)
    except (StopIteration, DatasetGenerationError) as error:  # no rows, or rows that cannot be read
        files = kwargs.get("data_files", path)
        raise ValueError(f"{files} has no readable rows: {error.__cause__ or error}") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(f"There is no folder {path}, and it cannot be loaded from the Hub: {error}") from error
