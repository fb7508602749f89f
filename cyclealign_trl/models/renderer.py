"""Render prompts and completions with the chat template, and convert them to token ids within the length limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import maybe_apply_chat_template

from ..types import Prompt, with_completion


@dataclass(frozen=True)
class Renderer:
    """Convert prompts and completions of both TRL formats, standard and conversational, to token ids.

    A prompt that is too long keeps its last `max_prompt_length` tokens. A completion that is too long keeps its first
    `max_completion_length` tokens and gets no end-of-sequence token, like a sample that reached the limit.

    Args:
        tokenizer: The policy's tokenizer.
        eos_token_ids: Every id that ends a completion. The first one is appended to completions without any.
        max_prompt_length: Longest prompt in tokens. `None` means no limit.
        max_completion_length: Longest completion in tokens, end-of-sequence token included.
        chat_template_kwargs: Keyword arguments for the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    max_prompt_length: int | None
    max_completion_length: int
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, prompt: Prompt) -> tuple[list[int], bool]:
        """Return the token ids of a prompt, ready to be continued, and whether they were truncated.

        Raises:
            ValueError: If the prompt has no tokens, or is a list of messages and the tokenizer has no chat template.
        """
        # A chat template adds the special tokens itself.
        ids = self._tokenize(self._render(prompt), add_special_tokens=isinstance(prompt, str))
        if not ids:
            raise ValueError(f"The prompt {prompt!r} has no tokens to continue. Remove it from the dataset.")
        limit = self.max_prompt_length
        return (ids, False) if limit is None or len(ids) <= limit else (ids[-limit:], True)

    def completion(self, prompt: Prompt, text: str) -> tuple[list[int], bool]:
        """Return the token ids of a completion with its end-of-sequence token, and whether they were truncated."""
        ids = self._tokenize(text if isinstance(prompt, str) else self._render_completion(prompt, text))
        ends = [position for position, token in enumerate(ids) if token in self.eos_token_ids]
        # Drop what a template adds after the end of the turn (often a line break): the policy never samples it.
        ids = ids[: ends[0] + 1] if ends else [*ids, self.eos_token_ids[0]]
        limit = self.max_completion_length
        return (ids, False) if len(ids) <= limit else (ids[:limit], True)

    def _tokenize(self, text: str, add_special_tokens: bool = False) -> list[int]:
        # `verbose=False` avoids a warning about texts beyond the model's length, which are truncated below.
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _render(self, prompt: Prompt) -> str:
        has_template = self.tokenizer.chat_template is not None or "chat_template" in self.chat_template_kwargs
        if not isinstance(prompt, str) and not has_template:
            raise ValueError(
                "The prompts are lists of messages, but the tokenizer has no chat template. Pass prompts that are "
                "texts (load_hh_rlhf(conversational=False) loads such prompts), or set tokenizer.chat_template."
            )
        rendered = maybe_apply_chat_template({"prompt": prompt}, self.tokenizer, **self.chat_template_kwargs)
        return str(rendered["prompt"])

    def _render_completion(self, prompt: list[dict[str, str]], text: str) -> str:
        """Return the completion with its end-of-turn token, as the template renders it after the prompt."""
        rendered_prompt = self._render(prompt)
        messages = with_completion(prompt, text)
        rendered = str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self.chat_template_kwargs))
        # Some templates render the start of an open turn and of a finished one differently, for example with an empty
        # thinking block in only one of them.
        return rendered[len(rendered_prompt) :] if rendered.startswith(rendered_prompt) else text
