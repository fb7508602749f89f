"""The commands take HH-RLHF as it is published, from the Hub or from a file."""

import json

import pytest
from datasets import Dataset, DatasetDict

from cyclealign_trl.cli import main
from cyclealign_trl.data import named_datasets
from tests.scripts.test_train import STUB, policy, run_yaml  # noqa: F401 (fixtures)


@pytest.fixture
def rows():
    return [
        {"chosen": f"\n\nHuman: {index}?\n\nAssistant: I am", "rejected": f"\n\nHuman: {index}?\n\nAssistant: I was"}
        for index in range(4)
    ]


@pytest.fixture(params=["file", "Hub"])
def dataset_name(request, tmp_path, rows, monkeypatch):
    if request.param == "file":
        path = tmp_path / "helpful-base.train.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return [str(path)]

    def load(path, **kwargs):
        assert (path, kwargs) == ("Anthropic/hh-rlhf", {"data_dir": "helpful-base"})
        return DatasetDict(train=Dataset.from_list(rows))

    monkeypatch.setattr(named_datasets, "load_dataset", load)
    return ["Anthropic/hh-rlhf", "--dataset_config", "helpful-base"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", STUB.split()),
        ("train-ranked", []),
        ("dlma", ["--max_prompt_length", "128", "--positive", "kind", "--negative", "rude"]),
        ("dlma", ["--margin_weight", "0"]),
    ],
)
def test_a_command_trains_on_published_dialogues(run_yaml, dataset_name, command, options, capfd):  # noqa: F811
    main([command, "--config", str(run_yaml), "--max_steps", "1", "--dataset_name", *dataset_name, *options])
    assert "Model saved" in capfd.readouterr().out


@pytest.mark.parametrize("num_samples", ["0", "2"])
def test_an_estimate_reads_published_dialogues(run_yaml, dataset_name, num_samples, capfd):  # noqa: F811
    main(["estimate", "--config", str(run_yaml), "--dataset_name", *dataset_name, "--num_samples", num_samples,
          *STUB.split()])  # fmt: skip
    assert "Optimiser steps: 9" in capfd.readouterr().out
