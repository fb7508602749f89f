"""Sampling one optimiser step ahead of training."""

import threading

import pytest
import torch

from cyclealign_trl.types import prompt_key
from tests.cycle.stubs import DigestGeneration, DigestRanker, make_trainer, prompts, read_log


class RecordingGeneration(DigestGeneration):
    """Record the step of each call and the policy's weights at that time."""

    def __init__(self, events):
        super().__init__()
        self.events = events
        self.trainer = None

    def generate(self, model, prompt_ids):
        self.events.append(("sample", self.trainer.state.global_step))
        return super().generate(model, prompt_ids)


class RecordingRanker(DigestRanker):
    def __init__(self):
        super().__init__()
        self.demonstrations = {}

    def answer(self, request):
        self.demonstrations.setdefault(prompt_key(request.prompt), []).append(request.demonstrations)
        return super().answer(request)


def record(tmp_path, ranker=None, **settings):
    events = []
    trainer = make_trainer(tmp_path, ranker, dataset=prompts(4), num_interactions=2, **settings)
    trainer.generation = RecordingGeneration(events)
    trainer.generation.trainer = trainer
    loss = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        events.append(("train", trainer.state.global_step))
        return loss(*args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    return trainer, events


def test_the_next_step_is_sampled_before_training_on_this_one(tmp_path):
    _, events = record(tmp_path / "on", ranking_lookahead=1)
    _, on_policy = record(tmp_path / "off")
    assert on_policy == [(what, step) for step in range(4) for what in ("sample", "train")]
    # The first call of step 0 samples for itself. No step samples beyond the end of the run.
    assert events == [
        ("sample", 0),
        *[(what, step) for step in range(3) for what in ("sample", "train")],
        ("train", 3),
    ]


def test_each_epoch_starts_without_rollouts_ahead(tmp_path):
    _, events = record(tmp_path, ranking_lookahead=1, num_train_epochs=2)
    samples = [step for what, step in events if what == "sample"]
    assert samples == [0, 0, 1, 2, 4, 4, 5, 6]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_log_has_the_same_prompts_and_completions(tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2 // accumulation}
    record(tmp_path / "on", ranking_lookahead=1, **settings)
    record(tmp_path / "off", **settings)
    columns = ("step", "interaction", "prompt", "completions", "black_box_order")
    ahead, on_policy = ([[row[name] for name in columns] for row in read_log(tmp_path / run)] for run in ("on", "off"))
    assert ahead == on_policy


@pytest.mark.parametrize("scope", ["prompt", "run"])
def test_demonstrations_are_one_step_older(tmp_path, scope):
    ranker = RecordingRanker()
    trainer = make_trainer(
        tmp_path, ranker, dataset=prompts(2), num_interactions=4, stub_generation=True, demonstration_scope=scope,
        ranking_lookahead=1,
    )  # fmt: skip
    trainer.train()
    static = len(trainer.demonstrations.static)
    rows = read_log(tmp_path)
    for prompt, shown in ranker.demonstrations.items():
        known = [
            sum(row["agreement"] is not None and len(row["agreement"]) > 1 for row in rows
                if row["step"] < step - 1 and (scope == "run" or prompt_key(row["prompt"]) == prompt))
            for step in range(4)
        ]  # fmt: skip
        assert [len(demonstrations) - static for demonstrations in shown] == known
    assert len(trainer.demonstrations.static) < max(map(len, ranker.demonstrations[prompt]))


def test_a_window_starts_without_what_is_known_of_the_one_before(tmp_path):
    # Three prompts in windows of two: the last window repeats a prompt of the first.
    trainer = make_trainer(
        tmp_path, dataset=prompts(3), num_interactions=2, stub_generation=True, stop_on_agreement=True,
        ranking_lookahead=1,
    )  # fmt: skip
    trainer.train()
    for row in read_log(tmp_path):
        assert row["interaction"] > 0 or row["failure"] is None


def test_the_ranker_has_a_whole_step_to_answer(tmp_path):
    started, release = [], threading.Event()

    class BlockedRanker(DigestRanker):
        def rank(self, requests):
            started.append(requests)
            if len(started) > 1:  # the requests of the second step are answered once the first step has ended
                assert release.wait(60)
            return super().rank(requests)

    trainer = make_trainer(
        tmp_path, BlockedRanker(), dataset=prompts(2), num_interactions=2, stub_generation=True, ranking_lookahead=1
    )
    close = trainer._close_interaction

    def close_and_release():
        close()
        release.set()

    trainer._close_interaction = close_and_release
    trainer.train()
    assert [row["failure"] for row in read_log(tmp_path)] == [None] * 4


def test_an_evaluation_does_not_take_rollouts_that_are_ahead(tmp_path):
    settings = {"eval_dataset": prompts(2), "eval_strategy": "steps", "eval_steps": 1, "ranking_lookahead": 1}
    trainer, events = record(tmp_path, **settings)
    assert [step for what, step in events if what == "sample"] == [0, 0, 1, 1, 2, 2, 3, 4]
    assert trainer.state.global_step == 4
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
