"""Accuracy of a judge in the course of a run, with the demonstrations that the run has found."""

from contextlib import suppress

import pytest

from cyclealign_trl import Demonstration, RankingAccuracyCallback, RankingResult, Usage
from cyclealign_trl.cycle.demonstrations import DEFAULT
from tests.cycle.stubs import DigestRanker, assert_same_weights, make_trainer, prompts, weights
from tests.evaluation.stubs import brute_force_agreement, make_rows
from tests.evaluation.test_win_rate_callback import InterruptAt, Interrupted, rates, untimed

ROWS = [{**row, "topic": "held out"} for row in make_rows(6, size=3)]
NAME = "ranking_accuracy/"


class Learner(DigestRanker):
    """Rank held-out rows by length: with dynamic demonstrations rightly, with static ones in reverse, else tied."""

    usage = Usage(10, 2, cost=0.25)

    def answer(self, request):
        if request.metadata["topic"] != "held out":
            return super().answer(request)
        lengths = [len(text) for text in request.completions]
        kind = len(request.demonstrations) - request.num_static
        keys = [-length if kind else length for length in lengths] if request.demonstrations else [0] * len(lengths)
        ranks = [sum(other < key for other in keys) for key in keys]
        return RankingResult(tuple(sorted(range(len(keys)), key=ranks.__getitem__)), tuple(ranks), usage=self.usage)

    @property
    def held_out(self):
        return [request for request in self.requests if request.metadata["topic"] == "held out"]


def add_accuracy(trainer, ranker=None, eval_steps=2, dataset=ROWS, **settings):
    trainer.add_callback(RankingAccuracyCallback(ranker or trainer.ranker, trainer, dataset, eval_steps, **settings))


def test_accuracy_under_each_condition(tmp_path):
    ranker = Learner()
    trainer = make_trainer(tmp_path, ranker)
    add_accuracy(trainer)
    trainer.train()
    logs = rates(trainer, NAME)
    assert [log["step"] for log in logs] == [2, 4, 6, 8]
    references = [row["ranks"] for row in ROWS]
    sizes = [[len(text) for text in row["completions"]] for row in ROWS]
    for condition, predictions in (
        ("full", [[sorted(size, reverse=True).index(length) for length in size] for size in sizes]),
        ("without_d2", [[sorted(size).index(length) for length in size] for size in sizes]),
        ("without_icl", [[0] * len(size) for size in sizes]),
    ):
        tied = condition == "without_icl"  # has no Kendall's tau
        expected = (
            {"pairwise_accuracy": 0.5, "exact_match": 0} if tied else brute_force_agreement(predictions, references)
        )
        for log in logs:
            assert log[NAME + condition] == pytest.approx(expected["pairwise_accuracy"])
            assert log[f"{NAME}{condition}_exact_match"] == pytest.approx(expected["exact_match"])
            assert log[f"{NAME}{condition}_low"] <= log[NAME + condition] <= log[f"{NAME}{condition}_high"]
    # The conditions without dynamic demonstrations are the same in each evaluation, and paid for once.
    assert [log[NAME + "requests"] for log in logs] == [18, 6, 6, 6]
    assert [log.get(NAME + "cached", 0) for log in logs] == [0, 12, 12, 12]
    assert logs[0][NAME + "cost"] == 18 * 0.25
    assert all(log[NAME + "failed"] == 0 for log in logs)


def test_the_demonstrations_are_those_that_the_step_is_shown(tmp_path):
    ranker = Learner()
    trainer = make_trainer(tmp_path, ranker, num_interactions=3, per_device_train_batch_size=4, max_steps=3)
    add_accuracy(trainer, eval_steps=3)
    trainer.train()
    assert len(trainer.demonstrations) == 0  # the window has ended
    (step,) = [ranker.requests[start : start + 4] for start in range(0, 12, 4)][2:]  # of the last interaction
    in_training = {request.demonstrations[1:] for request in step if len(request.demonstrations) > 1}
    assert in_training
    held_out = [request.demonstrations for request in ranker.held_out]
    full = held_out[::3]
    assert {demonstrations[1:] for demonstrations in full} == in_training
    assert all(demonstrations[0] == DEFAULT for demonstrations in full)
    assert held_out[1::3] == [(DEFAULT,)] * 6
    assert held_out[2::3] == [()] * 6


@pytest.mark.parametrize(("scope", "eval_steps"), [("prompt", 1), ("run", 1)])
def test_conditions_without_a_difference_are_ranked_once(tmp_path, scope, eval_steps):
    ranker = Learner()
    trainer = make_trainer(tmp_path, ranker, demonstration_scope=scope, max_steps=1)
    add_accuracy(trainer, eval_steps=eval_steps)
    trainer.train()
    assert len(ranker.held_out) == 12  # the first step has no dynamic demonstrations
    (log,) = rates(trainer, NAME)
    assert log[NAME + "full"] == log[NAME + "without_d2"]


def test_every_group_sees_all_demonstrations_of_a_pool_of_the_run(tmp_path):
    ranker = Learner()
    trainer = make_trainer(tmp_path, ranker, demonstration_scope="run", max_demonstrations=3, max_steps=4)
    add_accuracy(trainer, eval_steps=4)
    trainer.train()
    full = [request.demonstrations for request in ranker.held_out[::3]]
    assert len(full) == 6
    assert len(set(full)) == 1
    assert len(full[0]) == 4


def test_a_run_trains_alike_and_resumes(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "num_interactions": 4, "max_steps": 8}

    def run(folder, interrupted_at=None, resume=None, measured=True):
        ranker = Learner()
        trainer = make_trainer(folder, ranker, **settings)
        if measured:
            add_accuracy(trainer)
        trainer.add_callback(InterruptAt(interrupted_at))
        with suppress(Interrupted):
            trainer.train(resume_from_checkpoint=resume)
        return trainer, ranker

    plain, _ = run(tmp_path / "plain", measured=False)
    whole, whole_ranker = run(tmp_path / "whole")
    _, first = run(tmp_path / "parts", interrupted_at=5)
    resumed, second = run(tmp_path / "parts", resume=True)
    assert_same_weights(weights(plain), weights(whole))
    assert_same_weights(weights(resumed), weights(whole))
    assert [log["step"] for log in rates(whole, NAME)] == [2, 4, 6, 8]
    assert untimed(resumed.state.log_history[:-1]) == untimed(whole.state.log_history[:-1])
    assert len(first.held_out) + len(second.held_out) == len(whole_ranker.held_out)


def test_patience_ends_a_run(tmp_path):
    trainer = make_trainer(tmp_path, Learner())
    add_accuracy(trainer, patience=2)
    trainer.train()
    assert [log["step"] for log in rates(trainer, NAME)] == [2, 4, 6]  # the accuracy is the same at each


def test_failures_are_counted_and_left_out(tmp_path):
    ranker = Learner(fail=lambda request: "timeout" if request.prompt == "Question 0?" else None)
    ranker.answer = lambda request: (
        DigestRanker.answer(ranker, request) if ranker.fail(request) else Learner.answer(ranker, request)
    )
    trainer = make_trainer(tmp_path, ranker, max_steps=2)
    add_accuracy(trainer)
    trainer.train()
    (log,) = rates(trainer, NAME)
    assert log[NAME + "failed"] == 3
    assert 0 <= log[NAME + "full"] <= 1


def test_wrong_use_raises(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"No row of dataset has a reference order; dropped rows: \{'all_tied': 1\}"):
        RankingAccuracyCallback(
            trainer.ranker, trainer, [{"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 0]}], 2
        )
    with pytest.raises(TypeError, match="needs a CycleAlignTrainer, which collects demonstrations, got object"):
        RankingAccuracyCallback(trainer.ranker, object(), ROWS, 2)


def test_groups_of_the_pool(tmp_path):
    pool = make_trainer(tmp_path, dataset=prompts(2)).demonstrations
    pool.observe([Demonstration(f"Q{i % 2}", (f"a{i}", "b"), (0, 1)) for i in range(3)])
    assert [[demo.completions[0] for demo in group] for group in pool.groups()] == [["a0", "a2"], ["a1"]]
    pool.forget(["Q0"])
    assert len(pool.groups()) == 1
