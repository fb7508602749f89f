"""Files of version 0.1.0, which `write.py` wrote, can be resumed and read."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cyclealign_trl import CachedRanker, export_interactions
from cyclealign_trl.models import transformers_backend
from tests.saved_run.write import (
    ANSWERS,
    CORRECTIONS,
    REQUESTS,
    LengthRanker,
    corrections,
    final_weights,
    judge,
    make_trainer,
    pairs,
)

FILES = Path(__file__).parent / "files"


@pytest.fixture
def saved(tmp_path):
    """Copy the files, because readers of a database can write to it."""
    return Path(shutil.copytree(FILES, tmp_path / "files"))


def test_a_saved_run_resumes(saved, monkeypatch):
    # The run sampled each micro-batch by itself, with the loop of `model.generate`.
    monkeypatch.setattr(transformers_backend, "can_decode", lambda *_: False)
    expected = json.loads((saved / "expected.json").read_text(encoding="utf-8"))
    ranker = LengthRanker()
    trainer = make_trainer(saved / "run", ranker, seed=1)  # other initial weights
    trainer.args.generation_batch_size = 1
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    for name, values in final_weights(trainer).items():
        assert torch.allclose(torch.tensor(values), torch.tensor(expected["weights"][name]), atol=1e-5), name
    assert trainer.demonstrations.state_dict() == expected["demonstrations"]
    rows = trainer.interaction_log.read().to_pylist()
    assert [{name: value for name, value in row.items() if name != "usage"} for row in rows] == expected["rows"]
    # The killed run had ranked at least the first micro-batch of the last step. Its answers come from the cache.
    assert len(ranker.requests) < 4


def test_a_saved_log_can_be_exported(saved):
    rows = export_interactions(saved / "run", "ranked")
    assert rows.column_names == ["prompt", "completions", "ranks"]
    assert len(rows) == 3 * 4 - 2  # two rankings of Question 3 failed


def test_stored_rankings_are_read(saved):
    cached = CachedRanker(judge(), saved / "judge.sqlite")
    answers = cached.rank(REQUESTS)  # no server listens at the judge's address
    for answer, stored in zip(answers, ANSWERS, strict=True):
        assert (answer.order, answer.ranks, answer.improved_completion) == (
            stored.order, stored.ranks, stored.improved_completion
        )  # fmt: skip
        assert (answer.consistency, answer.trimmed) == (stored.consistency, stored.trimmed)
        assert answer.usage.cached


def test_a_saved_ledger_is_continued(saved):
    budget = judge().budget
    budget.keep_ledger(saved / "spent")
    assert tuple(budget.committed) == (0.75, 25)


def test_stored_pairs_are_read(saved):
    stored = json.loads((saved / "pairs/batch-000000.json").read_text(encoding="utf-8"))
    assert list(pairs(saved / "pairs")) == [pair for pair in stored if "dropped" not in pair]


def test_stored_corrections_are_read(saved):
    rows = corrections(saved)
    assert list(rows["correction"]) == ["a better answer"] * len(CORRECTIONS[0])
