"""Tests that need an accelerator."""

import pytest
import torch

from cyclealign_trl.models.choose_scoring import choose_scoring
from cyclealign_trl.models.logps import add_scoring, sequence_logps
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import make_trainer, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_cyclealign_trains_in_bfloat16(tmp_path):
    trainer = make_trainer(tmp_path, dataset=prompts(4), use_cpu=False)
    assert trainer.args.bf16
    assert trainer.accelerator.device.type == "cuda"
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert trainer.state.log_history[0]["time/backward"] > 0


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_qlora_trains_the_adapter(tmp_path, activation_checkpointing):
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    make_model(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path,
        model=str(tmp_path / "base"),
        dataset=prompts(4),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
        model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
        activation_checkpointing=activation_checkpointing,
        use_cpu=False,
    )
    trainer.train()
    assert all(log["grad_norm"] > 0 for log in trainer.state.log_history if "grad_norm" in log)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_scores_match_the_cpu():
    prompt_ids, completion_ids = [[40, 41, 42], [40, 41, 42], [50]], [[43, 44, 1], [45, 1], [51, 1]]
    sums = []
    for device in ("cpu", "cuda"):
        model = make_model().to(device)
        add_scoring(model)
        scoring = choose_scoring(model, num_completions=2, max_prompt_length=8, max_completion_length=8)
        assert (scoring.fused, scoring.shared is not None) == (True, True)
        scored, _ = sequence_logps(
            model, prompt_ids, completion_ids, pad_token_id=0, device=torch.device(device), scoring=scoring
        )
        sums.append(scored.cpu())
    torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precompute", [False, True])
def test_dlma_generates_pairs_and_trains_on_them(tmp_path, precompute):
    from cyclealign_trl import DLMAConfig, DLMATrainer, generate_contrastive_pairs
    from tests.dlma.test_contrastive_pairs import KIND, TEXTS

    pairs = generate_contrastive_pairs(
        make_model(), TEXTS, KIND, make_tokenizer(), batch_size=2, max_completion_length=12
    )
    args = DLMAConfig(
        str(tmp_path), max_prompt_length=64, max_completion_length=16, per_device_train_batch_size=2, max_steps=3,
        warmup_steps=0, learning_rate=1e-3, logging_steps=1, precompute_ref_log_probs=precompute, report_to="none",
    )  # fmt: skip
    trainer = DLMATrainer(make_model(), args=args, train_dataset=pairs, processing_class=make_tokenizer())
    assert trainer.args.bf16
    trainer.train()
    first = trainer.state.log_history[0]
    assert abs(first["rewards/margins"]) < 1e-3  # policy and reference start equal, also under autocast
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_a_self_reward_ranker_runs_on_the_accelerator(tmp_path):
    from cyclealign_trl import SelfRewardRanker
    from tests.dlma.test_contrastive_pairs import KIND

    ranker = SelfRewardRanker(make_model(), make_tokenizer(), contrastive=KIND)
    trainer = make_trainer(tmp_path, ranker, dataset=prompts(4), use_cpu=False)
    trainer.train()
    assert trainer.state.log_history[0]["agreement/length"] > 0
