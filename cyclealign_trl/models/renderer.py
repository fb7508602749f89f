"""Texts to token ids: prompts and completions as the policy reads and writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import maybe_apply_chat_template

from ..types import Prompt, with_completion


@dataclass(frozen=True)
class Renderer:
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
        messages = with_completion(prompt, text)
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False, **self.chat_template_kwargs)
        # Some templates open a turn otherwise than they render a finished one (an empty thinking block, say).
        return str(whole)[len(opened) :] if str(whole).startswith(opened) else text
