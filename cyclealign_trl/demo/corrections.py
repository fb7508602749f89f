"""Flawed answers with known corrections, out of the demo's corpus: what a tiny aligner learns from."""

from __future__ import annotations

import random

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ..aligner.aligner_template import DEFAULT_TEMPLATE, TEMPLATES
from ..types import Prompt
from .corpus import dialogues, improve, questions, sentences
from .policy import build_tokenizer, llama_config


def correction_rows(num: int, seed: int, good_share: float = 0.3) -> Dataset:
    """Rows of `prompt`, `answer`, `correction` for `AlignerTrainer`, about training questions.

    Args:
        num: How many.
        seed: Seed of questions and answers.
        good_share: Part of the answers that have full marks, and are their own correction.
    """
    rng = random.Random(seed)  # noqa: S311 (no secret is made)
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


def tiny_aligner(seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model of random weights, of the policy's size, and its tokenizer, which knows the default template.

    Args:
        seed: Seed of the weights. The global random state is left as it was.
    """
    # Each sentence twice, as its first word differs at the start of a text and within it.
    texts = [TEMPLATES[DEFAULT_TEMPLATE], *(f"{sentence} {sentence}" for sentence in sentences())]
    tokenizer = build_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama_config(tokenizer)), tokenizer


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]
