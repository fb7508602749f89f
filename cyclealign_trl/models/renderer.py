"""Render prompts and completions with the chat template, and convert them to token ids within the length limits."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import maybe_apply_chat_template

from .._warnings import OnceLogger
from ..types import Prompt, with_completion
from .special_text import TextEncoder

logger = logging.getLogger(__name__)

_QUESTION, _REPLY = "Sentinel question", "Sentinel reply"
_CONTEXT = 32
"""Characters before a completion that can change its first tokens, by a large margin."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Text that a chat template writes around an assistant's reply.

    Args:
        opening: Text before the first message, without a beginning-of-sequence token.
        opened: A conversation up to the open turn.
        before: Text between an open turn and the reply.
        after: Text after the reply.
        end: Text of the token that ends the turn. `None` if the template writes none.
        end_id: Id of that token.
        parts: Whether the template accepts only lists of parts as contents.
    """

    opening: str = ""
    opened: str = ""
    before: str = ""
    after: str = ""
    end: str | None = None
    end_id: int | None = None
    parts: bool = False

    @property
    def before_end(self) -> str:
        """Text between the reply and the token that ends the turn, such as a space."""
        return "" if self.end is None else self.after.partition(self.end)[0]


def read_turn(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None) -> Turn:
    """Render a conversation to find out what the chat template of a tokenizer writes around a reply.

    A tokenizer without a chat template, or a template that does not accept the conversation, gives an empty `Turn`.
    """
    if tokenizer.chat_template is None:
        return Turn()
    # Some templates require a system message, and some of models that also read images accept only lists of parts.
    for parts, system in itertools.product((False, True), (False, True)):
        turn = _read_turn(tokenizer, chat_template_kwargs or {}, parts, system)
        if turn is not None:
            return turn
    return Turn()


def _read_turn(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any], parts: bool, system: bool
) -> Turn | None:
    """Return what the chat template writes around a reply, or `None` if it does not show question and reply."""
    question = [{"role": "system", "content": "Sentinel system"}] if system else []
    question.append({"role": "user", "content": _QUESTION})
    kwargs = {**chat_template_kwargs, "tokenize": False}
    conversation = [*question, {"role": "assistant", "content": _REPLY}]
    try:
        opened = str(tokenizer.apply_chat_template(
            _in_parts(question, parts), **{**kwargs, "add_generation_prompt": True}
        ))  # fmt: skip
        finished = str(tokenizer.apply_chat_template(_in_parts(conversation, parts), **kwargs))
    except (TemplateError, TypeError, ValueError):
        return None
    before, found, after = finished.rpartition(_REPLY)
    if not found or _QUESTION not in opened:
        return None
    opening = opened.partition("Sentinel system" if system else _QUESTION)[0].removeprefix(tokenizer.bos_token or "")
    before = before[len(opened) :] if before.startswith(opened) else ""
    end_id = _find_end(tokenizer, after)
    end = None if end_id is None else tokenizer.convert_ids_to_tokens(end_id)
    return Turn(opening, opened, before, after, end, end_id, parts)


def _in_parts(messages: list[dict[str, Any]], parts: bool) -> list[dict[str, Any]]:
    """Return messages with their texts as lists of one part, if `parts` is true."""
    if not parts:
        return messages
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _find_end(tokenizer: PreTrainedTokenizerBase, after: str) -> int | None:
    """Return the id of the token that ends a turn, given the text after the reply."""
    ids = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"] if after else []
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    candidates = [index for index in ids if index in special] or [index for index in ids if index in added]
    return candidates[0] if candidates else None


class Renderer:
    """Convert prompts and completions of both TRL formats, standard and conversational, to token ids.

    A prompt that is too long keeps its last `max_prompt_length` tokens. A completion that is too long keeps its first
    `max_completion_length` tokens and gets no end-of-sequence token, like a sample that reached the limit.

    Completions and contents of messages are text, so special tokens that are spelled out in them are plain characters.
    In a plain-text prompt they are markup if the prompt is a rendered conversation: if it starts or ends with a
    special token, or starts as the chat template does.

    Args:
        tokenizer: The policy's tokenizer.
        eos_token_ids: Every id that ends a completion. The first one ends plain-text completions.
        max_prompt_length: Longest prompt in tokens. `None` means no limit.
        max_completion_length: Longest completion in tokens, end-of-sequence token included.
        chat_template_kwargs: Keyword arguments for the chat template.
        max_positions: Number of the model's positions. If `max_prompt_length` is `None`, a prompt that leaves too few
            positions for a completion raises.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        max_prompt_length: int | None,
        max_completion_length: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_positions: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.max_completion_length = max_completion_length
        self.max_positions = max_positions
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        self._turns: dict[str | None, Turn] = {}
        self._decoded_turns: dict[Turn, tuple[str, str]] = {Turn(): ("", "")}
        end_id = self._turn.end_id
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if end_id is None else [end_id])]))
        self._encoder = TextEncoder(tokenizer, self.eos_token_ids)
        self._once = OnceLogger(logger)

    def prompt(self, prompt: Prompt, tools: Any = None) -> tuple[list[int], bool]:
        """Return the token ids of a prompt, ready to be continued, and whether they were truncated.

        Args:
            prompt: Text or messages.
            tools: Tools for the chat template, as a list of functions' schemas or as JSON text.

        Raises:
            ValueError: If the prompt has no tokens or too many for the model, or is a list of messages and the
                tokenizer has no chat template, or one that rejects them.
        """
        ids = self._encoder.encode(self._open(prompt, tools))
        if not ids:
            raise ValueError(f"The prompt {prompt!r} has no tokens to continue. Remove it from the dataset.")
        if isinstance(prompt, str):  # a chat template writes the special tokens itself
            opening = self._encoder.opening
            ids = ids if ids[: len(opening)] == opening else [*opening, *ids]
        limit = self.max_prompt_length
        if limit is None:
            self._check_length(len(ids))
            return ids, False
        return (ids, False) if len(ids) <= limit else (ids[-limit:], True)

    def completion(self, prompt: Prompt, text: str, tools: Any = None) -> tuple[list[int], bool]:
        """Return the token ids of a completion with its end-of-sequence token, and whether they were truncated."""
        return self.completions(prompt, [text], tools)[0]

    def completions(self, prompt: Prompt, texts: Sequence[str], tools: Any = None) -> list[tuple[list[int], bool]]:
        """Return the token ids of several completions of a prompt; see `completion`."""
        opened = self._open(prompt, tools)
        context = opened[self._context_start(opened) :]
        context_ids = self._encoder.encode(context)
        encoded = []
        for text in texts:
            end_id = self.eos_token_ids[0]
            if isinstance(prompt, str):
                text = self._encoder.mark(self._without_end(text))
            else:
                text = self._reply(prompt, opened, text, tools)
                end_id = end_id if self._turn.end_id is None else self._turn.end_id
            ids = [*self._encoder.encode_after(context, text, context_ids), end_id]
            limit = self.max_completion_length
            encoded.append((ids, False) if len(ids) <= limit else (ids[:limit], True))
        return encoded

    def decode(self, prompt: Prompt, completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of sampled completions of a prompt, without their end-of-sequence tokens.

        This is the inverse of `completion`: a text keeps the space that separates it from a plain-text prompt, and
        loses what the chat template writes around a reply.
        """
        ended = [bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids]
        texts = self._decode([ids[:-1] if end else ids for ids, end in zip(completion_ids, ended, strict=True)])
        if isinstance(prompt, str):
            return texts
        before, before_end = self._decoded_around_reply
        before = "" if prompt[-1]["role"] == "assistant" else before  # the reply continues this message
        return [
            text.removeprefix(before).removesuffix(before_end if end else "")
            for text, end in zip(texts, ended, strict=True)
        ]

    # Text

    @property
    def _turn(self) -> Turn:
        template = self.tokenizer.chat_template if isinstance(self.tokenizer.chat_template, str) else None
        if template not in self._turns:
            self._turns[template] = read_turn(self.tokenizer, self._chat_template_kwargs)
        return self._turns[template]

    def _open(self, prompt: Prompt, tools: Any) -> str:
        """Return a prompt as text that a completion continues, with special tokens in its contents marked."""
        if isinstance(prompt, str):
            return prompt if self._is_rendered(prompt) else self._encoder.mark(prompt)
        if self.tokenizer.chat_template is None and "chat_template" not in self._chat_template_kwargs:
            raise ValueError(
                "The prompts are lists of messages, but the tokenizer has no chat template. Pass prompts that are "
                "texts (load_hh_rlhf(conversational=False) loads such prompts), or set chat_template to a Jinja file "
                "or to a model that has one."
            )
        with _naming_roles(prompt):
            rendered = maybe_apply_chat_template(
                {"prompt": _in_parts(self._encoder.mark_messages(prompt), self._turn.parts)},
                self.tokenizer,
                parse_tools(tools),
                **self._chat_template_kwargs,
            )
        return str(rendered["prompt"])

    def _is_rendered(self, prompt: str) -> bool:
        """Return whether a plain-text prompt contains the markup of a conversation."""
        if self._encoder.mark(prompt) == prompt:
            return False
        opening = self._turn.opening.strip()
        return self._encoder.starts_or_ends_special(prompt) or (opening != "" and prompt.lstrip().startswith(opening))

    def _reply(self, prompt: list[dict[str, str]], opened: str, text: str, tools: Any) -> str:
        """Return a completion as the chat template writes it after the prompt, up to the token that ends the turn."""
        turn, text = self._turn, self._encoder.mark(text)
        messages = with_completion(self._encoder.mark_messages(prompt), text)
        with _naming_roles(messages):
            rendered = str(
                self.tokenizer.apply_chat_template(
                    _in_parts(messages, turn.parts),
                    tools=parse_tools(tools) or None,
                    tokenize=False,
                    **self._chat_template_kwargs,
                )
            )
        # Some templates render the start of an open turn and of a finished one differently, for example with an empty
        # thinking block in only one of them.
        rest = rendered[len(opened) :] if rendered.startswith(opened) else text + turn.after
        if rest.endswith(text + turn.after):
            return rest[: len(rest) - len(turn.after)] + turn.before_end
        self._once.warning(
            "rewritten",
            "The chat template changes completions, for example %r. They are trained on as they are, followed by the "
            "end of the turn.",
            self._encoder.unmark(text)[:80],
        )
        tag = re.match(r"<[^<>]*>|\[[^\[\]]*\]", turn.before.strip())
        before = "" if tag and text.lstrip().startswith(tag[0]) else turn.before  # the text brings a block of its own
        return before + text + turn.before_end

    def _without_end(self, text: str) -> str:
        """Return a plain-text completion without the end-of-sequence token that it may spell out at its end."""
        for token in self.tokenizer.convert_ids_to_tokens(list(self.eos_token_ids)):
            if token and text.endswith(token) and self._encoder.mark(token) != token:
                self._once.warning(
                    "spelled_out",
                    "Completions end with the text %r, which counts as their end-of-sequence token.",
                    token,
                )
                return text.removesuffix(token)
        return text

    # Token ids

    def _context_start(self, opened: str) -> int:
        """Return where to cut a prompt so that its end is enough to tokenise a completion after it."""
        special = self._encoder.last_special(opened)
        # Text is tokenised piece by piece between special tokens, and pieces do not reach far beyond a space.
        space = opened.rfind(" ", special, max(special, len(opened) - _CONTEXT))
        return special if space < 0 else space

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        # Some tokenizers remove the first space of what they decode, so decode a letter before it.
        letter_ids = self._encoder.encode("a")
        letter, *texts = self.tokenizer.batch_decode(
            [letter_ids, *([*letter_ids, *ids] for ids in rows)], skip_special_tokens=True
        )
        return [text.removeprefix(letter) for text in texts]

    @property
    def _decoded_around_reply(self) -> tuple[str, str]:
        """Text that decoding shows before and after a reply, inside of an assistant's turn."""
        turn = self._turn
        if turn not in self._decoded_turns:
            ids = self._encoder.encode_after(turn.opened, turn.before + _REPLY + turn.before_end)
            before, found, after = self._decode([ids])[0].partition(_REPLY)
            self._decoded_turns[turn] = (before, after) if found else ("", "")
        return self._decoded_turns[turn]

    def _check_length(self, length: int) -> None:
        positions = self.max_positions
        if positions is not None and length + self.max_completion_length > positions:
            longest = max(1, positions - self.max_completion_length)
            raise ValueError(
                f"The prompt has {length} tokens, which leaves no room for a completion of "
                f"{self.max_completion_length} tokens in the {positions} positions of the model. Set "
                f"max_prompt_length to {longest} (longer prompts lose their beginning), or remove the prompt."
            )


@contextmanager
def _naming_roles(messages: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Turn an error of the chat template into a `ValueError` that names the roles of the messages."""
    try:
        yield
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(
            f"The chat template rejects messages with the roles {roles}: {error}. Change these messages, or set "
            "tokenizer.chat_template to a template that accepts them."
        ) from error


def parse_tools(tools: Any) -> Any:
    """Return the tools of a row, as TRL reads them: JSON text is parsed, and fields that Arrow filled are removed."""
    return _without_none(json.loads(tools) if isinstance(tools, str) and tools else tools or None)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(entry) for name, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value
