"""Loading published corrections."""

import gzip
import json

import pytest
from datasets import Dataset

from cyclealign_trl import load_corrections
from cyclealign_trl.aligner import corrections
from cyclealign_trl.aligner.corrections import to_corrections

PUBLISHED = [
    {"question": "Why?", "answer": "No.", "correction": "Because.", "source": "x"},
    {"question": "Why?", "answer": "No.", "correction": "Because.", "source": "again"},
    {"question": "How?", "answer": "So.", "correction": "So. ", "source": "x"},
    {"question": "", "answer": "No.", "correction": "Yes.", "source": "x"},
    {"question": "What?", "answer": "No.", "correction": None, "source": "x"},
]
REPORT = "5 rows, 2 kept, 1 of them unchanged; dropped: empty_correction 1, empty_question 1, repeated 1"
ROWS = [
    {"prompt": "Why?", "answer": "No.", "correction": "Because."},
    {"prompt": "How?", "answer": "So.", "correction": "So. "},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"])
def test_loads_a_file_in_the_published_layout(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        Dataset.from_list(PUBLISHED).to_parquet(path)
    else:
        text = json.dumps(PUBLISHED) if name == "rows.json" else "".join(json.dumps(row) + "\n" for row in PUBLISHED)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    dataset = load_corrections(path)
    assert dataset.to_list() == ROWS
    assert dataset.info.description == REPORT


def test_loads_the_published_data_set_from_the_hub_by_default(monkeypatch):
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_list(PUBLISHED)

    monkeypatch.setattr(corrections, "load_dataset", load)
    assert load_corrections().to_list() == ROWS
    assert calls == [(("aligner/aligner-20K",), {"split": "train"})]


def test_returns_rows_of_the_trainer_unchanged():
    dataset = Dataset.from_list(ROWS)
    assert to_corrections(dataset) is dataset


def test_unusable_data_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere\.jsonl"):
        load_corrections(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"got \['question', 'text'\]"):
        to_corrections(Dataset.from_list([{"question": "Why?", "text": "No."}]))
    with pytest.raises(ValueError, match="No correction is usable: 1 rows, 0 kept"):
        to_corrections(Dataset.from_list(PUBLISHED[3:4]))
