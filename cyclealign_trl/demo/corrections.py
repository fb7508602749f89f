"""Flawed answers with known corrections, out of the demo's corpus: what a tiny aligner learns from."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..aligner_template import DEFAULT_TEMPLATE, TEMPLATES
from ..types import Prompt
from .corpus import KINDS, Dialogue, Kind, dialogues, improve, questions, sentences
from .policy import build_tokenizer


def correction_rows(num: int, seed: int, good_share: float = 0.3) -> Dataset:
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


def good_answers(num: int) -> tuple[list[Prompt], list[str]]:
    """Each held-out question `num` times, with answers that have full marks."""
    prompts: list[Prompt] = []
    answers = []
    for question in questions("held_out"):
        prompts += [_messages(question)] * num
        answers += [improve(question, str(index)) for index in range(num)]
    return prompts, answers


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


def corpus_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the whole corpus, and for the default template of an aligner around it."""
    # Each sentence twice, as its first word differs at the start of a text and within it.
    return build_tokenizer([TEMPLATES[DEFAULT_TEMPLATE], *(f"{sentence} {sentence}" for sentence in sentences())])


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _row(dialogue: Dialogue) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": _messages(dialogue.question),
        "completion": [{"role": "assistant", "content": dialogue.reply}],
    }
