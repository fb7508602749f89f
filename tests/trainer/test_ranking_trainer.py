"""The objective against golden values, training on ranked data, wrong use."""

import pytest
import torch
from datasets import Dataset

from cyclealign_trl import RankingConfig, RankingTrainer
from cyclealign_trl.trainer.ranking_trainer import RankingTargets
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
def test_golden_objective(golden, tmp_path, monkeypatch, loss_type, target, weight):
    for case in golden["cyclealign_objective"]:
        inputs, expected = case["inputs"], case["expected"]
        sums, lengths = (torch.tensor(inputs[f"candidate_{name}"]) for name in ("sum_logprob", "num_tokens"))
        size = len(sums)
        ranks = [inputs["black_ranking"].index(index) for index in range(size)]
        coefficient = expected["lambda"][weight] / (size - 1) ** 2
        trainer = make_trainer(tmp_path, loss_type=loss_type, sft_weight=coefficient)
        improved = target == "better_response_sum"
        answers = iter([(sums, lengths), (torch.tensor([inputs["better_sum_logprob"]]), None)])
        monkeypatch.setattr(trainer, "_sequence_logps", lambda *args, answers=answers: next(answers))
        targets = RankingTargets(torch.tensor([ranks]), sft_ids=[[7]] if improved else None)
        monkeypatch.setattr(trainer, "_targets", lambda *args, targets=targets: targets)
        batch = {"prompt_ids": [[5]], "completion_ids": [[[6]] * size]}
        loss = trainer.compute_loss(trainer.model, batch).item()
        assert loss == pytest.approx(expected["total"][f"{loss_type}|{weight}|{target}"], abs=2e-4)


@pytest.mark.parametrize("loss_type", ["pro", "rrhf"])
def test_it_learns_the_ranking(tmp_path, loss_type):
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


def test_the_loss_is_the_sum_of_its_parts(tmp_path):
    trainer = make_trainer(tmp_path, sft_weight=0.5, per_device_train_batch_size=1, max_steps=2)
    trainer.train()
    for log in trainer.state.log_history[:2]:
        factors = [log["loss"] - log["ranking_loss"] - 0.5 * (size - 1) ** 2 * log["sft_loss"] for size in (2, 3)]
        assert min(map(abs, factors)) < 1e-4


def test_without_sft_no_sft_is_computed(tmp_path):
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
    assert batch["ranks"] == [[0, 1]]
    heated = rewarded.compute_loss(rewarded.model, batch)
    plain = ranked.compute_loss(ranked.model, {**batch, "rewards": None})
    assert heated.item() != pytest.approx(plain.item())


def test_conversational_rows_train_the_same_tokens_as_text(tmp_path):
    message = {"role": "user", "content": "Hi"}
    rows = [{"prompt": [message], "completions": [[{"role": "assistant", "content": text}] for text in "ab"]}]
    trainer = make_trainer(tmp_path, rows=[{**rows[0], "ranks": [0, 1]}])
    batch = trainer.data_collator(trainer.train_dataset)
    assert trainer.processing_class.decode(batch["prompt_ids"][0]) == "<user>Hi</s>\n<assistant>"
    assert [trainer.processing_class.decode(ids) for ids in batch["completion_ids"][0]] == ["a</s>", "b</s>"]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_lora_trains_the_adapter_only(tmp_path, activation_checkpointing):
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


def test_a_peft_model_can_be_given(tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))
    make_trainer(tmp_path, model=wrapped, max_steps=1).train()


def test_missing_columns_raise(tmp_path):
    with pytest.raises(ValueError, match=r"'ranks' or 'rewards'; it has \['completions', 'prompt'\]"):
        make_trainer(tmp_path, rows=[{"prompt": "Q", "completions": ["a", "b"]}])


def test_more_tokens_than_positions_raise(tmp_path):
    with pytest.raises(ValueError, match=r"\(250\) .* \(16\) is 266 tokens, but LlamaForCausalLM has 256 positions"):
        make_trainer(tmp_path, max_prompt_length=250)


def test_unset_pad_and_eos_raise(tmp_path):
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.pad_token = tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"no eos_token .* Set tokenizer\.eos_token"):
        RankingTrainer(model, RankingConfig(str(tmp_path), max_prompt_length=64, use_cpu=True), None, None, tokenizer)


def test_an_unset_pad_becomes_eos(tmp_path):
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.pad_token = None
    trainer = RankingTrainer(
        model, RankingConfig(str(tmp_path), max_prompt_length=64, use_cpu=True), processing_class=tokenizer
    )
    assert trainer.processing_class.pad_token_id == model.config.pad_token_id == 1


def test_init_kwargs_for_a_loaded_model_raise(tmp_path):
    with pytest.raises(ValueError, match="pass its name instead"):
        make_trainer(tmp_path, model_init_kwargs={"dtype": "float32"})


def test_a_model_by_name(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = RankingConfig(
        str(tmp_path), max_prompt_length=64, use_cpu=True, model_init_kwargs='{"dtype": "bfloat16"}'
    )
    trainer = RankingTrainer(str(tmp_path / "base"), config)
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.processing_class.eos_token == "</s>"
