"""Checks and descriptions of data sets, and their first rows."""

import pytest
from datasets import Dataset, IterableDataset

from cyclealign_trl.training.dataset_checks import (
    check_map_style,
    column_names,
    describe_dataset,
    first_rows,
    named_datasets,
)

ROWS = [{"prompt": f"Q{number}", "topic": number} for number in range(5)]
DATASET = Dataset.from_list(ROWS)


def stream():
    return IterableDataset.from_generator(lambda: iter(ROWS))


def test_data_sets_are_named_after_their_arguments():
    assert list(named_datasets(None, None)) == []
    assert list(named_datasets("train", "eval")) == [("train_dataset", "train"), ("eval_dataset", "eval")]
    assert list(named_datasets(None, {"tea": 1, "milk": 2})) == [
        ("eval_dataset['tea']", 1),
        ("eval_dataset['milk']", 2),
    ]


def test_columns_of_data_sets_streams_and_lists():
    for dataset in (DATASET, stream(), ROWS):
        assert column_names(dataset) == {"prompt", "topic"}


def test_a_stream_raises():
    check_map_style("train_dataset", DATASET)
    with pytest.raises(ValueError, match="train_dataset is a stream, and the trainer needs a data set with a length"):
        check_map_style("train_dataset", stream())


def test_descriptions():
    assert describe_dataset(None) == "none"
    assert describe_dataset(DATASET) == "5 rows of `prompt`, `topic`"
    assert describe_dataset({"tea": DATASET, "milk": DATASET.select([0])}) == (
        "tea: 5 rows of `prompt`, `topic`; milk: 1 rows of `prompt`, `topic`"
    )
    assert describe_dataset(stream()) == "a stream of `prompt`, `topic`"


def test_first_rows():
    assert first_rows(DATASET, 2)["topic"][:] == [0, 1]
    assert len(first_rows(DATASET, 9)) == 5
    assert first_rows(DATASET, None) is DATASET
    assert first_rows(None, 2) is None
    assert {name: len(part) for name, part in first_rows({"a": DATASET, "b": DATASET}, 3).items()} == {"a": 3, "b": 3}
