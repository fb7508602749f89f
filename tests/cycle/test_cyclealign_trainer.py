"""`CycleAlignTrainer`: a run as a whole, demonstrations, prompts without a ranking, evaluation, and errors."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM

from cyclealign_trl import (
    CycleAlignConfig,
    CycleAlignTrainer,
    Demonstration,
    DemonstrationPool,
    FunctionRanker,
    RankerError,
)
from cyclealign_trl.cycle.agreement import agreement_ranking
from cyclealign_trl.cycle.demonstrations import DEFAULT
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import (
    DigestGeneration,
    DigestRanker,
    K,
    assert_same_weights,
    make_trainer,
    prompts,
    read_log,
    weights,
)

# The run as a whole


@pytest.mark.parametrize("loss_type", ["pro", "rrhf"])
@pytest.mark.parametrize("sft_target", ["improved", "top_ranked"])
@pytest.mark.parametrize("conversational", [False, True])
def test_a_run_trains_and_logs_metrics_and_interactions(tmp_path, loss_type, sft_target, conversational):
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


def test_a_saved_model_can_be_loaded_and_generates(tmp_path):
    trainer = make_trainer(tmp_path, dataset=prompts(2))
    trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[40, 41]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 2
    assert_same_weights(dict(model.named_parameters()), weights(trainer))


def test_lora_trains_only_the_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(tmp_path, dataset=prompts(2), peft_config=peft.LoraConfig(target_modules=["q_proj"]))
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_bfloat16_trains_with_similar_losses(tmp_path):
    losses = []
    for bf16 in (True, False):
        trainer = make_trainer(tmp_path / str(bf16), bf16=bf16, max_steps=2, stub_generation=True)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history[:2]])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_reward_function_can_be_the_ranker(tmp_path):
    def shortest(prompts, completions, topic, **kwargs):
        assert len(prompts) == len(completions) == len(topic)
        return [-float(len(text)) for text in completions]

    make_trainer(tmp_path, ranker=FunctionRanker(shortest), dataset=prompts(2)).train()
    for row in read_log(tmp_path):
        lengths = [len(row["completions"][index]) for index in row["black_box_order"]]
        assert lengths == sorted(lengths)


def test_the_white_box_order_is_computed_before_the_update(tmp_path):
    trainer = make_trainer(tmp_path, dataset=prompts(2), max_steps=1, stub_generation=True)
    generated = DigestGeneration().generate(None, [trainer.renderer.prompt(text)[0] for text in prompts(2)["prompt"]])
    expected = {}
    for prompt, completions in zip(prompts(2)["prompt"], generated, strict=True):
        ids = trainer.renderer.prompt(prompt)[0]
        sums, lengths = trainer._sequence_logps(trainer.model, [ids] * K, completions)
        expected[prompt] = (sums / lengths).argsort(descending=True).tolist()
    trainer.train()
    assert {row["prompt"]: row["white_box_order"] for row in read_log(tmp_path)} == expected


def test_the_policy_score_changes_the_white_box_order(tmp_path):
    orders = []
    for score in ("mean_logprob", "sum_logprob"):
        trainer = make_trainer(tmp_path / score, max_steps=4, stub_generation=True, policy_score=score)
        trainer.train()
        orders.append([row["white_box_order"] for row in read_log(tmp_path / score)])
    assert orders[0] != orders[1]


def test_log_completions_prints_a_table(tmp_path, capsys):
    pytest.importorskip("rich")
    make_trainer(tmp_path, dataset=prompts(2), max_steps=1, log_completions=True).train()
    printed = capsys.readouterr().out
    assert "Question" in printed
    assert "policy" in printed


@pytest.mark.parametrize("conversational", [False, True])
def test_printed_texts_have_no_control_characters(tmp_path, capsys, conversational):
    pytest.importorskip("rich")
    text = "Hi\x1b[2J\x9b1A\x07"
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}] if conversational else text}] * 2)
    make_trainer(tmp_path, dataset=rows, max_steps=1, log_completions=True, max_prompt_length=64).train()
    printed = capsys.readouterr().out
    assert "Hi\ufffd[2J" in printed
    assert not set(printed) & {"\x1b", "\x9b", "\x07"}


def test_every_epoch_shuffles_the_prompts_differently(tmp_path):
    make_trainer(tmp_path, num_train_epochs=2, num_interactions=1).train()
    order = [row["prompt"] for row in read_log(tmp_path)]
    assert sorted(order[:8]) == sorted(order[8:]) == sorted(prompts()["prompt"])
    assert order[:8] != order[8:]


def test_gradient_accumulation_does_not_change_training(tmp_path):
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


# Demonstrations


def train_and_return_requests(tmp_path, **changes):
    ranker = DigestRanker()
    trainer = make_trainer(tmp_path, ranker, num_interactions=4, stub_generation=True, cache_rankings=False, **changes)
    trainer.train()
    return ranker.requests, weights(trainer), read_log(tmp_path)


def test_agreements_become_demonstrations_for_later_requests(tmp_path):
    requests, _, rows = train_and_return_requests(tmp_path, dataset=prompts(2), max_demonstrations=2)
    observed = {}
    for request, row in zip(requests, rows, strict=True):
        own = observed.setdefault(request.prompt, [])
        assert request.demonstrations == (DEFAULT, *own[-2:])
        if len(row["agreement"]) >= 2:
            shown = sorted(row["agreement"])
            completions = tuple(row["completions"][index] for index in shown)
            order = tuple(shown.index(index) for index in row["agreement"])
            own.append(Demonstration(request.prompt, completions, order))
    assert max(len(demonstrations) for demonstrations in observed.values()) > 2


def test_demonstrations_are_dropped_at_the_end_of_a_window(tmp_path):
    trainer = make_trainer(tmp_path, stub_generation=True)
    trainer.train()
    assert len(trainer.demonstrations) == 0


def test_run_scope_shows_the_demonstrations_of_other_prompts(tmp_path):
    requests, _, _ = train_and_return_requests(tmp_path, demonstration_scope="run", max_demonstrations=3)
    last = requests[-1]
    assert len(last.demonstrations) == 1 + 3
    assert {shown.prompt for shown in last.demonstrations[1:]} != {last.prompt}


def test_demonstration_settings_change_only_the_requests(tmp_path):
    full, full_weights, full_rows = train_and_return_requests(tmp_path / "full")
    static, static_weights, static_rows = train_and_return_requests(
        tmp_path / "static", use_dynamic_demonstrations=False
    )
    none, none_weights, none_rows = train_and_return_requests(
        tmp_path / "none", use_dynamic_demonstrations=False, use_static_demonstrations=False
    )
    assert {len(request.demonstrations) for request in full} > {1}
    assert {request.demonstrations for request in static} == {(DEFAULT,)}
    assert {request.demonstrations for request in none} == {()}
    for requests, trained, rows in ((static, static_weights, static_rows), (none, none_weights, none_rows)):
        assert [request.completions for request in requests] == [request.completions for request in full]
        assert_same_weights(trained, full_weights)
        assert rows == full_rows


def test_a_pool_can_be_passed(tmp_path):
    own = Demonstration("Q", ("yes", "no"), (0, 1))
    requests, _, _ = train_and_return_requests(tmp_path, demonstrations=DemonstrationPool([own], capacity=1))
    assert {request.demonstrations[0] for request in requests} == {own}
    assert max(len(request.demonstrations) for request in requests) == 2


def test_requests_count_their_static_demonstrations(tmp_path):
    ranker = DigestRanker()
    make_trainer(tmp_path, ranker, prompts(2)).train()
    assert {request.num_static for request in ranker.requests} == {1}
    assert max(len(request.demonstrations) for request in ranker.requests) == 2


# Prompts without a ranking


def test_a_failed_ranking_adds_no_loss_and_is_counted(tmp_path):
    failing = prompts(2)["prompt"][0]
    ranker = DigestRanker(fail=lambda request: "timeout" if request.prompt == failing else None)
    trainer = make_trainer(tmp_path, ranker, dataset=prompts(2), max_steps=1, stub_generation=True)
    trainer.train()
    rows = {row["prompt"]: row for row in read_log(tmp_path)}
    assert rows[failing]["failure"] == "timeout"
    assert (
        rows[failing]["black_box_order"] is rows[failing]["agreement"] is rows[failing]["improved_completion"] is None
    )
    assert sorted(rows[failing]["white_box_order"]) == [0, 1, 2]
    log = trainer.state.log_history[0]
    assert log["failures/timeout"] == 1
    assert log["ranker/prompt_tokens"] == 10 + 3

    # The loss is divided by the number of all prompts, so it is half of the loss of the other prompt alone.
    alone = make_trainer(
        tmp_path / "alone", DigestRanker(), dataset=prompts(2).select([1]), max_steps=1, stub_generation=True,
        per_device_train_batch_size=1,
    )  # fmt: skip
    alone.train()
    assert log["loss"] == pytest.approx(alone.state.log_history[0]["loss"] / 2, rel=1e-5)


def test_a_step_in_which_all_rankings_fail_changes_no_weight(tmp_path):
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


def test_stop_on_agreement_skips_the_remaining_interactions_of_a_prompt(tmp_path):
    ranker = DigestRanker()
    trainer = make_trainer(
        tmp_path, ranker, dataset=prompts(2), num_interactions=8, num_train_epochs=2, stub_generation=True,
        stop_on_agreement=True,
    )  # fmt: skip
    scored = []
    score = trainer._sequence_logps

    def record(model, prompt_ids, completion_ids):
        scored.append(sum(map(bool, completion_ids)))
        return score(model, prompt_ids, completion_ids)

    trainer._sequence_logps = record
    trainer.train()
    rows = read_log(tmp_path)
    skipped = [row for row in rows if row["failure"] == "already_agreed"]
    assert skipped
    assert all((row["white_box_order"] is None) == (row in skipped) for row in rows)
    assert sum(scored) == (K + 1) * (len(rows) - len(skipped))  # with the improved completion
    assert len(ranker.requests) == len(rows) - len(skipped)
    agreed = set()
    for row in rows:
        if row["interaction"] == 0:
            agreed.discard(row["prompt"])
        assert (row["failure"] == "already_agreed") == (row["prompt"] in agreed)
        if row["agreement"] == row["black_box_order"] is not None:
            agreed.add(row["prompt"])


def test_texts_beyond_the_limits_are_truncated_and_counted(tmp_path):
    trainer = make_trainer(tmp_path, dataset=prompts(2), max_steps=1, max_prompt_length=4, max_completion_length=5)
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["prompts/cut_ratio"], log["improved/cut_ratio"]) == (1.0, 1.0)
    assert log["completions/max_length"] <= 5
    assert {row["prompt"] for row in read_log(tmp_path)} == set(prompts(2)["prompt"])  # the ranker sees whole prompts


# Errors of the ranker


def test_an_error_of_the_ranker_is_raised(tmp_path):
    class WrongKey:
        def rank(self, requests):
            raise RankerError("wrong key")

    with pytest.raises(RankerError, match="wrong key"):
        make_trainer(tmp_path, WrongKey()).train()


def test_a_step_in_which_the_ranker_raises_is_not_taken(tmp_path):
    class RaisesOnce(DigestRanker):
        fingerprint = None

        def rank(self, requests):
            answers = super().rank(requests)
            if len(self.requests) == 4:  # the second micro-batch
                raise RankerError("wrong key")
            return answers

    trainer = make_trainer(tmp_path, RaisesOnce(), gradient_accumulation_steps=2, stub_generation=True)
    before = weights(trainer)
    with pytest.raises(RankerError, match=r"^wrong key$"):
        trainer.train()
    assert_same_weights(weights(trainer), before)
    assert not list((tmp_path / "interactions").glob("*"))
    trainer.train()
    assert len(read_log(tmp_path)) == 16


def test_a_ranker_that_returns_too_few_answers_raises(tmp_path):
    class NoAnswers:
        def rank(self, requests):
            return []

    with pytest.raises(RankerError, match="NoAnswers was given 2 requests and returned 0 answers"):
        make_trainer(tmp_path, NoAnswers()).train()


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


def test_an_evaluation_changes_neither_training_nor_demonstrations(tmp_path):
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
    assert len(read_log(tmp_path / "True")) == 3 * 2  # evaluations are not logged


def test_metrics_of_several_evaluation_sets_have_their_names(tmp_path):
    sets = {"tea": prompts(2), "milk": prompts(4)}
    trainer = make_trainer(tmp_path, eval_dataset=sets, max_eval_samples=2)
    metrics = trainer.evaluate()
    assert {"eval_tea_agreement/rate", "eval_milk_agreement/rate", "eval_milk_loss"} <= set(metrics)


# Errors


def test_a_missing_prompt_column_raises(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset needs a column 'prompt'; it has \['question'\]"):
        make_trainer(tmp_path, dataset=Dataset.from_list([{"question": "?"}] * 4))
    with pytest.raises(ValueError, match=r"eval_dataset\['tea'\] needs"):
        make_trainer(tmp_path, eval_dataset={"tea": Dataset.from_list([{"question": "?"}])})


def test_a_training_set_smaller_than_one_step_raises(tmp_path):
    with pytest.raises(
        ValueError, match="The training set has 3 prompts, but one optimiser step needs 4 different ones"
    ):
        make_trainer(tmp_path, dataset=prompts(3), gradient_accumulation_steps=2)


def test_a_stream_raises(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(prompts(4)))
    with pytest.raises(ValueError, match=r"train_dataset is a stream.*streaming=True"):
        make_trainer(tmp_path, dataset=stream, max_steps=1)


def test_a_ranker_without_a_rank_method_raises(tmp_path):
    with pytest.raises(TypeError, match=r"ranker must have a method rank\(requests\), and str has none"):
        make_trainer(tmp_path, ranker="gpt-4")


def test_the_default_output_directory_is_named_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.config._name_or_path = "org/tiny"
    model.config.max_position_embeddings = 1024
    trainer = CycleAlignTrainer(model, DigestRanker(), processing_class=make_tokenizer())
    assert isinstance(trainer.args, CycleAlignConfig)
    assert trainer.args.output_dir == "tiny-CycleAlign"
