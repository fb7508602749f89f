"""The cycle: what is sent, what trains, what is logged, remembered and resumed."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, TrainerCallback

from cyclealign_trl import (
    CycleAlignTrainer,
    Demonstration,
    DemonstrationPool,
    FunctionRanker,
    RankerError,
    TooManyFailuresError,
)
from cyclealign_trl.cycle.agreement import agreement_ranking
from cyclealign_trl.cycle.cyclealign_config import CycleAlignConfig
from cyclealign_trl.cycle.demonstrations import DEFAULT
from cyclealign_trl.types import Trimmed
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import DigestGeneration, DigestRanker, K, config, make_trainer, prompts, read_log


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_weights(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# The run as a whole


@pytest.mark.parametrize("loss_type", ["pro", "rrhf"])
@pytest.mark.parametrize("sft_target", ["improved", "top_ranked"])
@pytest.mark.parametrize("conversational", [False, True])
def test_a_run_logs_all_that_it_did(tmp_path, loss_type, sft_target, conversational):
    dataset = prompts(4, conversational)
    trainer = make_trainer(tmp_path, dataset=dataset, loss_type=loss_type, sft_target=sft_target)
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 * 2
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())

    log = trainer.state.log_history[0]
    times = {f"time/{name}" for name in ("generate", "rank_wait", "forward", "backward")}
    completions = {f"completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio")}
    others = {"agreement/length", "agreement/rate", "agreement/full", "pool/size", "prompts/cut_ratio"}
    tokens = {"ranker/prompt_tokens", "ranker/completion_tokens"}
    assert {"loss", "ranking_loss", "sft_loss"} | times | completions | others | tokens <= set(log)
    assert log["ranker/prompt_tokens"] == 2 * 10

    rows = read_log(tmp_path)
    assert [(row["step"], row["interaction"]) for row in rows] == [
        (step, step % 2) for step in range(4) for _ in range(2)
    ]
    for row in rows:
        assert row["prompt"] in dataset["prompt"]
        assert len(row["completions"]) == K
        agreement = agreement_ranking(row["black_box_order"], row["white_box_order"])
        assert tuple(row["agreement"]) == agreement
        assert (row["improved_completion"].strip(), row["failure"]) == ("better", None)
        assert row["usage"]["attempts"] == 1


def test_the_model_is_saved_reloaded_and_generates(tmp_path):
    trainer = make_trainer(tmp_path, dataset=prompts(2))
    trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[40, 41]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 2
    assert_same_weights(dict(model.named_parameters()), weights(trainer))


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(tmp_path, dataset=prompts(2), peft_config=peft.LoraConfig(target_modules=["q_proj"]))
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_bfloat16(tmp_path):
    losses = []
    for bf16 in (True, False):
        trainer = make_trainer(tmp_path / str(bf16), bf16=bf16, max_steps=2, stub_generation=True)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history[:2]])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_reward_functions_rank(tmp_path):
    def shortest(prompts, completions, topic, **kwargs):
        assert len(prompts) == len(completions) == len(topic)
        return [-float(len(text)) for text in completions]

    make_trainer(tmp_path, ranker=FunctionRanker(shortest), dataset=prompts(2)).train()
    for row in read_log(tmp_path):
        lengths = [len(row["completions"][index]) for index in row["black_box_order"]]
        assert lengths == sorted(lengths)


def test_the_white_box_order_is_the_policys_before_its_update(tmp_path):
    trainer = make_trainer(tmp_path, dataset=prompts(2), max_steps=1, stub_generation=True)
    generated = DigestGeneration().generate(None, [trainer.renderer.prompt(text)[0] for text in prompts(2)["prompt"]])
    expected = {}
    for prompt, completions in zip(prompts(2)["prompt"], generated, strict=True):
        ids = trainer.renderer.prompt(prompt)[0]
        sums, lengths = trainer._sequence_logps(trainer.model, [ids] * K, completions)
        expected[prompt] = (sums / lengths).argsort(descending=True).tolist()
    trainer.train()
    assert {row["prompt"]: row["white_box_order"] for row in read_log(tmp_path)} == expected


def test_policy_score_can_be_the_sum(tmp_path):
    orders = []
    for score in ("mean_logprob", "sum_logprob"):
        trainer = make_trainer(tmp_path / score, max_steps=4, stub_generation=True, policy_score=score)
        trainer.train()
        orders.append([row["white_box_order"] for row in read_log(tmp_path / score)])
    assert orders[0] != orders[1]


def test_completions_are_printed(tmp_path, capsys):
    pytest.importorskip("rich")
    make_trainer(tmp_path, dataset=prompts(2), max_steps=1, log_completions=True).train()
    printed = capsys.readouterr().out
    assert "Question" in printed
    assert "policy" in printed


@pytest.mark.parametrize("conversational", [False, True])
def test_what_is_printed_drives_no_terminal(tmp_path, capsys, conversational):
    pytest.importorskip("rich")
    text = "Hi\x1b[2J\x9b1A\x07"
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}] if conversational else text}] * 2)
    make_trainer(tmp_path, dataset=rows, max_steps=1, log_completions=True, max_prompt_length=64).train()
    printed = capsys.readouterr().out
    assert "Hi\ufffd[2J" in printed
    assert not set(printed) & {"\x1b", "\x9b", "\x07"}


def test_every_epoch_has_an_order_of_its_own(tmp_path):
    make_trainer(tmp_path, num_train_epochs=2, num_interactions=1).train()
    order = [row["prompt"] for row in read_log(tmp_path)]
    assert sorted(order[:8]) == sorted(order[8:]) == sorted(prompts()["prompt"])
    assert order[:8] != order[8:]


# Demonstrations


def run_and_see_requests(tmp_path, **changes):
    ranker = DigestRanker()
    trainer = make_trainer(tmp_path, ranker, num_interactions=4, stub_generation=True, cache_rankings=False, **changes)
    trainer.train()
    return ranker.requests, weights(trainer), read_log(tmp_path)


def test_demonstrations_are_earned_shown_and_forgotten(tmp_path):
    requests, _, rows = run_and_see_requests(tmp_path, dataset=prompts(2), max_demonstrations=2)
    earned = {}
    for request, row in zip(requests, rows, strict=True):
        mine = earned.setdefault(request.prompt, [])
        assert request.demonstrations == (DEFAULT, *mine[-2:])
        if len(row["agreement"]) >= 2:
            shown = sorted(row["agreement"])
            completions = tuple(row["completions"][index] for index in shown)
            order = tuple(shown.index(index) for index in row["agreement"])
            mine.append(Demonstration(request.prompt, completions, order))
    assert max(len(demonstrations) for demonstrations in earned.values()) > 2


def test_a_window_that_is_over_is_forgotten(tmp_path):
    trainer = make_trainer(tmp_path, stub_generation=True)
    trainer.train()
    assert len(trainer.demonstrations) == 0


def test_run_scope_shows_the_demonstrations_of_other_prompts(tmp_path):
    requests, _, _ = run_and_see_requests(tmp_path, demonstration_scope="run", max_demonstrations=3)
    last = requests[-1]
    assert len(last.demonstrations) == 1 + 3
    assert {shown.prompt for shown in last.demonstrations[1:]} != {last.prompt}


def test_ablations_change_what_is_sent_and_nothing_else(tmp_path):
    full, full_weights, full_rows = run_and_see_requests(tmp_path / "full")
    d2, d2_weights, d2_rows = run_and_see_requests(tmp_path / "d2", use_dynamic_demonstrations=False)
    icl, icl_weights, icl_rows = run_and_see_requests(
        tmp_path / "icl", use_dynamic_demonstrations=False, use_static_demonstrations=False
    )
    assert {len(request.demonstrations) for request in full} > {1}
    assert {request.demonstrations for request in d2} == {(DEFAULT,)}
    assert {request.demonstrations for request in icl} == {()}
    for requests, trained, rows in ((d2, d2_weights, d2_rows), (icl, icl_weights, icl_rows)):
        assert [request.completions for request in requests] == [request.completions for request in full]
        assert_same_weights(trained, full_weights)
        assert rows == full_rows


def test_a_pool_of_ones_own(tmp_path):
    own = Demonstration("Q", ("yes", "no"), (0, 1))
    requests, _, _ = run_and_see_requests(tmp_path, demonstrations=DemonstrationPool([own], capacity=1))
    assert {request.demonstrations[0] for request in requests} == {own}
    assert max(len(request.demonstrations) for request in requests) == 2


@pytest.mark.parametrize(
    "setting",
    [
        {"max_demonstrations": 7},
        {"demonstration_scope": "run"},
        {"use_static_demonstrations": False},
        {"use_dynamic_demonstrations": False},
    ],
)
def test_a_pool_against_the_arguments_raises(tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        make_trainer(tmp_path, demonstrations=DemonstrationPool(), **setting)


# What does not train


def test_a_failed_ranking_weighs_nothing_and_is_counted(tmp_path):
    bad = prompts(2)["prompt"][0]
    ranker = DigestRanker(fail=lambda request: "timeout" if request.prompt == bad else None)
    trainer = make_trainer(tmp_path, ranker, dataset=prompts(2), max_steps=1, stub_generation=True)
    trainer.train()
    rows = {row["prompt"]: row for row in read_log(tmp_path)}
    assert rows[bad]["failure"] == "timeout"
    assert rows[bad]["black_box_order"] is rows[bad]["agreement"] is rows[bad]["improved_completion"] is None
    assert sorted(rows[bad]["white_box_order"]) == [0, 1, 2]
    log = trainer.state.log_history[0]
    assert log["failures/timeout"] == 1
    assert log["ranker/prompt_tokens"] == 10 + 3

    # The divisor stays the number of prompts: half of the loss of the other prompt alone.
    alone = make_trainer(
        tmp_path / "alone", DigestRanker(), dataset=prompts(2).select([1]), max_steps=1, stub_generation=True,
        per_device_train_batch_size=1,
    )  # fmt: skip
    alone.train()
    assert log["loss"] == pytest.approx(alone.state.log_history[0]["loss"] / 2, rel=1e-5)


def test_a_step_of_failures_changes_no_weight(tmp_path):
    trainer = make_trainer(tmp_path, DigestRanker(fail=lambda request: "timeout"), max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert_same_weights(weights(trainer), before)
    assert len(trainer.demonstrations) == 0


def test_equal_completions_are_not_ranked(tmp_path):
    ranker = DigestRanker()
    trainer = make_trainer(tmp_path, ranker, dataset=prompts(2), max_steps=1)
    trainer.generation = type("Same", (), {"generate": lambda self, model, ids: [[[40, 1]] * K for _ in ids]})()
    trainer.train()
    assert ranker.requests == []
    assert {row["failure"] for row in read_log(tmp_path)} == {"duplicate_completions"}
    assert trainer.state.log_history[0]["failures/duplicate_completions"] == 2


def test_stop_on_agreement_leaves_a_prompt_out_of_its_remaining_interactions(tmp_path):
    ranker = DigestRanker()
    trainer = make_trainer(
        tmp_path, ranker, dataset=prompts(2), num_interactions=8, num_train_epochs=2, stub_generation=True,
        stop_on_agreement=True,
    )  # fmt: skip
    trainer.train()
    rows = read_log(tmp_path)
    skipped = [row for row in rows if row["failure"] == "already_agreed"]
    assert skipped
    assert len(ranker.requests) == len(rows) - len(skipped)
    agreed = set()
    for row in rows:
        if row["interaction"] == 0:
            agreed.discard(row["prompt"])
        assert (row["failure"] == "already_agreed") == (row["prompt"] in agreed)
        if row["agreement"] == row["black_box_order"] is not None:
            agreed.add(row["prompt"])


def test_a_missing_improved_completion_falls_back_to_the_top_ranked(tmp_path):
    runs = []
    for name, improve, target in (("without", False, "improved"), ("top", True, "top_ranked")):
        trainer = make_trainer(tmp_path / name, DigestRanker(improve), sft_target=target, stub_generation=True)
        trainer.train()
        runs.append(weights(trainer))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


def test_overlong_texts_are_cut_and_counted(tmp_path):
    trainer = make_trainer(tmp_path, dataset=prompts(2), max_steps=1, max_prompt_length=4, max_completion_length=5)
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["prompts/cut_ratio"], log["improved/cut_ratio"]) == (1.0, 1.0)
    assert log["completions/max_length"] <= 5
    assert {row["prompt"] for row in read_log(tmp_path)} == set(prompts(2)["prompt"])  # the ranker sees all of it


# Failures of the ranker as a whole


# What the ranker says of itself


class Consistent(DigestRanker):
    """Says of every ranking how far its passes agreed, and what it was not shown."""

    fingerprint = None

    def __init__(self, consistency):
        super().__init__()
        self.consistency = consistency

    def answer(self, request):
        trimmed = Trimmed(demonstrations=1, completions=2)
        return replace(super().answer(request), consistency=self.consistency(request), trimmed=trimmed)


def run(folder, ranker=None, **changes):
    trainer = make_trainer(folder, ranker, prompts(2), stub_generation=True, max_steps=1, **changes)
    before = weights(trainer)
    trainer.train()
    return trainer, before


@pytest.mark.parametrize("consistency", [0.0, -0.5])
def test_a_ranking_that_its_passes_contradict_weighs_nothing(tmp_path, consistency):
    trainer, before = run(tmp_path, Consistent(lambda _: consistency), weight_by_consistency=True)
    assert_same_weights(weights(trainer), before)
    trainer, before = run(tmp_path / "unweighted", Consistent(lambda _: consistency))
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_the_loss_of_a_prompt_is_multiplied_by_its_consistency(tmp_path):
    def loss(name, **changes):
        trainer, _ = run(tmp_path / name, **changes)
        return trainer.state.log_history[0]["loss"]

    def of_one(number):  # the other prompt's passes agree on nothing
        return Consistent(lambda request: 1.0 * request.prompt.startswith(f"Question {number}"))

    whole = loss("plain")
    assert loss("all", ranker=Consistent(lambda _: 1.0), weight_by_consistency=True) == whole
    half = loss("half", ranker=Consistent(lambda _: 0.5), weight_by_consistency=True)
    assert half == pytest.approx(whole / 2)
    parts = [loss(str(number), ranker=of_one(number), weight_by_consistency=True) for number in range(2)]
    assert sum(parts) == pytest.approx(whole)
    assert min(parts) > 0


def test_consistency_and_what_was_trimmed_are_logged(tmp_path):
    ranker = Consistent(lambda request: 0.5 if request.prompt.startswith("Question 0") else None)
    trainer, _ = run(tmp_path, ranker)
    log = trainer.state.log_history[0]
    assert log["ranker/consistency"] == 0.5
    assert (log["ranker/dropped_demonstrations"], log["ranker/cut_completions"]) == (2, 4)
    assert {row["consistency"] for row in read_log(tmp_path)} == {0.5, None}


def test_weighing_single_passes_is_said_once_to_have_no_effect(tmp_path, caplog):
    trainer, _ = run(tmp_path, weight_by_consistency=True, num_interactions=1)
    [record] = [record for record in caplog.records if "weight_by_consistency" in record.message]
    assert "num_passes=3" in record.message
    plain, _ = run(tmp_path / "plain", num_interactions=1)
    assert_same_weights(weights(trainer), weights(plain))


def test_the_ranker_is_told_which_demonstrations_are_static(tmp_path):
    ranker = DigestRanker()
    make_trainer(tmp_path, ranker, prompts(2)).train()
    assert {request.num_static for request in ranker.requests} == {1}
    assert max(len(request.demonstrations) for request in ranker.requests) == 2


def test_too_many_failures_stop_the_run_with_a_checkpoint(tmp_path):
    broken = DigestRanker(fail=lambda request: "server_error")
    settings = {"num_train_epochs": 4, "num_interactions": 3, "stub_generation": True}
    trainer = make_trainer(tmp_path, broken, **settings)
    with pytest.raises(TooManyFailuresError, match=r"8 of the last 8 .*server_error: 8.*checkpoint-4") as error:
        trainer.train()
    assert "resume_from_checkpoint" in str(error.value)
    resumed = make_trainer(tmp_path, DigestRanker(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 4 * 4 * 3


def test_a_share_below_the_limit_is_let_pass(tmp_path):
    bad = set(prompts()["prompt"][:4])
    ranker = DigestRanker(fail=lambda request: "timeout" if request.prompt in bad else None)
    make_trainer(tmp_path, ranker, num_interactions=5, stub_generation=True).train()


def test_an_error_of_the_ranker_reaches_the_caller(tmp_path):
    class Locked:
        def rank(self, requests):
            raise RankerError("wrong key")

    with pytest.raises(RankerError, match="wrong key"):
        make_trainer(tmp_path, Locked()).train()


def test_an_error_of_the_ranker_takes_its_step_back(tmp_path):
    class Unlocked(DigestRanker):
        fingerprint = None

        def rank(self, requests):
            answers = super().rank(requests)
            if len(self.requests) == 4:  # the second micro-batch
                raise RankerError("wrong key")
            return answers

    trainer = make_trainer(tmp_path, Unlocked(), gradient_accumulation_steps=2, stub_generation=True)
    before = weights(trainer)
    with pytest.raises(RankerError, match=r"^wrong key$"):
        trainer.train()
    assert_same_weights(weights(trainer), before)
    assert not list((tmp_path / "interactions").glob("*"))
    trainer.train()
    assert len(read_log(tmp_path)) == 16


def test_a_ranker_that_loses_requests_raises(tmp_path):
    class Forgetful:
        def rank(self, requests):
            return []

    with pytest.raises(RankerError, match="given 2 requests and answered 0"):
        make_trainer(tmp_path, Forgetful()).train()


# Accumulation, resumption, caching


def test_accumulation_changes_nothing(tmp_path):
    runs = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        folder = tmp_path / str(batch_size)
        trainer = make_trainer(
            folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            stub_generation=True,
        )  # fmt: skip
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history[:-1]]
        rows = [{**row, "usage": None} for row in read_log(folder)]
        runs.append((losses, weights(trainer), rows))
    for losses, trained, rows in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        torch.testing.assert_close(trained, runs[0][1], rtol=1e-5, atol=1e-6)
        assert rows == runs[0][2]


class Killed(BaseException):
    """Not an error that anything could handle."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("killed_at", [3, 4, 11, 13, 15])
@pytest.mark.parametrize("scope", ["prompt", "run"])
def test_a_killed_run_resumes_as_if_it_had_not_been_killed(tmp_path, killed_at, scope):
    # 8 steps an epoch: the kills fall within an epoch, at its end, and in the second one; checkpoints every 2 steps.
    settings = {
        "num_train_epochs": 2,
        "num_interactions": 4,
        "gradient_accumulation_steps": 2,
        "demonstration_scope": scope,
        "stop_on_agreement": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    whole = make_trainer(tmp_path / "whole", eval_dataset=prompts(2), **settings)
    whole.train()

    folder = tmp_path / "parts"
    with pytest.raises(Killed):
        make_trainer(folder, eval_dataset=prompts(2), callbacks=[KillAt(killed_at)], **settings).train()
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


def test_a_resumed_run_pays_for_nothing_twice(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_interactions": 3}
    with pytest.raises(Killed):
        make_trainer(tmp_path, callbacks=[KillAt(7)], **settings).train()
    ranker = DigestRanker()
    make_trainer(tmp_path, ranker, **settings).train(resume_from_checkpoint=True)
    assert len(ranker.requests) == (12 - 7) * 2  # step 7 of 12 was the first that nobody had paid for
    assert [row["usage"]["cached"] for row in read_log(tmp_path)][12:16] == [True, True, False, False]


def test_a_fresh_run_sets_the_log_of_an_earlier_one_aside(tmp_path):
    for number in range(3):
        make_trainer(tmp_path, dataset=prompts(2), max_steps=number + 1).train()
    kept = {path.name: len(list(path.iterdir())) for path in tmp_path.glob("interactions*")}
    assert kept == {"interactions-1": 1, "interactions-2": 2, "interactions": 3}


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    newest = tmp_path / "checkpoint-8"
    (newest / "cyclealign.complete").unlink()
    resumed = make_trainer(tmp_path, save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match="the run was killed before it was whole"):
        resumed.train(resume_from_checkpoint=str(newest))
    steps = steps_of(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert steps == [7, 8]


class Steps(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


def steps_of(trainer):
    """The optimiser steps that the trainer takes from now on."""
    callback = Steps()
    trainer.add_callback(callback)
    return callback.seen


@pytest.mark.parametrize("max_steps", [3, 4])  # in the middle of a window, and at its end
def test_a_finished_run_takes_no_step_when_it_is_resumed(tmp_path, max_steps):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": max_steps}
    finished = make_trainer(tmp_path, **settings)
    finished.train()
    resumed = make_trainer(tmp_path, model=make_model(seed=5), **settings)
    steps = steps_of(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert steps == []
    assert resumed.state.global_step == max_steps
    assert_same_weights(weights(resumed), weights(finished))


def test_a_fresh_run_is_not_mixed_with_an_earlier_one_in_its_folder(tmp_path, caplog):
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
    ("changes", "said"),
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 2 and is 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"num_interactions": 4}, "num_interactions was 2 and is 4"),
        ({"seed": 7, "data_seed": 3}, "seed was 42 and is 7; data_seed was 42 and is 3"),
        ({"dataset": prompts(6)}, "rows of train_dataset was 8 and is 6"),
        ({"demonstration_scope": "run"}, "scope 'prompt' .* scope 'run'"),
    ],
)
def test_settings_that_cannot_be_honoured_raise_on_resumption(tmp_path, changes, said):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    resumed = make_trainer(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        resumed.train(resume_from_checkpoint=True)


def test_settings_that_can_be_honoured_may_change(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    resumed = make_trainer(tmp_path, loss_type="rrhf", learning_rate=1e-4, num_generations=4)
    steps = steps_of(resumed)
    resumed.train(resume_from_checkpoint="true")  # as it comes from a command line
    assert steps == list(range(2, 9))


def test_nothing_to_resume_from_raises(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume from"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_state_is_json(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    state = json.loads((tmp_path / "checkpoint-1" / "cyclealign-0.json").read_text())
    assert set(state) == {"version", "settings", "state"}
    assert set(state["state"]) == {"demonstrations", "agreed"}


# Evaluation


def test_metrics_are_means_over_prompts_not_batches(tmp_path):
    logs = []
    for batch_size in (5, 4):  # five prompts in one batch; in one of four and one of one
        failing = DigestRanker(fail=lambda request: "timeout" if "1" in request.prompt else None)
        trainer = make_trainer(tmp_path / str(batch_size), failing, stub_generation=True,
                               per_device_eval_batch_size=batch_size, eval_dataset=prompts(5))  # fmt: skip
        logs.append(trainer.evaluate())
    names = ("agreement/length", "agreement/rate", "agreement/full", "improved/ratio", "completions/mean_length",
             "completions/clipped_ratio", "prompts/cut_ratio", "ranking_loss")  # fmt: skip
    for name in names:
        assert logs[1][f"eval_{name}"] == pytest.approx(logs[0][f"eval_{name}"], rel=1e-4), name


def test_evaluation_asks_once_and_leaves_the_pool_and_the_training_alone(tmp_path):
    runs = []
    for evaluated in (False, True):
        ranker = DigestRanker()
        changes = {"eval_strategy": "steps", "eval_steps": 1} if evaluated else {}
        trainer = make_trainer(
            tmp_path / str(evaluated), ranker, eval_dataset=prompts(6, conversational=True), max_eval_samples=3,
            max_steps=3, **changes,
        )  # fmt: skip
        trainer.train()
        runs.append((weights(trainer), trainer.demonstrations.state_dict(), len(ranker.requests)))
    assert_same_weights(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert runs[1][2] > runs[0][2]
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3
    assert {"eval_agreement/rate", "eval_ranking_loss", "eval_completions/mean_length"} <= set(evaluations[0])
    assert len(read_log(tmp_path / "True")) == 3 * 2  # the log holds what was trained on


def test_several_evaluation_sets_keep_their_names(tmp_path):
    sets = {"tea": prompts(2), "milk": prompts(4)}
    trainer = make_trainer(tmp_path, eval_dataset=sets, max_eval_samples=2)
    metrics = trainer.evaluate()
    assert {"eval_tea_agreement/rate", "eval_milk_agreement/rate", "eval_milk_loss"} <= set(metrics)


# Wrong use


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"num_interactions": 0}, "num_interactions must be at least 1, got 0"),
        ({"min_agreement": 1}, "min_agreement must be at least 2, got 1"),
        ({"loss_type": "dpo"}, "loss_type must be one of 'pro', 'rrhf'; got 'dpo'"),
        ({"sft_target": "best"}, "sft_target must be one of 'improved', 'top_ranked'"),
        ({"policy_score": "p"}, "policy_score must be one of"),
        ({"demonstration_scope": "global"}, "demonstration_scope must be one of 'prompt', 'run'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"sft_weight": -1.0}, "sft_weight must be 0 or more"),
        ({"max_ranking_failures": 2.0}, "share from 0 to 1"),
        ({"max_eval_samples": 0}, "at least 1 prompt"),
        ({"max_prompt_length": 0}, "at least 1 token"),
        ({"max_completion_length": 0}, "at least 1 token"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
)
def test_wrong_arguments_raise(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **change)


def test_a_missing_prompt_column_raises(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset needs a column 'prompt'; it has \['question'\]"):
        make_trainer(tmp_path, dataset=Dataset.from_list([{"question": "?"}] * 4))
    with pytest.raises(ValueError, match=r"eval_dataset\['tea'\] needs"):
        make_trainer(tmp_path, eval_dataset={"tea": Dataset.from_list([{"question": "?"}])})


def test_a_dataset_smaller_than_a_window_raises(tmp_path):
    with pytest.raises(ValueError, match="3 prompts, but one optimiser step takes 4"):
        make_trainer(tmp_path, dataset=prompts(3), gradient_accumulation_steps=2)


def test_a_stream_raises(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(prompts(4)))
    with pytest.raises(ValueError, match=r"train_dataset is a stream.*streaming=True"):
        make_trainer(tmp_path, dataset=stream, max_steps=1)


def test_what_is_no_ranker_raises(tmp_path):
    with pytest.raises(TypeError, match="str has none"):
        make_trainer(tmp_path, ranker="gpt-4")


def test_default_arguments_are_named_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.config._name_or_path = "org/tiny"
    model.config.max_position_embeddings = 1024
    trainer = CycleAlignTrainer(model, DigestRanker(), processing_class=make_tokenizer())
    assert isinstance(trainer.args, CycleAlignConfig)
    assert trainer.args.output_dir == "tiny-CycleAlign"
