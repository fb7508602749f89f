"""Runs that are interrupted within the process and resumed, and runs in the folder of an earlier one."""

import json
import logging

import pytest
from transformers import TrainerCallback

from cyclealign_trl import CheckpointError
from tests.conftest import make_model
from tests.cycle.stubs import DigestRanker, assert_same_weights, make_trainer, prompts, read_log, weights


class Interrupted(BaseException):
    """Not an `Exception`, so that nothing handles it."""


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


class Steps(TrainerCallback):
    """List the optimiser steps that a trainer takes."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


def steps_of(trainer):
    """Return a list that the trainer's next optimiser steps are added to."""
    callback = Steps()
    trainer.add_callback(callback)
    return callback.seen


@pytest.mark.parametrize(
    ("interrupted_at", "scope", "lookahead"),
    [(3, "prompt", 0), (4, "run", 0), (13, "prompt", 0), (15, "run", 0), (3, "run", 1), (5, "prompt", 1),
     (8, "prompt", 1), (13, "run", 1)],
)  # fmt: skip
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, interrupted_at, scope, lookahead):
    # 8 steps per epoch: interruptions within an epoch, at its end, and in the second one. A checkpoint every 2 steps.
    settings = {
        "num_train_epochs": 2,
        "num_interactions": 4,
        "gradient_accumulation_steps": 2,
        "demonstration_scope": scope,
        "stop_on_agreement": True,
        "ranking_lookahead": lookahead,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    whole = make_trainer(tmp_path / "whole", eval_dataset=prompts(2), **settings)
    whole.train()

    folder = tmp_path / "parts"
    with pytest.raises(Interrupted):
        make_trainer(folder, eval_dataset=prompts(2), callbacks=[InterruptAt(interrupted_at)], **settings).train()
    resumed = make_trainer(folder, model=make_model(seed=5), eval_dataset=prompts(2), **settings)
    resumed.train(resume_from_checkpoint=True)

    assert_same_weights(weights(resumed), weights(whole))
    assert resumed.demonstrations.state_dict() == whole.demonstrations.state_dict()
    untimed = [[{**row, "usage": None} for row in read_log(run)] for run in (folder, tmp_path / "whole")]
    assert len(untimed[0]) == 16 * 4
    assert untimed[0] == untimed[1]
    timed = ("time", "runtime", "per_second", "ranker/", "preparation")
    logs = [
        [{name: value for name, value in log.items() if not any(word in name for word in timed)} for log in history]
        for history in (resumed.state.log_history[:-1], whole.state.log_history[:-1])
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_resumed_run_pays_for_no_ranking_twice(tmp_path, lookahead):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_interactions": 3, "ranking_lookahead": lookahead}
    with pytest.raises(Interrupted):
        make_trainer(tmp_path, callbacks=[InterruptAt(7)], **settings).train()
    ranker = DigestRanker()
    make_trainer(tmp_path, ranker, **settings).train(resume_from_checkpoint=True)
    assert len(ranker.requests) == (12 - 7 - lookahead) * 2  # the other steps were ranked before
    cached = [row["usage"]["cached"] for row in read_log(tmp_path)][12:]
    assert cached == [True] * 2 * (1 + lookahead) + [False] * 2 * (5 - lookahead)


def test_a_new_run_renames_the_log_of_an_earlier_one(tmp_path):
    for number in range(3):
        make_trainer(tmp_path, dataset=prompts(2), max_steps=number + 1).train()
    kept = {path.name: len(list(path.iterdir())) for path in tmp_path.glob("interactions*")}
    assert kept == {"interactions-1": 1, "interactions-2": 2, "interactions": 3}


def test_an_incomplete_checkpoint_is_not_resumed(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    newest = tmp_path / "checkpoint-8"
    (newest / "cyclealign.complete").unlink()
    resumed = make_trainer(tmp_path, save_strategy="steps", save_steps=3)
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint: .*the run was killed while it was written"):
        resumed.train(resume_from_checkpoint=str(newest))
    steps = steps_of(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert steps == [7, 8]


@pytest.mark.parametrize("max_steps", [3, 4])  # in the middle of a window, and at its end
def test_a_finished_run_takes_no_step_when_resumed(tmp_path, max_steps):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": max_steps}
    finished = make_trainer(tmp_path, **settings)
    finished.train()
    resumed = make_trainer(tmp_path, model=make_model(seed=5), **settings)
    steps = steps_of(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert steps == []
    assert resumed.state.global_step == max_steps
    assert_same_weights(weights(resumed), weights(finished))


def test_checkpoints_of_an_earlier_run_are_resumed_only_by_name(tmp_path, caplog):
    make_trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=6).train()
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    assert sum("belongs to an earlier run" in message for message in caplog.messages) == 2
    resumed = make_trainer(tmp_path)
    steps = steps_of(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert steps[0] == 3
    named = make_trainer(tmp_path)
    steps = steps_of(named)
    named.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert steps == [7, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 2 and is 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"num_interactions": 4}, "num_interactions was 2 and is 4"),
        ({"seed": 7, "data_seed": 3}, "seed was 42 and is 7; data_seed was 42 and is 3"),
        ({"dataset": prompts(6)}, "rows of train_dataset was 8 and is 6"),
        ({"demonstration_scope": "run"}, "scope 'prompt' .* scope 'run'"),
    ],
)
def test_changed_settings_that_decide_the_order_of_rows_raise(tmp_path, changes, message):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    resumed = make_trainer(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        resumed.train(resume_from_checkpoint=True)


def test_other_settings_can_change(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    resumed = make_trainer(tmp_path, loss_type="rrhf", learning_rate=1e-4, num_generations=4)
    steps = steps_of(resumed)
    resumed.train(resume_from_checkpoint="true")  # as a command line passes it
    assert steps == list(range(2, 9))


def test_resuming_without_a_checkpoint_raises(tmp_path):
    with pytest.raises(CheckpointError, match="there is nothing to resume from"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_state_is_saved_as_json(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    state = json.loads((tmp_path / "checkpoint-1" / "cyclealign-0.json").read_text())
    assert set(state) == {"version", "settings", "state"}
    assert set(state["state"]) == {"demonstrations", "agreed", "totals"}
