"""Evaluation of the demo's policy on held-out questions."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models.generation_backend import seeded
from ..models.transformers_backend import generate
from .corpus import questions, score

_MAX_NEW_TOKENS = 48


@dataclass(frozen=True, slots=True)
class HeldOutSamples:
    """Several completions of each held-out question, and the mean of their scores."""

    completions: list[tuple[str, list[str]]]
    score: float


def sample_held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0, num_samples: int = 16
) -> HeldOutSamples:
    """Sample `num_samples` completions of each held-out question, the same for the same weights and seed."""
    held_out = questions("held_out")
    prompt_ids = [
        list(tokenizer.apply_chat_template(_user(question), add_generation_prompt=True)["input_ids"])
        for question in held_out
        for _ in range(num_samples)
    ]
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=_MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(seed, model.device):
        completion_ids = generate(model, prompt_ids, config, model.device)
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    completions = [
        (question, texts[index * num_samples : (index + 1) * num_samples]) for index, question in enumerate(held_out)
    ]
    return HeldOutSamples(
        completions, fmean(score(question, text) for question, texts in completions for text in texts)
    )


def _user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]
