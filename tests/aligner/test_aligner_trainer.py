"""Training an aligner."""

import json
import math
import pickle

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from cyclealign_trl import Aligner, AlignerConfig, AlignerTrainer, CheckpointError
from tests.conftest import make_model, make_tokenizer
from tests.offline.test_ranking_trainer import StopAt

ROWS = [{"prompt": f"Q{i}", "answer": "no" * i, "correction": "yes"} for i in range(10)]
TEMPLATE = "{question}|{answer}="


def make_trainer(folder, rows=ROWS, model=None, tokenizer=None, eval_dataset=None, peft_config=None, **changes):
    settings = {
        "aligner_template": TEMPLATE,
        "max_length": 64,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "warmup_fraction": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return AlignerTrainer(
        make_model() if model is None else model,
        AlignerConfig(str(folder), **(settings | changes)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer() if tokenizer is None else tokenizer,
        peft_config=peft_config,
    )


def logged(trainer):
    """Return the logs without timings."""
    timed = ("runtime", "per_second")
    return [
        {name: value for name, value in log.items() if not any(word in name for word in timed)}
        for log in trainer.state.log_history
    ]


def test_golden_loss(golden, tmp_path):
    (case,) = golden["aligner"]["sft_loss"]
    logits, labels = torch.tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["labels"])
    vocabulary = logits.shape[-1]
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=vocabulary, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip
    model.lm_head.weight.data = torch.eye(vocabulary)
    model.model.forward = lambda **_: BaseModelOutputWithPast(
        last_hidden_state=logits
    )  # the head maps them to themselves
    trainer = make_trainer(tmp_path, model=model, activation_checkpointing=False)
    batch = {"input_ids": labels.clamp(min=0), "labels": labels, "attention_mask": torch.ones_like(labels)}
    assert trainer.compute_loss(model, batch).item() == pytest.approx(case["expected"]["loss_token_mean"], abs=1e-5)
    assert (labels[:, 1:] != -100).sum() == case["expected"]["num_label_tokens"]


# Data


def test_labels_are_the_correction_and_its_end_of_sequence_token(tmp_path):
    trainer = make_trainer(
        tmp_path, rows=[{"prompt": "Q", "answer": " no ", "correction": "yes\n"}], warmup_fraction=1
    )
    decode = trainer.processing_class.decode
    identity, correction = trainer.train_dataset
    for row, target in ((identity, "no"), (correction, "yes")):
        assert decode(row["input_ids"]) == f"Q|no={target}</s>"
        assert decode([label for label in row["labels"] if label != -100]) == f"{target}</s>"
        assert row["labels"][:5] == [-100] * 5


def test_messages_and_texts_have_the_same_tokens(tmp_path):
    rows = [{
        "prompt": [{"role": "user", "content": "Q"}],
        "answer": [{"role": "assistant", "content": "no"}],
        "correction": [{"role": "assistant", "content": "yes"}],
    }]  # fmt: skip
    as_text = make_trainer(tmp_path, rows=[{"prompt": "Q", "answer": "no", "correction": "yes"}], warmup_fraction=1)
    as_messages = make_trainer(tmp_path, rows=rows, warmup_fraction=1)
    for column in ("input_ids", "labels"):
        assert list(as_messages.train_dataset[column]) == list(as_text.train_dataset[column])


def test_a_long_row_loses_its_question_or_is_dropped(tmp_path, caplog):
    rows = [
        {"prompt": "Q" * 30, "answer": "a", "correction": "b"},
        {"prompt": "Q", "answer": "a" * 30, "correction": "b"},
        {"prompt": "Q", "answer": "a", "correction": "b"},
    ]
    trainer = make_trainer(tmp_path, rows=rows, max_length=10, warmup_fraction=0)
    texts = trainer.processing_class.batch_decode(list(trainer.train_dataset["input_ids"]))
    assert texts == [f"{'Q' * 5}|a=b</s>", "Q|a=b</s>"]
    assert "1 of 3 rows of the train dataset do not fit into max_length=10 tokens" in caplog.text
    with pytest.raises(ValueError, match="No correction fits into max_length=10 tokens"):
        make_trainer(tmp_path, rows=[{**rows[2], "correction": "b" * 30}], max_length=10, warmup_fraction=1)
    with pytest.raises(ValueError, match="No row is left"):
        make_trainer(tmp_path, rows=rows[1:2], max_length=10, warmup_fraction=0)


def test_evaluation_has_no_warmup_rows(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS[:3]))
    assert len(trainer.eval_dataset) == 3
    assert {trainer.processing_class.decode(row["input_ids"][-4:]) for row in trainer.eval_dataset} == {"yes</s>"}
    metrics = trainer.evaluate(Dataset.from_list(ROWS[3:5]))
    assert {"eval_loss", "eval_mean_token_accuracy", "eval_entropy"} <= set(metrics)


# Order


class RecordingTrainer(AlignerTrainer):
    """Trainer that records the texts it trains on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            texts = self.processing_class.batch_decode(inputs["input_ids"], skip_special_tokens=True)
            self.texts.append(texts)
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_trains_on_the_warmup_first_and_logs_it(tmp_path):
    rows = Dataset.from_list(ROWS)
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, eval_strategy="epoch", eval_dataset=rows)
    trainer.__class__ = RecordingTrainer
    trainer.texts = []
    trainer.train()
    # With 4 rows per step, 5 warm-up rows take 2 steps, and an epoch of 10 rows takes 3.
    assert trainer.state.global_step == trainer.state.max_steps == 2 + 2 * 3
    texts = [text for batch in trainer.texts for text in batch]
    assert all(text == f"Q{i}|{'no' * i}={'no' * i}" for text in texts[:8] for i in [int(text[1])])
    assert all(text.endswith("=yes") for text in texts[8:])
    corrected = {f"Q{i}|{'no' * i}=yes" for i in range(10)}
    assert set(texts[8:20]) == set(texts[20:]) == corrected
    logs = [log for log in logged(trainer) if "loss" in log]
    assert [log["identity_warmup"] for log in logs] == [1.0] * 2 + [0.0] * 6
    assert {"loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens"} <= set(logs[0])
    evaluated = [log["epoch"] for log in logged(trainer) if "eval_loss" in log]
    assert evaluated == pytest.approx([1, 2, 8 / 3])


def test_one_learning_rate_schedule_spans_both_phases(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1, warmup_steps=0)
    trainer.train()
    steps = trainer.state.global_step
    assert steps == 3 + 5
    rates = [log["learning_rate"] for log in logged(trainer) if "learning_rate" in log]
    cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    assert rates == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize(("settings", "steps"), [({"max_steps": 4}, 4), ({"num_train_epochs": 0.5}, 3 + 3)])
def test_stops_after_max_steps_or_a_fraction_of_an_epoch(tmp_path, settings, steps):
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.state.global_step == steps


def test_training_without_warmup(tmp_path):
    trainer = make_trainer(tmp_path, warmup_fraction=0.0)
    trainer.train()
    assert trainer.state.global_step == 2 * 5
    assert len(trainer.train_dataset) == 10


def test_learns_to_correct(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=20, learning_rate=1e-2, eval_dataset=Dataset.from_list(ROWS))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.05 < before["eval_loss"]
    assert after["eval_mean_token_accuracy"] == 1.0


def test_gradient_accumulation_does_not_change_the_weights(tmp_path):
    trainers = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainers.append(make_trainer(tmp_path / str(size), **sizes))
        trainers[-1].train()
    for trainer in trainers[1:]:
        for parameter, expected in zip(trainer.model.parameters(), trainers[0].model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)


# Checkpoints


@pytest.mark.parametrize("stop", [2, 9], ids=["in the warm-up", "in the second epoch"])
def test_a_resumed_run_ends_like_an_uninterrupted_run(tmp_path, stop):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert whole.state.global_step == 3 + 2 * 5
    killed = make_trainer(tmp_path / "killed", **settings)
    killed.add_callback(StopAt(stop))
    killed.train()
    resumed = make_trainer(tmp_path / "killed", model=make_model(seed=3), **settings)
    resumed.train(resume_from_checkpoint=True)
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    losses, expected = ([log["loss"] for log in logged(trainer) if "loss" in log] for trainer in (resumed, whole))
    assert losses == expected


def test_resuming_with_other_data_raises(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=4).train()
    for changes in ({"warmup_fraction": 0.2}, {"aligner_template": "labels"}, {"rows": ROWS[:9]}):
        with pytest.raises(CheckpointError, match="cannot be resumed with changed settings"):
            make_trainer(tmp_path, max_steps=4, **changes).train(resume_from_checkpoint=True)


def test_saves_the_template_with_the_model_and_its_checkpoints(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        assert json.loads((folder / "aligner_template.json").read_text()) == {"text": TEMPLATE}
        assert Aligner.from_pretrained(folder, device="cpu").template == trainer.template


def test_trains_saves_and_loads_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    trainer = AlignerTrainer(
        str(tmp_path / "base"),
        AlignerConfig(
            str(tmp_path / "out"), aligner_template=TEMPLATE, max_length=64, learning_rate=3e-2, max_steps=60,
            per_device_train_batch_size=5, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        ),
        Dataset.from_list(ROWS),
        peft_config=peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj", "up_proj"]),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    aligner = Aligner.from_pretrained(tmp_path / "out", device="cpu", generation_kwargs={"do_sample": False})
    prompts, answers = (list(Dataset.from_list(ROWS)[column]) for column in ("prompt", "answer"))
    assert aligner.correct(prompts, answers).count("yes") >= 8
    aligner.save_pretrained(tmp_path / "again")
    again = Aligner.from_pretrained(tmp_path / "again", device="cpu", generation_kwargs={"do_sample": False})
    assert again.correct(prompts, answers) == aligner.correct(prompts, answers)


# Publishing


def test_model_card(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train()
    trainer.create_model_card(dataset="aligner/aligner-20K", license="apache-2.0")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for text in (
        "[Aligner](https://arxiv.org/abs/2402.02416)",
        f'Aligner.from_pretrained("{tmp_path.name}")',
        "| identity warm-up | 50% of the rows |",
        "| optimiser steps | 4 |",
        "| training | 10 rows of `answer`, `correction`, `prompt` |",
        TEMPLATE,
        "aligner2024",
    ):
        assert text in card
    assert (tmp_path / "aligner_template.json").is_file()


def test_tokens_are_not_pickled(tmp_path):
    config = AlignerConfig(str(tmp_path), hub_token="hf_secret", use_cpu=True)
    assert b"hf_secret" not in pickle.dumps(config)
    with pytest.raises(ValueError, match="must not contain a token"):
        AlignerConfig(str(tmp_path), model_init_kwargs={"token": "hf_secret"}, use_cpu=True)


# Invalid arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_fraction": 1.5}, "from 0 to 1, got 1.5"),
        ({"aligner_template": "nothing"}, "exactly once"),
        ({"packing": True}, "packing must be False"),
        ({"completion_only_loss": False}, "correction alone"),
        ({"train_sampling_strategy": "group_by_length"}, "must be 'random', got 'group_by_length'"),
        ({"max_length": 300}, "300 tokens, but LlamaForCausalLM has 256 positions"),
        ({"max_steps": 3}, "max_steps is 3, but the identity warm-up alone takes 3 steps"),
        ({"model_init_kwargs": {"dtype": "float32"}}, "Pass its name instead"),
        ({"rows": [{"prompt": "Q", "completion": "A"}]}, r"got \['completion', 'prompt'\]"),
        ({"eval_dataset": Dataset.from_list([{"prompt": "Q"}])}, r"eval_dataset needs the columns"),
        ({"eval_dataset": Dataset.from_list(ROWS).to_iterable_dataset()}, "eval_dataset is a stream"),
    ],
)
def test_invalid_arguments_raise(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes)


def test_missing_rows_or_end_of_sequence_token_raise(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is missing"):
        AlignerTrainer(make_model(), AlignerConfig(str(tmp_path), use_cpu=True))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        make_trainer(tmp_path, tokenizer=tokenizer)


def test_activation_checkpointing_is_on_by_default_and_either_name_turns_it_off(tmp_path):
    assert AlignerConfig(str(tmp_path), use_cpu=True).activation_checkpointing is True
    assert AlignerConfig(str(tmp_path), use_cpu=True, activation_checkpointing=False).gradient_checkpointing is False
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        config = AlignerConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=False)
    assert config.activation_checkpointing is False
