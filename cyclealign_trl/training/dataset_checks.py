"""What every trainer checks of its data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import IterableDataset


def named_datasets(train: Any, evaluation: Any) -> Iterator[tuple[str, Any]]:
    if train is not None:
        yield "train_dataset", train
    if isinstance(evaluation, Mapping):
        yield from ((f"eval_dataset[{name!r}]", dataset) for name, dataset in evaluation.items())
    elif evaluation is not None:
        yield "eval_dataset", evaluation


def check_no_stream(name: str, dataset: Any) -> None:
    if isinstance(dataset, (IterableDataset, torch.utils.data.IterableDataset)):
        raise ValueError(
            f"{name} is a stream. Load it without streaming=True, or take a part: "
            "Dataset.from_list(list(stream.take(1000)))."
        )


def dataset_size(dataset: Any) -> str:
    """How many rows of which columns, for the card."""
    if dataset is None:
        return "none"
    if isinstance(dataset, Mapping):
        return "; ".join(f"{name}: {dataset_size(part)}" for name, part in dataset.items())
    columns = ", ".join(f"`{name}`" for name in sorted(column_names(dataset)))
    return f"{len(dataset):,} rows of {columns}" if hasattr(dataset, "__len__") else f"a stream of {columns}"


def column_names(dataset: Any) -> set[str]:
    """The columns of any kind of data set."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:  # any other map-style dataset, or a stream that does not know its columns yet
        columns = next(iter(dataset))
    return set(columns)
