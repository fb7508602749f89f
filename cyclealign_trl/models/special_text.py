"""Tokenise texts in which special tokens are markup in some places and plain text in others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

# Characters for private use, which no text contains. They enclose the number of a special token.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARKED = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class TextEncoder:
    """Tokenise texts, and keep what users and models write apart from markup.

    A tokenizer reads the characters `</s>` as the end-of-sequence token wherever they occur. `mark` changes such
    characters in a text that is not markup. `encode` reads marked characters as plain text.

    Args:
        tokenizer: The tokenizer.
        special_ids: Ids of tokens to treat as special even if the tokenizer does not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        also_special = {*special_ids, *getattr(tokenizer, "all_special_ids", ())}
        # Only added tokens are matched in a text. A special token of the base vocabulary can be an ordinary character.
        self._tokens = {
            index: str(token)
            for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
            if str(token) and (token.special or index in also_special)
        }
        self._ids = {text: index for index, text in self._tokens.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._marked_or_special = re.compile("|".join([_MARKED.pattern, *map(re.escape, longest_first)]))

    # Text

    def mark(self, text: str) -> str:
        """Mark the special tokens in a text as plain text."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: f"{_OPEN}{self._ids[match[0]]}{_CLOSE}", text)

    def mark_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Mark the special tokens in the contents of messages as plain text."""
        return [
            {**message, "content": self.mark(message["content"])}
            if isinstance(message.get("content"), str)
            else dict(message)
            for message in messages
        ]

    def unmark(self, text: str) -> str:
        """Return a marked text as it was."""
        return _MARKED.sub(lambda match: self._tokens[int(match[1])], text)

    def starts_or_ends_special(self, text: str) -> bool:
        """Return whether a text starts or ends with a special token, white space aside."""
        text = text.strip()
        return any(text.startswith(token) or text.endswith(token) for token in self._ids)

    def last_special(self, text: str) -> int:
        """Return the position of the last special token in a text, or 0."""
        if self._pattern is None:
            return 0
        return max((match.start() for match in self._pattern.finditer(text)), default=0)

    # Token ids

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens that the tokenizer would add."""
        if _OPEN not in text:
            # `verbose=False` avoids a warning about texts beyond the model's length, which are truncated later.
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if self._renamed is None:
            return self._encode_parts(text)
        renamed, original_ids = self._renamed
        ids: list[int] = renamed.encode(self._swap_names(text), add_special_tokens=False).ids
        return [original_ids.get(index, index) for index in ids]

    def encode_after(self, context: str, text: str, context_ids: list[int] | None = None) -> list[int]:
        """Return the token ids of a text after a context, which are those of both together if they split there.

        Args:
            context: The text before it, or its end.
            text: The text.
            context_ids: Token ids of the context, if they are known.
        """
        context_ids = self.encode(context) if context_ids is None else context_ids
        ids = self.encode(context + text)
        if ids[: len(context_ids)] == context_ids:
            return ids[len(context_ids) :]
        # A token would span both. Tokenise the text alone, but not as the beginning of a text, where some tokenizers
        # insert a space.
        for letter in ("\n", "a", ")"):
            letter_ids, ids = self.encode(letter), self.encode(letter + text)
            if ids[: len(letter_ids)] == letter_ids:
                return ids[len(letter_ids) :]
        return self.encode(text)

    @property
    def opening(self) -> list[int]:
        """Token ids that the tokenizer puts before a text, such as a beginning-of-sequence token."""
        return self._added[0]

    @property
    def closing(self) -> list[int]:
        """Token ids that the tokenizer puts after a text, such as an end-of-sequence token."""
        return self._added[1]

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        plain = self.encode("x")
        ids = list(self.tokenizer("x", verbose=False)["input_ids"])
        for start in range(len(ids)):
            if ids[start : start + len(plain)] == plain:
                return ids[:start], ids[start + len(plain) :]
        return [], []

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]] | None:
        """The tokenizer with other names for its special tokens, and ids of theirs that have changed.

        Under other names, a special token in the text matches nothing, not even an entry of the vocabulary.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        definition = json.loads(backend.to_str())
        names = {text: f"{_OPEN}{index}{_CLOSE}" for text, index in self._ids.items()}
        for entry in definition["added_tokens"]:
            entry["content"] = names.get(entry["content"], entry["content"])
        _rename_vocabulary(definition["model"], names)
        definition |= {"truncation": None, "padding": None}
        renamed = Tokenizer.from_str(json.dumps(definition))
        new_ids = {renamed.token_to_id(name): self._ids[text] for text, name in names.items()}
        return renamed, {new: old for new, old in new_ids.items() if new is not None and new != old}

    def _swap_names(self, text: str) -> str:
        """Give markup the names of the renamed tokenizer, and marked text its characters back."""
        return self._marked_or_special.sub(
            lambda match: self._tokens[int(match[1])] if match[1] else f"{_OPEN}{self._ids[match[0]]}{_CLOSE}",
            text,
        )

    def _encode_parts(self, text: str) -> list[int]:
        """Tokenise markup and marked text one by one, for tokenizers that are written in Python."""
        ids: list[int] = []
        for position, part in enumerate(_MARKED.split(text)):
            part = self._tokens[int(part)] if position % 2 else part
            options = {"split_special_tokens": True} if position % 2 else {}
            ids += (
                self.tokenizer(part, add_special_tokens=False, verbose=False, **options)["input_ids"] if part else []
            )
        return ids


def _rename_vocabulary(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename entries of the vocabulary of a tokenizer's model, except for those that its merges make."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram
        for entry in vocabulary:
            entry[0] = names.get(entry[0], entry[0])
        return
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ())
    used = {text for merge in merges for text in (*merge, "".join(merge))}
    renamed = {text: name for text, name in names.items() if text not in used}
    if vocabulary is not None:
        model["vocab"] = {renamed.get(text, text): index for text, index in vocabulary.items()}
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
