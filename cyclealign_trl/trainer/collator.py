"""From texts to token ids: prompts and completions as the policy reads and writes them, and batches of both.

Batches stay plain Python lists: a float that passes through the Trainer's input preparation is cast to the training
dtype under DeepSpeed, and lengths, not token ids, say what is padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import is_conversational, maybe_apply_chat_template, maybe_extract_prompt

from ..losses import ABSENT
from ..types import Prompt, ranks_from_scores


@dataclass(frozen=True)
class TextEncoder:
    """Tokenises prompts and completions of both TRL formats, standard and conversational.

    One rule for what is too long: a prompt keeps its last `max_prompt_length` tokens, a completion its first
    `max_completion_length` and then no end-of-sequence token, like a sample that ran out of room.

    Args:
        tokenizer: The policy's tokenizer.
        eos_token_ids: Every id that ends a completion; the first is the one appended to plain text.
        max_prompt_length: In tokens; `None` for no limit.
        max_completion_length: In tokens, end-of-sequence token included.
        chat_template_kwargs: Keyword arguments for the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    max_prompt_length: int | None
    max_completion_length: int
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, prompt: Prompt) -> tuple[list[int], bool]:
        """Token ids of a prompt, ready to be continued, and whether it had to be cut."""
        # A chat template writes its own special tokens.
        ids = self._tokenize(self._render(prompt), add_special_tokens=isinstance(prompt, str))
        if not ids:
            raise ValueError(f"A prompt has no tokens, so nothing can be sampled after it: {prompt!r}.")
        limit = self.max_prompt_length
        return (ids, False) if limit is None or len(ids) <= limit else (ids[-limit:], True)

    def completion(self, prompt: Prompt, text: str) -> tuple[list[int], bool]:
        """Token ids of a completion with its end-of-sequence token, and whether it had to be cut."""
        ids = self._tokenize(text if isinstance(prompt, str) else self._render_reply(prompt, text))
        ends = [position for position, token in enumerate(ids) if token in self.eos_token_ids]
        # What a template writes after the end of the turn (often a line break) is never sampled.
        ids = ids[: ends[0] + 1] if ends else [*ids, self.eos_token_ids[0]]
        limit = self.max_completion_length
        return (ids, False) if len(ids) <= limit else (ids[:limit], True)

    def _tokenize(self, text: str, add_special_tokens: bool = False) -> list[int]:
        # Not verbose: a text beyond the model's length is no reason to warn where it is about to be cut.
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _render(self, prompt: Prompt) -> str:
        rendered = maybe_apply_chat_template({"prompt": prompt}, self.tokenizer, **self.chat_template_kwargs)
        return str(rendered["prompt"])

    def _render_reply(self, prompt: Prompt, text: str) -> str:
        """The reply with its end-of-turn token, as the template writes it behind the prompt."""
        assert not isinstance(prompt, str)
        opened = self._render(prompt)
        *turns, last = prompt
        if last["role"] == "assistant":  # the prompt ends in a prefilled reply, which this one continues
            messages = [*turns, {**last, "content": last["content"] + text}]
        else:
            messages = [*prompt, {"role": "assistant", "content": text}]
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False, **self.chat_template_kwargs)
        # Some templates open a turn otherwise than they render a finished one (an empty thinking block, say).
        return str(whole)[len(opened) :] if str(whole).startswith(opened) else text


@dataclass(frozen=True)
class PromptCollator:
    """Batches prompt-only rows into `{"prompt", "metadata", "prompt_ids", "prompt_cut"}`, a list of B entries each."""

    encoder: TextEncoder

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        encoded = [self.encoder.prompt(row["prompt"]) for row in rows]
        return {
            "prompt": [row["prompt"] for row in rows],
            "metadata": [{name: value for name, value in row.items() if name != "prompt"} for row in rows],
            "prompt_ids": [ids for ids, _ in encoded],
            "prompt_cut": [cut for _, cut in encoded],
        }


@dataclass(frozen=True)
class RankingCollator:
    """Batches ranked or preference rows.

    A row has `prompt`, `completions`, and `ranks` (0 = best) or `rewards` (largest = best) or both; or `chosen` and
    `rejected`, with `prompt` or with the prompt as what both begin with. Rows with fewer completions are filled up
    with absent ones (no tokens, rank -1, reward 0).

    Returns:
        `{"prompt_ids", "completion_ids", "ranks", "rewards", "prompt_cut", "completion_cut"}`: lists of B prompts, of
        B x K completions, ranks and rewards, of B flags and of one flag per completion that is there, in a flat list;
        `rewards` is `None` unless all rows have them.

    Raises:
        ValueError: If a row has another number of ranks or rewards than of completions, or a completion is neither a
            text nor one assistant message.
    """

    encoder: TextEncoder

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [ranked_row(row) for row in rows]
        width = max(len(row["completions"]) for row in rows)
        batch: dict[str, Any] = {
            name: [] for name in ("prompt_ids", "completion_ids", "ranks", "rewards", "prompt_cut", "completion_cut")
        }
        for row in rows:
            prompt_ids, prompt_cut = self.encoder.prompt(row["prompt"])
            completions = [self.encoder.completion(row["prompt"], text) for text in row["completions"]]
            missing = width - len(completions)
            batch["prompt_ids"].append(prompt_ids)
            batch["prompt_cut"].append(prompt_cut)
            batch["completion_ids"].append([ids for ids, _ in completions] + [[] for _ in range(missing)])
            batch["completion_cut"].extend(cut for _, cut in completions)
            batch["ranks"].append([*row["ranks"], *[ABSENT] * missing])
            batch["rewards"].append(None if row["rewards"] is None else [*row["rewards"], *[0.0] * missing])
        without = sum(rewards is None for rewards in batch["rewards"])
        if 0 < without < len(rows):  # what a row trains on must not depend on its neighbours
            raise ValueError(
                f"Of {len(rows)} rows, {without} have no rewards: give rewards for all rows, or for none."
            )
        if without:
            batch["rewards"] = None
        return batch


def ranked_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in the one form that is trained on: prompt, texts, ranks, and rewards or `None`."""
    if "completions" not in row:
        pair = maybe_extract_prompt(dict(row))
        texts = [completion_text(pair["chosen"]), completion_text(pair["rejected"])]
        return {"prompt": pair["prompt"], "completions": texts, "ranks": [0, 1], "rewards": None}
    texts = [completion_text(completion) for completion in row["completions"]]
    rewards, ranks = row.get("rewards"), row.get("ranks")
    for name, values in (("ranks", ranks), ("rewards", rewards)):
        if values is not None and len(values) != len(texts):
            raise ValueError(f"A row has {len(texts)} completions but {len(values)} {name}.")
    if rewards is not None and not all(
        isinstance(reward, int | float) and math.isfinite(reward) for reward in rewards
    ):
        raise ValueError(f"Rewards must be finite numbers, got {rewards}; the prompt is {row['prompt']!r}.")
    if ranks is None:
        if rewards is None:
            raise ValueError(f"A row has neither ranks nor rewards; its prompt is {row['prompt']!r}.")
        ranks = ranks_from_scores(rewards)
    if not all(isinstance(rank, int) and rank >= ABSENT for rank in ranks):
        raise ValueError(
            f"Ranks must be integers, 0 = best and {ABSENT} = absent, got {ranks}; the prompt is {row['prompt']!r}."
        )
    return {"prompt": row["prompt"], "completions": texts, "ranks": ranks, "rewards": rewards}


def completion_text(completion: Any) -> str:
    """A completion's text: the completion itself, or the content of its one assistant message."""
    if isinstance(completion, str):
        return completion
    if not (is_conversational({"completion": completion}) and len(completion) == 1):
        raise ValueError(f"A completion must be a text or a list of one assistant message, got {completion!r}.")
    return str(completion[0]["content"])
