"""Flawed answers with known corrections, out of the demo's corpus: what a tiny aligner learns from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from .corpus import KINDS, Dialogue, Kind, dialogues, improve, questions


def correction_rows(num: int, seed: int, good_share: float = 0.2) -> Dataset:
    """Rows of `prompt`, `answer`, `correction` for `AlignerTrainer`.

    Args:
        num: How many.
        seed: Seed of questions and answers.
        good_share: Part of the answers that have full marks, and are their own correction.
    """
    rng = random.Random(seed)  # noqa: S311 (no secret is made here)
    rows = []
    for dialogue in dialogues(num, seed):
        correction = improve(dialogue.question, dialogue.reply)
        answer = correction if rng.random() < good_share else dialogue.reply
        rows.append({"prompt": _messages(dialogue.question), "answer": answer, "correction": correction})
    return Dataset.from_list(rows)


def good_answers(seed: int) -> tuple[list[list[dict[str, str]]], list[str]]:
    """The held-out questions, and to each an answer with full marks."""
    held_out = questions("held_out")
    return [_messages(question) for question in held_out], [improve(question, str(seed)) for question in held_out]


def policy_rows(num: int, seed: int, kinds: Sequence[Kind] = KINDS) -> Dataset:
    """Rows of `prompt` and `completion`, for a policy that answers in these kinds only."""
    drawn = (dialogue for dialogue in dialogues(num * len(KINDS) * 2, seed) if dialogue.kind in kinds)
    return Dataset.from_list([_row(dialogue) for dialogue, _ in zip(drawn, range(num), strict=False)])


def tiny_llama(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A Llama of random weights, small enough to learn the corpus on a CPU in a minute or two.

    Args:
        tokenizer: Its tokenizer.
        seed: Seed of the weights. The global random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def vocabulary(sentences: Iterable[str], template: str) -> list[str]:
    """What a tokenizer of an aligner is trained on: each sentence at the start of a text and within it."""
    return [template, *(f"{sentence} {sentence}" for sentence in sentences)]


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _row(dialogue: Dialogue) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": _messages(dialogue.question),
        "completion": [{"role": "assistant", "content": dialogue.reply}],
    }
