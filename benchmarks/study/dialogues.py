"""Choose the dialogues of the study: the same pairs for every training, the same prompts for every evaluation."""

from __future__ import annotations

import random

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cyclealign_trl.evaluation.prompts import PromptSet, read_prompts
from cyclealign_trl.types import Prompt

from .scales import Scale
from .splits import load_part


def training_pairs(hh_rlhf: str, tokenizer: PreTrainedTokenizerBase, scale: Scale) -> Dataset:
    """Return `scale.calls` pairs of the policy part, in random order, none of which would be truncated.

    No two prompts end in the same user message, by which the judge's endpoint recognises a prompt.

    Raises:
        ValueError: If the part has too few pairs.
    """
    rows = load_part("policy", hh_rlhf)
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    pairs: dict[str, dict[str, Prompt]] = {}
    for index in order:
        row = rows[index]
        completions = [row[name][0]["content"] for name in ("chosen", "rejected")]
        # One token stays free for the end of the sequence.
        fits = all(len(tokenizer(text)["input_ids"]) < scale.max_completion_length for text in completions)
        if fits and prompt_length(tokenizer, row["prompt"]) <= scale.max_prompt_length:
            pair = {name: row[name] for name in ("prompt", "chosen", "rejected")}
            pairs.setdefault(row["prompt"][-1]["content"], pair)
        if len(pairs) == scale.calls:
            return Dataset.from_list(list(pairs.values()))
    raise ValueError(f"The policy part has {len(pairs)} pairs that are short enough, and {scale.calls} are needed.")


def evaluation_prompts(hh_rlhf: str, tokenizer: PreTrainedTokenizerBase, scale: Scale) -> PromptSet:
    """Return up to `scale.evaluation_prompts` prompts of each subset of the evaluation part."""
    rows = load_part("evaluation", hh_rlhf)
    fitting = (row for row in rows if prompt_length(tokenizer, row["prompt"]) <= scale.max_prompt_length)
    return read_prompts(fitting, max_samples=scale.evaluation_prompts)


def prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> int:
    """Return the number of tokens of a prompt in the chat template."""
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
