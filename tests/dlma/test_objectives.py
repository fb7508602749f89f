"""Every objective has the loss and the gradients of the plain forward pass, with any scoring."""

import dataclasses

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from cyclealign_trl.models.logps import PLAIN
from tests.conftest import make_model
from tests.cycle.stubs import DigestRanker, prompts
from tests.cycle.stubs import make_trainer as make_cycle
from tests.dlma.test_dlma_trainer import ROWS as PAIRS
from tests.dlma.test_dlma_trainer import make_trainer as make_dlma
from tests.offline.test_ranking_trainer import make_trainer as make_ranking

RANKED = [
    {"prompt": "Say hi:", "completions": [" hi", " go away", " ...", " hi there"], "ranks": [0, 2, 1, 0]},
    {"prompt": "Say bye:", "completions": [" bye", " no"], "ranks": [0, 1]},
    {"prompt": "Say yes:", "completions": [" a", " b", " c"], "ranks": [0, 0, 0]},
]
"""Ties, absent completions, and a prompt without an order."""
REWARDED = [{**row, "rewards": [-float(rank) for rank in row["ranks"]]} for row in RANKED]


def make_gemma2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "max_position_embeddings": 256}
    caps = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": None, "initializer_range": 0.2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **caps, **special))


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


MODELS = {
    "llama": {},
    "tied": {"model": lambda: make_model(tie_word_embeddings=True)},
    "soft-cap and window": {"model": make_gemma2},
    "adapter": {"peft_config": lora},
    "activation checkpointing": {"activation_checkpointing": lambda: True},
}
OBJECTIVES = {
    "pro": lambda folder, **changes: make_ranking(folder, RANKED, loss_type="pro", **changes),
    "pro with rewards": lambda folder, **changes: make_ranking(folder, REWARDED, loss_type="pro", **changes),
    "rrhf": lambda folder, **changes: make_ranking(folder, RANKED, loss_type="rrhf", **changes),
    "dlma": lambda folder, **changes: make_dlma(folder, PAIRS, sft_weight=0.1, **changes),
}


def loss_and_gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = [each.grad.flatten() for each in trainer.model.parameters() if each.grad is not None]
    return loss.detach(), torch.cat(gradients)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_equal_those_of_the_plain_forward_pass(tmp_path, objective, model):
    changes = {name: make() for name, make in MODELS[model].items()}
    trainer = OBJECTIVES[objective](tmp_path, **changes)
    chosen = trainer._scoring
    assert chosen.fused
    assert chosen.shared is not None
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset)[:3])
    results = []
    for scoring in (chosen, dataclasses.replace(chosen, shared=None), PLAIN):
        trainer._scoring = trainer._reference_scoring = scoring
        results.append(loss_and_gradients(trainer, batch))
    *others, (expected, expected_gradients) = results
    for loss, gradients in others:
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        assert (gradients - expected_gradients).norm() <= 1e-4 * expected_gradients.norm()


@pytest.mark.parametrize("rank_improved_completion", [False, True])
def test_a_cycle_learns_the_same_with_any_scoring(tmp_path, rank_improved_completion):
    weights = []
    for scoring in (None, PLAIN):
        trainer = make_cycle(
            tmp_path / str(scoring), DigestRanker(), dataset=prompts(4), num_interactions=2, stub_generation=True,
            rank_improved_completion=rank_improved_completion,
        )  # fmt: skip
        trainer._scoring = scoring or trainer._scoring
        trainer.train()
        weights.append(torch.cat([each.detach().flatten() for each in trainer.model.parameters()]))
    assert (weights[0] - weights[1]).norm() <= 1e-4 * weights[1].norm()
