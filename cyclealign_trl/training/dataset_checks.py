"""Data sets of a trainer: checks before a run, their description in a model card, and their first rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import IterableDataset


def named_datasets(train_dataset: Any, eval_dataset: Any) -> Iterator[tuple[str, Any]]:
    """Yield each data set of a trainer with the name that messages call it by."""
    if train_dataset is not None:
        yield "train_dataset", train_dataset
    if isinstance(eval_dataset, Mapping):
        yield from ((f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items())
    elif eval_dataset is not None:
        yield "eval_dataset", eval_dataset


def column_names(dataset: Any) -> set[str]:
    """Return the columns of a data set of any kind."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:  # another map-style dataset, or a stream that has not read its columns yet
        columns = next(iter(dataset))
    return set(columns)


def check_has_rows(name: str, dataset: Any) -> None:
    """Raise an error if a data set has no rows, or is the name or the splits of one.

    Raises:
        TypeError: If `dataset` is a text or a mapping.
        ValueError: If it has no rows.
    """
    if isinstance(dataset, str):
        raise TypeError(
            f"{name} is the text {dataset!r}. Pass the data set, such as load_dataset({dataset!r}, split=...)."
        )
    if isinstance(dataset, Mapping):
        raise TypeError(f"{name} is a mapping of {', '.join(map(repr, dataset))}. Pass one of its data sets.")
    if hasattr(dataset, "__len__") and not len(dataset):
        raise ValueError(f"{name} has no rows. Check how it was loaded and filtered.")


def check_map_style(name: str, dataset: Any) -> None:
    """Raise `ValueError` if a data set is a stream."""
    if isinstance(dataset, (IterableDataset, torch.utils.data.IterableDataset)):
        raise ValueError(
            f"{name} is a stream, and the trainer needs a data set with a length. Load it without streaming=True, or "
            "take a part: Dataset.from_list(list(stream.take(1000)))."
        )


def describe_dataset(dataset: Any) -> str:
    """Return the number of rows and the columns of a data set, for the model card."""
    if dataset is None:
        return "none"
    if isinstance(dataset, Mapping):
        return "; ".join(f"{name}: {describe_dataset(part)}" for name, part in dataset.items())
    columns = ", ".join(f"`{name}`" for name in sorted(column_names(dataset)))
    return f"{len(dataset):,} rows of {columns}" if hasattr(dataset, "__len__") else f"a stream of {columns}"


def first_rows(dataset: Any, number: int | None) -> Any:
    """Return the first rows of a data set, or of each data set in a mapping. `None` returns all rows."""
    if number is None or dataset is None:
        return dataset
    if isinstance(dataset, Mapping):
        return {name: first_rows(part, number) for name, part in dataset.items()}
    return dataset.select(range(min(number, len(dataset))))
