"""Win rates in the course of a run: verdicts, cost, patience, resumed runs, and runs on two processes."""

import json
import logging
from contextlib import closing

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from cyclealign_trl import (
    CheckpointError,
    FunctionRanker,
    JuryRanker,
    LLMRanker,
    RankerError,
    RankingConfig,
    RankingFailure,
    RankingResult,
    RankingTrainer,
    TooManyFailuresError,
    Usage,
    WinRateCallback,
)
from cyclealign_trl.chat.budget import Budget, Prices
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import DigestRanker, assert_same_weights, make_trainer, prompts, weights

HELD_OUT = prompts(12).select(range(8, 12))


class Judge:
    """Compare texts by a key, largest first; equal keys are a tie."""

    fingerprint = "judge"

    def __init__(self, key=None, usage=None):
        self.key, self.usage = key or (lambda request, text: text), usage
        self.requests = []

    def rank(self, requests):
        self.requests.extend(requests)
        return [self.answer(request) for request in requests]

    def answer(self, request):
        keys = [self.key(request, text) for text in request.completions]
        ranks = [sum(other > key for other in keys) for key in keys]
        return RankingResult(tuple(sorted(range(len(keys)), key=ranks.__getitem__)), tuple(ranks), usage=self.usage)


def add_win_rate(trainer, ranker=None, eval_steps=2, dataset=HELD_OUT, **settings):
    callback = WinRateCallback(ranker or Judge(), trainer, dataset, eval_steps, **settings)
    trainer.add_callback(callback)
    return callback


def rates(trainer, name="win_rate/"):
    return [
        {key: value for key, value in log.items() if key.startswith(name) or key == "step"}
        for log in trainer.state.log_history
        if any(key.startswith(name) for key in log)
    ]


def comparisons(folder, step):
    lines = (folder / "win_rate" / "completions" / f"step-{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def untimed(history):
    words = ("time", "runtime", "per_second", "requests", "tokens", "cached", "cost", "preparation", "total_flos")
    return [{key: value for key, value in log.items() if not any(word in key for word in words)} for log in history]


def test_a_run_with_the_callback_trains_like_one_without_it(tmp_path):
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    watched = make_trainer(tmp_path / "watched")
    add_win_rate(watched, watched.ranker, eval_steps=3)
    watched.train()
    assert_same_weights(weights(watched), weights(plain))
    trained = [log for log in watched.state.log_history if "win_rate/rate" not in log]
    assert untimed(trained) == untimed(plain.state.log_history)  # the Trainer logs at evaluated steps too
    assert [log["step"] for log in rates(watched)] == [3, 6, 8]


def test_rates_follow_from_the_verdicts(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0.1)
    judge = Judge(lambda request, text: 0 if request.metadata["topic"] == 8 else sum(map(ord, text)))
    add_win_rate(trainer, judge, eval_steps=8)
    trainer.train()
    ((log,), rows) = rates(trainer), comparisons(tmp_path, 8)
    expected = []
    for row, topic in zip(rows, range(8, 12), strict=True):
        keys = [0 if topic == 8 else sum(map(ord, row[name])) for name in ("start", "policy")]
        expected.append(0.5 if keys[0] == keys[1] else float(keys[1] > keys[0]))
    assert [row["score"] for row in rows] == expected
    assert {row["policy"] for row in rows} != {row["start"] for row in rows}
    assert log["win_rate/rate"] == pytest.approx(sum(expected) / 4)
    assert log["win_rate/low"] <= log["win_rate/rate"] <= log["win_rate/high"]
    assert log["win_rate/ties"] == expected.count(0.5) / 4
    assert (log["win_rate/failed"], log["win_rate/flipped"]) == (0, 0)
    assert log["win_rate/length"] == 8


def start_and_policy(trainer, callback, start, policy):
    """Set the completions that are compared, and return the metrics."""
    reply = type(callback)._complete.__globals__["_Reply"]
    callback._start = [reply(text, 1) for text in start]
    callback._complete = lambda: [reply(text, 1) for text in policy]
    return callback.evaluate()


def test_contradicting_orders_are_a_tie_and_failures_are_left_out(tmp_path):
    class Biased(Judge):
        def answer(self, request):
            first, second = request.completions
            if "fail" in request.completions:
                return RankingFailure("timeout", usage=Usage(5, 1))
            if {first, second} == {"a", "b"}:  # prefers what is shown first
                return RankingResult((0, 1), usage=Usage(5, 1))
            if first == "half":  # prefers it in one order, and ties them in the other
                return RankingResult((0, 1), (0, 0), usage=Usage(5, 1))
            return RankingResult((1, 0) if second == "half" else (0, 1), usage=Usage(5, 1))

    trainer = make_trainer(tmp_path)
    judge = Biased()
    callback = WinRateCallback(judge, trainer, HELD_OUT, 2)
    metrics = start_and_policy(trainer, callback, ["a", "x", "same", "x"], ["b", "half", "same", "fail"])
    assert metrics["win_rate/rate"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert metrics["win_rate/flipped"] == pytest.approx(1 / 3)
    assert metrics["win_rate/failed"] == 1
    assert len(judge.requests) == 6  # equal texts are not sent
    assert (metrics["win_rate/requests"], metrics["win_rate/prompt_tokens"]) == (6, 30)
    assert [row["score"] for row in comparisons(tmp_path, 0)] == [0.5, 1.0, 0.5, None]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_judge_that_prefers_a_position_is_undecided(tmp_path, shuffle):
    with (
        LoopbackEndpoint(lambda body: Reply(json.dumps({"ranking": ["A", "B"]}))) as endpoint,
        closing(LLMRanker("judge", endpoint.base_url, improve=False, shuffle=shuffle)) as judge,
    ):
        trainer = make_trainer(tmp_path, learning_rate=0.1)
        add_win_rate(trainer, judge, eval_steps=8)
        trainer.train()
    (log,) = rates(trainer)
    assert (log["win_rate/rate"], log["win_rate/flipped"], log["win_rate/failed"]) == (0.5, 1.0, 0)
    assert log["win_rate/requests"] == 8


class Interrupted(BaseException):
    """Not an `Exception`, so that nothing handles it."""


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


def test_a_resumed_run_ends_like_an_uninterrupted_one_and_pays_for_nothing_twice(tmp_path):
    def run(folder, judge, interrupted_at=None, resume=None, seed=0):
        settings = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.05}
        trainer = make_trainer(folder, model=make_model(seed=seed), **settings)
        add_win_rate(trainer, judge)
        trainer.add_callback(InterruptAt(interrupted_at))
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Interrupted:
            return None
        return trainer

    whole_judge, first, second = (Judge(usage=Usage(10, 1, cost=0.5)) for _ in range(3))
    whole = run(tmp_path / "whole", whole_judge)
    assert run(tmp_path / "parts", first, interrupted_at=5) is None
    resumed = run(tmp_path / "parts", second, resume=True, seed=5)
    assert untimed(resumed.state.log_history[:-1]) == untimed(whole.state.log_history[:-1])
    assert [log["step"] for log in rates(resumed)] == [2, 4, 6, 8]
    asked = [len(judge.requests) for judge in (whole_judge, first, second)]
    assert asked[0] == asked[1] + asked[2] > 0
    for step in (2, 4, 6, 8):
        assert comparisons(tmp_path / "parts", step) == comparisons(tmp_path / "whole", step)
    # The evaluation of step 4 was repeated, from the stored answers.
    assert rates(whole)[1]["win_rate/cost"] == rates(whole)[1]["win_rate/requests"] * 0.5 > 0
    assert rates(resumed)[1]["win_rate/cached"] == rates(whole)[1]["win_rate/requests"]


def test_patience_ends_a_run_and_its_resumption(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 100, "learning_rate": 0.05}
    trainer = make_trainer(tmp_path, **settings)
    add_win_rate(trainer, Judge(lambda request, text: 0), patience=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 6  # 0.5 is the best of step 2
    assert "Training stops at step 6: win_rate/rate has not risen by more than 0 in 2 evaluations." in caplog.text
    assert (tmp_path / "checkpoint-6" / "cyclealign.complete").exists()

    resumed = make_trainer(tmp_path, **settings)
    add_win_rate(resumed, Judge(lambda request, text: 0), patience=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    patient = make_trainer(tmp_path, **settings)
    add_win_rate(patient, Judge(lambda request, text: 0), patience=3)
    patient.train(resume_from_checkpoint=True)
    assert patient.state.global_step == 8


def test_a_step_at_which_another_callback_stops_is_evaluated(tmp_path):
    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(tmp_path)
    add_win_rate(trainer)
    trainer.add_callback(StopAt())
    trainer.train()
    assert [log["step"] for log in rates(trainer)] == [2, 3]


def test_an_error_of_the_judge_saves_a_checkpoint_and_the_resumed_run_repeats_the_evaluation(tmp_path):
    class Broken(Judge):
        def rank(self, requests):
            raise RankerError("wrong key")

    trainer = make_trainer(tmp_path, learning_rate=0.05)
    add_win_rate(trainer, Broken())
    with pytest.raises(RankerError, match=r"wrong key Resume with trainer\.train\(.*checkpoint-2'"):
        trainer.train()
    resumed = make_trainer(tmp_path, learning_rate=0.05)
    add_win_rate(resumed)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", learning_rate=0.05)
    add_win_rate(whole)
    whole.train()
    assert rates(resumed) == rates(whole)


def test_a_run_that_stops_for_its_failures_evaluates_when_it_is_resumed(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 100}
    judge = Judge()
    trainer = make_trainer(tmp_path, DigestRanker(fail=lambda request: "timeout"), **settings)
    add_win_rate(trainer, judge, eval_steps=4)
    with pytest.raises(TooManyFailuresError):
        trainer.train()
    assert trainer.state.global_step == 4
    assert judge.requests == []
    resumed = make_trainer(tmp_path, **settings)
    add_win_rate(resumed, judge, eval_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert [log["step"] for log in rates(resumed)] == [4, 8]


def test_an_adapter_is_compared_with_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, peft_config=config, learning_rate=0.1)
    add_win_rate(trainer, eval_steps=8)
    trainer.train()
    base = WinRateCallback(Judge(), make_trainer(tmp_path / "base"), HELD_OUT, 2)
    rows = comparisons(tmp_path, 8)
    assert [row["start"] for row in rows] == [reply.text for reply in base._complete()]
    assert [row["policy"] for row in rows] != [row["start"] for row in rows]


class PricedJudge(Judge):
    """Charge a dollar per answer to a budget."""

    def __init__(self, **caps):
        super().__init__()
        self.budget = Budget(prices=Prices(1.0, 1.0), **caps)

    def answer(self, request):
        dollar = Usage(1_000_000, cost=1.0)
        if not self.budget.reserve(dollar):
            return RankingFailure("budget_exhausted")
        self.budget.settle(dollar, dollar)
        self.usage = dollar
        return super().answer(request)


def test_the_budget_of_the_trainer_covers_the_callback(tmp_path):
    trainer = make_trainer(tmp_path, PricedJudge(), learning_rate=0.05)
    add_win_rate(trainer, trainer.ranker, eval_steps=8)
    trainer.train()
    logged = [log.get("ranker/cost", 0) + log.get("win_rate/cost", 0) for log in trainer.state.log_history]
    ledger = (tmp_path / "spent" / "process-0.jsonl").read_text().splitlines()
    spent = sum(json.loads(line)["cost"] for line in ledger)
    assert sum(logged) == spent == trainer.ranker.budget.committed.cost > 16
    assert not (tmp_path / "win_rate" / "spent").exists()


def test_the_budgets_of_the_trainers_jury_cover_the_callback(tmp_path):
    judge = PricedJudge()
    jury = JuryRanker([judge, FunctionRanker(lambda completions, **_: [float(len(text)) for text in completions])])
    trainer = make_trainer(tmp_path, jury, learning_rate=0.05)
    add_win_rate(trainer, trainer.ranker, eval_steps=8)
    trainer.train()
    logged = [log.get("ranker/cost", 0) + log.get("win_rate/cost", 0) for log in trainer.state.log_history]
    ledger = (tmp_path / "spent" / "PricedJudge" / "process-0.jsonl").read_text().splitlines()
    spent = sum(json.loads(line)["cost"] for line in ledger)
    assert sum(logged) == spent == judge.budget.committed.cost > 8
    assert not (tmp_path / "win_rate" / "spent").exists()


def test_a_budget_of_its_own_survives_a_resumption(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.05}
    for resume, judge in ((None, PricedJudge(max_cost=20)), (True, PricedJudge(max_cost=20))):
        trainer = make_trainer(tmp_path, **settings)
        add_win_rate(trainer, judge)
        trainer.add_callback(InterruptAt(None if resume else 5))
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Interrupted:
            spent = judge.budget.committed.cost
    assert 0 < spent < judge.budget.committed.cost <= 20
    assert sum(log.get("win_rate/cost", 0) for log in rates(trainer)) <= 20
    failed = [log["win_rate/failed"] for log in rates(trainer)]
    assert failed[-1] > 0  # not paid for
    assert failed[0] == 0


def test_the_callback_works_without_a_ranker_of_the_trainer(tmp_path):
    rows = Dataset.from_list([{"prompt": f"Q{i}", "completions": ["a", "b"], "ranks": [0, 1]} for i in range(4)])
    args = RankingConfig(
        str(tmp_path), max_prompt_length=64, max_completion_length=8, max_steps=2, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    trainer = RankingTrainer(make_model(), args, rows, None, make_tokenizer())
    add_win_rate(
        trainer, FunctionRanker(lambda completions, **kwargs: [float(text.count("a")) for text in completions])
    )
    trainer.train()
    assert 0 <= rates(trainer)[0]["win_rate/rate"] <= 1


def test_missing_completions_of_the_start_raise(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    trainer = make_trainer(tmp_path)
    add_win_rate(trainer)
    with pytest.raises(CheckpointError, match=r"does not contain completions of the 4 prompts.*\(it has 0 rows\)"):
        trainer.train(resume_from_checkpoint=True)


def test_a_new_run_keeps_the_completions_of_an_earlier_one(tmp_path):
    for _ in range(2):
        trainer = make_trainer(tmp_path, max_steps=2)
        add_win_rate(trainer)
        trainer.train()
    assert {path.name for path in (tmp_path / "win_rate").iterdir()} == {
        "completions", "completions-1", "rankings-0.sqlite"
    }  # fmt: skip


def test_custom_backends_sample_as_in_training(tmp_path):
    trainer = make_trainer(tmp_path, stub_generation=True)
    with pytest.raises(ValueError, match="generation_kwargs have no effect with DigestGeneration"):
        WinRateCallback(Judge(), trainer, HELD_OUT, 2, generation_kwargs={"top_k": 3})
    callback = WinRateCallback(Judge(), trainer, HELD_OUT, 2)
    assert [reply.text for reply in callback._complete()] != [reply.text for reply in callback._complete()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_steps": 0}, "eval_steps must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"min_delta": -1.0}, "min_delta must be at least 0, got -1.0"),
        ({"confidence_level": 95}, "confidence_level must be between 0 and 1, got 95"),
        ({"dataset": []}, "got no rows"),
        ({"dataset": [{"question": "Q"}]}, r"got \['question'\]"),
    ],
)
def test_wrong_arguments_raise(tmp_path, changes, message):
    arguments = {"ranker": Judge(), "trainer": make_trainer(tmp_path), "dataset": HELD_OUT, "eval_steps": 2}
    with pytest.raises(ValueError, match=message):
        WinRateCallback(**(arguments | changes))


def test_two_callbacks_of_one_name_raise(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    add_win_rate(trainer)
    add_win_rate(trainer)
    with pytest.raises(ValueError, match=r"several callbacks that log win_rate/"):
        trainer.train()


def test_other_trainers_raise(tmp_path):
    with pytest.raises(TypeError, match=r"needs a CycleAlignTrainer, RankingTrainer or DLMATrainer, .* got str"):
        WinRateCallback(Judge(), "trainer", HELD_OUT, 2)
