"""`RankingTrainer`: the objective against golden values, training, resumption, metrics, and errors."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from cyclealign_trl import CycleAlignConfig, RankingConfig, RankingTrainer
from cyclealign_trl.offline.ranking_collator import RankedBatch
from cyclealign_trl.offline.ranking_trainer import RankingTargets, _top_ranked
from tests.conftest import make_model, make_tokenizer

ROWS = [
    {"prompt": "Say hi:", "completions": [" hi", " go away", " ..."], "ranks": [0, 2, 1]},
    {"prompt": "Say bye:", "completions": [" bye", " no"], "ranks": [0, 1]},
]


def make_trainer(tmp_path, rows=ROWS, model=None, peft_config=None, eval_dataset=None, **changes):
    settings = {
        "max_prompt_length": 64,
        "max_completion_length": 16,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RankingTrainer(
        make_model() if model is None else model,
        RankingConfig(str(tmp_path), **(settings | changes)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("loss_type", ["pro", "rrhf"])
@pytest.mark.parametrize("target", ["top_ranked_sum", "better_response_sum"])
@pytest.mark.parametrize("weight", ["pro_rule_0.05(n-1)^2", "square_rule_(n-1)^2", "one"])
def test_the_objective_matches_golden_values(golden, tmp_path, monkeypatch, loss_type, target, weight):
    for case in golden["cyclealign_objective"]:
        inputs, expected = case["inputs"], case["expected"]
        sums, lengths = (torch.tensor(inputs[f"candidate_{name}"]) for name in ("sum_logprob", "num_tokens"))
        size = len(sums)
        ranks = [inputs["black_ranking"].index(index) for index in range(size)]
        coefficient = expected["lambda"][weight] / (size - 1) ** 2
        trainer = make_trainer(tmp_path, loss_type=loss_type, sft_weight=coefficient)
        improved = target == "better_response_sum"
        answers = iter([(sums, lengths), (torch.tensor([inputs["better_sum_logprob"]]), torch.tensor([1]))])
        monkeypatch.setattr(trainer, "_sequence_logps", lambda *args, answers=answers: next(answers))
        targets = RankingTargets(torch.tensor([ranks]), sft_ids=[[7]] if improved else None)
        monkeypatch.setattr(trainer, "_targets", lambda *args, targets=targets: targets)
        batch = RankedBatch([[5]], [[[6]] * size], [ranks], None, [False], [False] * size)
        loss = trainer.compute_loss(trainer.model, batch).item()
        assert loss == pytest.approx(expected["total"][f"{loss_type}|{weight}|{target}"], abs=2e-4)


@pytest.mark.parametrize("loss_type", ["pro", "rrhf"])
def test_training_lowers_both_losses(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, loss_type=loss_type, max_steps=15, eval_dataset=Dataset.from_list(ROWS))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_ranking_loss"] < 0.5 * before["eval_ranking_loss"]
    assert after["eval_sft_loss"] < 0.5 * before["eval_sft_loss"]
    logged = trainer.state.log_history[1]
    assert {"loss", "ranking_loss", "sft_loss", "time/forward", "time/backward"} <= set(logged)


def test_predictions_are_scores_and_ranks(tmp_path):
    trainer = make_trainer(tmp_path)
    predictions = trainer.predict(Dataset.from_list(ROWS))
    assert predictions.predictions.shape == (2, 3)
    assert predictions.label_ids.tolist() == [[0, 2, 1], [0, 1, -1]]
    assert "test_ranking_loss" in predictions.metrics
    evaluated = trainer.evaluate(Dataset.from_list(ROWS[:1]))
    assert evaluated["eval_ranking_loss"] != pytest.approx(predictions.metrics["test_ranking_loss"])


def test_the_loss_is_the_ranking_loss_plus_weighted_sft(tmp_path):
    trainer = make_trainer(tmp_path, sft_weight=0.5, per_device_train_batch_size=1, max_steps=2)
    trainer.train()
    for log in trainer.state.log_history[:2]:
        factors = [log["loss"] - log["ranking_loss"] - 0.5 * (size - 1) ** 2 * log["sft_loss"] for size in (2, 3)]
        assert min(map(abs, factors)) < 1e-4


def test_gradient_accumulation_does_not_change_training(tmp_path):
    rows = [{**row, "prompt": f"{number} {row['prompt']}"} for number in range(4) for row in (ROWS[0], ROWS[0])]
    trainers = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainers.append(make_trainer(tmp_path / str(batch_size), rows=rows, num_train_epochs=2, **sizes))
        trainers[-1].train()
    names = ("loss", "ranking_loss", "sft_loss", "ranking/accuracy", "ranking/margin", "grad_norm")
    whole, *others = (
        [[log[name] for name in names] for log in trainer.state.log_history[:-1]] for trainer in trainers
    )
    assert len(whole) == 4
    for other in others:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(whole), rtol=1e-4, atol=1e-5)
    for trainer in trainers[1:]:
        for parameter, expected in zip(trainer.model.parameters(), trainers[0].model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path):
    rows = [{**row, "prompt": f"{number} {row['prompt']}"} for number in range(3) for row in ROWS]
    settings = {"rows": rows, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "resumed", **settings)
    stopped.add_callback(StopAt(5))
    stopped.train()
    resumed = make_trainer(tmp_path / "resumed", model=make_model(seed=3), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 9
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


class StopAt(TrainerCallback):
    """Stop a run at a step, without saving a checkpoint there."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        control.should_save = control.should_save and state.global_step != self.step


def test_a_weight_of_zero_turns_sft_off(tmp_path):
    trainer = make_trainer(tmp_path, sft_weight=0.0, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["ranking_loss"])
    assert "sft_loss" not in log


def test_rewards_give_ranks_and_temperatures(tmp_path):
    ranked = make_trainer(tmp_path)
    rewarded = make_trainer(
        tmp_path, rows=[{"prompt": "Say hi:", "completions": [" hi", " go away"], "rewards": [3.0, 0.5]}]
    )
    batch = rewarded.data_collator(rewarded.train_dataset)
    assert batch.ranks == [[0, 1]]
    with_temperature = rewarded.compute_loss(rewarded.model, batch)
    plain = ranked.compute_loss(ranked.model, dataclasses.replace(batch, rewards=None))
    assert with_temperature.item() != pytest.approx(plain.item())


PAIR = {"prompt": "Say hi:", "chosen": " hi", "rejected": " go away"}


def test_a_preference_pair_trains_as_two_ranked_completions(tmp_path):
    as_messages = [{"role": "user", "content": "Hi"}], *([{"role": "assistant", "content": text}] for text in "ab")
    prompt, chosen, rejected = as_messages
    for rows, equivalent in (
        ([PAIR], [{"prompt": "Say hi:", "completions": [" hi", " go away"], "ranks": [0, 1]}]),
        (
            [{"prompt": prompt, "chosen": chosen, "rejected": rejected}],
            [{"prompt": prompt, "completions": [chosen, rejected], "ranks": [0, 1]}],
        ),
        (  # without a prompt column
            [{"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]}],
            [{"prompt": prompt, "completions": [chosen, rejected], "ranks": [0, 1]}],
        ),
    ):
        trainers = [make_trainer(tmp_path, rows=data) for data in (rows, equivalent)]
        batches = [trainer.data_collator(list(trainer.train_dataset)) for trainer in trainers]
        assert batches[0] == batches[1]
    trainer = make_trainer(tmp_path, rows=[PAIR] * 2, max_steps=10)
    trainer.train()
    assert trainer.state.log_history[-2]["ranking/accuracy"] == 1.0


def test_accuracy_and_margin_compare_the_policys_scores_with_the_ranks(tmp_path, monkeypatch):
    rows = [
        {"prompt": "A", "completions": ["a", "b", "c"], "ranks": [0, 1, 2]},
        {"prompt": "B", "completions": ["a", "b", "c"], "ranks": [1, 0, 1]},  # a tie: two pairs
        {"prompt": "C", "completions": ["a", "b"], "ranks": [1, 0]},
        {"prompt": "D", "completions": ["a"], "ranks": [0]},  # no pair
    ]
    scores = {"A": [-1.0, -3.0, -2.0], "B": [-1.0, -2.0, -4.0], "C": [-2.0, -1.5], "D": [-9.0]}
    trainer = make_trainer(tmp_path, rows=rows, eval_dataset=Dataset.from_list(rows), per_device_eval_batch_size=3)

    def stub(model, prompt_ids, completion_ids):
        asked = [scores[trainer.processing_class.decode(ids)] for ids in prompt_ids]
        position = [index for start in range(0, len(asked), width) for index in range(width)]
        flat = [row[index] if index < len(row) else 0.0 for row, index in zip(asked, position, strict=True)]
        return torch.tensor(flat), torch.ones(len(flat))

    width = 3
    monkeypatch.setattr(trainer, "_sequence_logps", stub)
    first = trainer.evaluate(Dataset.from_list(rows[:3]))
    # pairs of A: a>b +2, a>c +1, b>c -1; of B: b>a -1, b>c +2; of C: b>a +0.5
    assert first["eval_ranking/accuracy"] == pytest.approx(4 / 6)
    assert first["eval_ranking/margin"] == pytest.approx(3.5 / 6)
    width = 1
    alone = trainer.evaluate(Dataset.from_list(rows[3:]))
    assert "eval_ranking/accuracy" not in alone
    assert alone["eval_ranking_loss"] == 0.0


def test_metrics_are_means_over_prompts_not_batches(tmp_path):
    whole = make_trainer(tmp_path, rows=ROWS * 3, per_device_eval_batch_size=6)
    parts = make_trainer(tmp_path, rows=ROWS * 3, per_device_eval_batch_size=4)  # a batch of 4 and one of 2
    expected, measured = (trainer.evaluate(trainer.train_dataset) for trainer in (whole, parts))
    for name in ("eval_ranking_loss", "eval_sft_loss", "eval_ranking/accuracy", "eval_ranking/margin"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-5), name


def test_truncated_prompts_and_completions_are_logged(tmp_path):
    rows = [
        {"prompt": "Q" * 70, "completions": ["a" * 20, "b"], "ranks": [0, 1]},
        {"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 1]},
    ]
    measured = make_trainer(tmp_path, rows=rows).evaluate(Dataset.from_list(rows))
    assert measured["eval_prompts/cut_ratio"] == 0.5
    assert measured["eval_completions/clipped_ratio"] == 0.25


def test_a_first_row_that_cannot_be_read_raises(tmp_path):
    for row, message in (
        ({"prompt": "Q", "completions": ["a", "b"], "ranks": [0]}, "2 completions but 1 ranks"),
        ({"prompt": "", "completions": ["a", "b"], "ranks": [0, 1]}, "The prompt '' has no tokens to continue"),
        ({"prompt": "Q", "completions": [["a"], ["b"]], "ranks": [0, 1]}, "one assistant message"),
        ({"prompt": "Q", "completions": ["a", "b"], "ranks": None, "rewards": None}, "neither ranks nor rewards"),
        ({"prompt": "Q", "completions": ["a", "b"], "rewards": [float("nan"), 1.0]}, "must be finite numbers"),
        ({"prompt": "Q", "completions": ["a", "b"], "ranks": [0, -2]}, "must be integers"),
        ({"prompt": "Q", "completions": ["a", "b"], "ranks": [0, None]}, "must be integers"),
    ):
        with pytest.raises(ValueError, match=f"first row of train_dataset cannot be used: .*{message}"):
            make_trainer(tmp_path, rows=[row])
    with pytest.raises(ValueError, match=r"first row of eval_dataset\['held-out'\]"):
        make_trainer(tmp_path, eval_dataset={"held-out": Dataset.from_list([{**ROWS[0], "ranks": [1]}])})


def test_rewards_for_some_rows_only_raise(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="Of 2 rows, 1 have no rewards"):
        trainer.data_collator([ROWS[0], {**ROWS[1], "rewards": [1.0, 0.0]}])


def test_a_stream_raises(tmp_path):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match="eval_dataset is a stream"):
        make_trainer(tmp_path, eval_dataset=stream)


def test_a_token_in_model_init_kwargs_raises(tmp_path):
    with pytest.raises(ValueError, match=r"model_init_kwargs must not contain a token, .* set HF_TOKEN") as error:
        make_trainer(tmp_path, model_init_kwargs={"token": "hf_secret"})
    assert "hf_secret" not in str(error.value)


def test_conversational_rows_are_rendered_with_the_chat_template(tmp_path):
    message = {"role": "user", "content": "Hi"}
    rows = [{"prompt": [message], "completions": [[{"role": "assistant", "content": text}] for text in "ab"]}]
    trainer = make_trainer(tmp_path, rows=[{**rows[0], "ranks": [0, 1]}])
    batch = trainer.data_collator(trainer.train_dataset)
    assert trainer.processing_class.decode(batch.prompt_ids[0]) == "<user>Hi</s>\n<assistant>"
    assert [trainer.processing_class.decode(ids) for ids in batch.completion_ids[0]] == ["a</s>", "b</s>"]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_lora_trains_only_the_adapter(tmp_path, activation_checkpointing):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(
        tmp_path,
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"]),
        activation_checkpointing=activation_checkpointing,
        max_steps=2,
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_peft_model_can_be_passed(tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))
    make_trainer(tmp_path, model=wrapped, max_steps=1).train()


def test_missing_columns_raise(tmp_path):
    with pytest.raises(ValueError, match=r"'ranks' or 'rewards'; .* It has \['completions', 'prompt'\]"):
        make_trainer(tmp_path, rows=[{"prompt": "Q", "completions": ["a", "b"]}])


def test_lengths_beyond_the_models_positions_raise(tmp_path):
    with pytest.raises(ValueError, match=r"\(250\) .* \(16\) is 266 tokens, but LlamaForCausalLM has 256 positions"):
        make_trainer(tmp_path, max_prompt_length=250)


def test_a_tokenizer_without_pad_and_eos_token_raises(tmp_path):
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.pad_token = tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"no eos_token .* Set tokenizer\.eos_token"):
        RankingTrainer(model, RankingConfig(str(tmp_path), max_prompt_length=64, use_cpu=True), None, None, tokenizer)


def test_a_missing_pad_token_becomes_the_eos_token(tmp_path):
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.pad_token = None
    trainer = RankingTrainer(
        model, RankingConfig(str(tmp_path), max_prompt_length=64, use_cpu=True), processing_class=tokenizer
    )
    assert trainer.processing_class.pad_token_id == model.config.pad_token_id == 1


def test_model_init_kwargs_with_a_loaded_model_raise(tmp_path):
    with pytest.raises(ValueError, match=r"no effect on a loaded model\. Pass the model's name instead"):
        make_trainer(tmp_path, model_init_kwargs={"dtype": "float32"})


def test_a_model_is_loaded_by_name(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = RankingConfig(
        str(tmp_path), max_prompt_length=64, use_cpu=True, model_init_kwargs='{"dtype": "bfloat16"}'
    )
    trainer = RankingTrainer(str(tmp_path / "base"), config)
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.processing_class.eos_token == "</s>"


REFUSED = {
    "dispatch_batches": ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
    "label_smoothing_factor": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    "group_by_length": ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
    "liger without its package": ({"use_liger_kernel": True}, "pip install liger-kernel"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_batches_of_lists_cannot_follow_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RankingConfig(str(tmp_path), use_cpu=True, **settings)
    with pytest.raises(ValueError, match=message):
        CycleAlignConfig(str(tmp_path), use_cpu=True, **settings)


def test_the_cycle_refuses_a_sequential_order(tmp_path):
    RankingConfig(str(tmp_path), use_cpu=True, train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match="train_sampling_strategy must be one of 'random'"):
        CycleAlignConfig(str(tmp_path), use_cpu=True, train_sampling_strategy="sequential")


def test_tied_completions_are_not_imitated(tmp_path):
    tied = [{"prompt": "Say hi:", "completions": [" hi", " go away"], "ranks": [0, 0]}]
    trainer = make_trainer(tmp_path, rows=tied)
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(tied))
    assert loss.item() == 0
    loss.backward()
    assert all((parameter.grad == 0).all() for parameter in trainer.model.parameters() if parameter.grad is not None)
    assert torch.equal(before, trainer.model.model.embed_tokens.weight)


@pytest.mark.parametrize("ranks", [[0, 0, 1], [0, 1, 0], [2, 5, 2]])
def test_of_several_best_completions_the_policy_imitates_the_one_it_prefers(ranks):
    sums, scores = torch.tensor([[-6.0, -9.0, -2.0]]), torch.tensor([[-3.0, -3.0, -1.0]])
    best = [index for index, rank in enumerate(ranks) if rank == min(ranks)]
    expected = sums[0, max(best, key=lambda index: scores[0, index].item())]
    assert _top_ranked(sums, scores, torch.tensor([ranks])) == expected
