"""`DLMATrainer`: the loss, the kinds of references, metrics, resumption, and errors."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from cyclealign_trl import CheckpointError, DLMAConfig, DLMATrainer, dlma_loss
from tests.conftest import make_model, make_tokenizer
from tests.offline.test_ranking_trainer import StopAt

ROWS = [
    {"prompt": f"Say {word}:", "chosen": f" {word}", "rejected": " no way", "self_reward": reward}
    for word, reward in (("hi", 12.0), ("bye", -3.0), ("yes", 55.0), ("well", 1.5))
]
SETTINGS = {
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
KNOWN = ("ref_model", "eval_dataset", "peft_config")


def make_trainer(output_dir, rows=ROWS, model=None, **changes):
    arguments = {name: changes.pop(name) for name in KNOWN if name in changes}
    settings = {"max_prompt_length": 64, "max_completion_length": 16, **SETTINGS, **changes}
    return DLMATrainer(
        make_model() if model is None else model,
        args=DLMAConfig(str(output_dir), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        **arguments,
    )


def logged(trainer, *names):
    return [[log[name] for name in names] for log in trainer.state.log_history if "loss" in log]


def lora(**changes):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **changes)


def test_training_separates_chosen_from_rejected_completions(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS), num_train_epochs=3)
    before = trainer.evaluate()
    # Policy and reference are equal, so their gap is 0 and the loss depends on the clipped self-reward alone.
    losses = [dlma_loss(*torch.zeros(4, 1), torch.tensor([row["self_reward"]])).item() for row in ROWS]
    assert before["eval_loss"] == pytest.approx(sum(losses) / 4)
    assert before["eval_rewards/margins"] == before["eval_rewards/accuracies"] == 0
    assert before["eval_self_reward/mean"] == pytest.approx(65.5 / 4)
    assert (before["eval_self_reward/positive_ratio"], before["eval_self_reward/clipped_ratio"]) == (0.75, 0.25)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.3 * before["eval_loss"]
    assert after["eval_rewards/accuracies"] == 1
    assert after["eval_rewards/margins"] == pytest.approx(
        after["eval_rewards/chosen"] - after["eval_rewards/rejected"]
    )
    rewards = 0.1 * (after["eval_logps/chosen"] - before["eval_logps/chosen"])
    assert after["eval_rewards/chosen"] == pytest.approx(rewards, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # raised by TRL
def test_without_a_margin_it_trains_like_trls_dpo(tmp_path):
    """Compare losses, gradients and metrics in every step."""
    settings = {**SETTINGS, "max_steps": 4, "optim": "adamw_torch", "data_seed": 3, "max_grad_norm": 1.0, "seed": 5}
    rows = [{name: value for name, value in row.items() if name != "self_reward"} for row in ROWS]
    ours = make_trainer(tmp_path / "ours", rows=rows, margin_weight=0, lr_scheduler_type="constant", **settings)
    ours.train()
    folder = tmp_path / "model"  # TRL loads the reference by name
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    args = DPOConfig(str(tmp_path / "trl"), bf16=False, beta=0.1, lr_scheduler_type="constant", **settings)
    theirs = DPOTrainer(str(folder), args=args, train_dataset=Dataset.from_list(rows))
    theirs.train()
    names = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
             "logps/chosen", "logps/rejected")  # fmt: skip
    torch.testing.assert_close(
        torch.tensor(logged(ours, *names)), torch.tensor(logged(theirs, *names)), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["by name", "given", "adapter", "precomputed", "precomputed adapter"])
def test_all_kinds_of_references_train_alike(tmp_path, kind):
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    adapter = {"peft_config": lora()} if "adapter" in kind else {}
    copied = make_trainer(tmp_path / "copied", eval_dataset=Dataset.from_list(ROWS), max_steps=4, **adapter)
    if adapter:  # compare with a copy of the initial policy
        assert copied.ref_model is None
        copied.ref_model = copied._prepare_reference(make_model())
    other = make_trainer(
        tmp_path / "other",
        model=str(folder) if kind == "by name" else None,
        ref_model=make_model() if kind == "given" else None,
        eval_dataset={"some": Dataset.from_list(ROWS)} if kind == "precomputed" else Dataset.from_list(ROWS),
        precompute_ref_log_probs="precomputed" in kind,
        max_steps=4,
        **adapter,
    )
    if "precomputed" in kind:
        assert other.ref_model is None
        assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(other.train_dataset.column_names)
    for trainer in (copied, other):
        trainer.train()
    names = ("loss", "grad_norm", "rewards/margins", "self_reward/mean")
    torch.testing.assert_close(torch.tensor(logged(copied, *names)), torch.tensor(logged(other, *names)))
    evaluated = "eval_some_rewards/margins" if kind == "precomputed" else "eval_rewards/margins"
    assert other.evaluate()[evaluated] == pytest.approx(copied.evaluate()["eval_rewards/margins"], rel=1e-4)


def test_the_reference_keeps_the_initial_weights(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2)
    trainer.train()
    for reference, start in zip(trainer.ref_model.parameters(), make_model().parameters(), strict=True):
        assert torch.equal(reference, start)
    # A copy that still called the policy's patched forward would generate with the policy's weights.
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(trainer.ref_model(input_ids=ids).logits, make_model()(input_ids=ids).logits)


def test_dropout_is_disabled_by_default(tmp_path):
    def dropouts(**changes):
        trainer = make_trainer(tmp_path, peft_config=lora(lora_dropout=0.5), **changes)
        return {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}

    assert dropouts() == {0}
    assert dropouts(disable_dropout=False) == {0.5}


def test_pairs_can_be_conversational(tmp_path):
    def turn(role, text):
        return [{"role": role, "content": text}]

    rows = [
        {"chosen": turn("user", "Hi") + turn("assistant", row["chosen"]), "self_reward": row["self_reward"],
         "rejected": turn("user", "Hi") + turn("assistant", row["rejected"])} for row in ROWS
    ]  # fmt: skip
    trainer = make_trainer(tmp_path, rows=rows, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_sft_weight_adds_the_loss_of_the_chosen_completion(tmp_path):
    alone, both = (
        make_trainer(tmp_path, sft_weight=weight, eval_dataset=Dataset.from_list(ROWS)) for weight in (0, 2)
    )
    without, metrics = alone.evaluate(), both.evaluate()
    assert metrics["eval_sft_loss"] == pytest.approx(-metrics["eval_logps/chosen"])
    assert metrics["eval_loss"] == pytest.approx(without["eval_loss"] + 2 * metrics["eval_sft_loss"], rel=1e-5)


def test_gradient_accumulation_does_not_change_training(tmp_path):
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            num_train_epochs=3,
            optim="sgd",  # RMSprop amplifies rounding errors of small gradients
            learning_rate=0.1,
        )
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path):
    settings = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "resumed", **settings)
    stopped.add_callback(StopAt(5))
    stopped.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    with pytest.raises(CheckpointError, match="reference"):
        make_trainer(tmp_path / "resumed", model=make_model(seed=3), **settings).train(resume_from_checkpoint=True)


def test_a_warm_up_that_is_longer_than_the_run_is_logged(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=2, warmup_steps=1).train()
    assert "warms up" not in caplog.text
    make_trainer(tmp_path, max_steps=2, warmup_steps=150).train()
    assert "over 150 steps, but the run has only 2 and never reaches 0.001. Lower warmup_steps" in caplog.text


def test_the_card_describes_the_training(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for text in ("arxiv.org/abs/2402.11907", "0.2 times the self-reward", "dlma2024", "- dlma\n"):
        assert text in card
    assert "(K - 1)" not in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"prompt": "Q", "chosen": "a", "rejected": "b"}]}, "add_self_rewards.*margin_weight=0"),
        ({"rows": [{"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 1]}]}, "'chosen' and 'rejected'"),
        ({"rows": [{**ROWS[0], "self_reward": float("nan")}]}, "finite numbers, got nan"),
        ({"beta": 0.0}, "beta must be above 0, got 0"),
        ({"margin_weight": -0.1}, "margin_weight must be 0 or more"),
        ({"margin_clip": [40.0, -40.0]}, "a lower and a higher bound"),
        ({"loss_type": "pro"}, "loss_type must be one of 'dlma'"),
    ],
)
def test_invalid_data_and_arguments_raise(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes)


def test_impossible_references_raise(tmp_path):
    model = make_model()
    with pytest.raises(
        ValueError, match=r"are the same object, so the reference would be trained\. Leave ref_model out"
    ):
        make_trainer(tmp_path, model=model, ref_model=model)
    peft = pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match="already has an adapter, so its weights without it are not the initial policy"
    ):
        make_trainer(tmp_path, model=peft.get_peft_model(make_model(), lora()))
    adapted = make_trainer(
        tmp_path, model=peft.get_peft_model(make_model(), lora()), precompute_ref_log_probs=True, max_steps=1
    )
    adapted.train()
    with pytest.raises(ValueError, match="pass them as eval_dataset to the constructor"):
        adapted.evaluate(Dataset.from_list(ROWS))


def test_the_config_can_be_parsed_from_a_command_line(tmp_path):
    from trl import TrlParser

    (config,) = TrlParser((DLMAConfig,)).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--margin_clip", "-20", "20", "--beta", "0.5", "--use_cpu"]
    )
    assert (config.margin_clip, config.beta, config.optim, config.warmup_steps) == ([-20, 20], 0.5, "rmsprop", 150)
    assert {field.name for field in dataclasses.fields(config)} >= {"margin_weight", "precompute_ref_log_probs"}
