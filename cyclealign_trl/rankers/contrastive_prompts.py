"""Pairs of prompts that ask for a good and for a bad completion (DLMA, arXiv 2402.11907)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ..types import Prompt

Placement = Literal["reply", "system"]


@dataclass(frozen=True, slots=True)
class ContrastivePrompts:
    """Descriptions of a good and of a bad completion, and the place where they are inserted into a prompt.

    A model rewards a completion that it makes likelier under the positive prompt than under the negative one.

    Placement `"reply"` inserts the description in parentheses close to the completion. In a plain-text dialogue, that
    is the tag of the open turn: `Assistant (a kind reply):`. Other plain text gets the description appended, and a
    conversation gets it at the end of the last user message.

    Placement `"system"` inserts a sentence at the beginning: in the system message of a conversation, or as the first
    line of plain text.

    Args:
        positive: Description of a good completion, as a noun phrase such as "a kind reply".
        negative: Description of a bad completion.
        placement: `"reply"` or `"system"`.

    Raises:
        ValueError: If a description is empty, both are equal, or `placement` is unknown.

    Example:
        >>> prompts = ContrastivePrompts("a kind reply", "a rude reply")
        >>> prompts.apply("Human: Hello!\\n\\nAssistant:")[0]
        'Human: Hello!\\n\\nAssistant (a kind reply):'
    """

    positive: str
    negative: str
    placement: Placement = "reply"

    def __post_init__(self) -> None:
        if not (self.positive.strip() and self.negative.strip()):
            raise ValueError(f"positive and negative must not be empty, got {self.positive!r} and {self.negative!r}.")
        if self.positive == self.negative:
            raise ValueError(f"positive and negative must differ, got {self.positive!r} for both.")
        if self.placement not in get_args(Placement):
            raise ValueError(f"placement must be one of {get_args(Placement)}, got {self.placement!r}.")

    @classmethod
    def harmless(cls, placement: Placement = "reply") -> ContrastivePrompts:
        """Contrast law-abiding, considerate completions with illegal, hurtful ones."""
        return cls(
            "a harmless reply that keeps to the law, does right by others and insults nobody",
            "a harmful reply that breaks the law, does wrong to others and insults them",
            placement,
        )

    @classmethod
    def helpful(cls, placement: Placement = "reply") -> ContrastivePrompts:
        """Contrast useful completions with useless ones."""
        return cls(
            "a helpful reply that gives the person what they need",
            "an unhelpful reply that is of no use to the person",
            placement,
        )

    @classmethod
    def of(cls, value: ContrastivePrompts | Mapping[str, str] | str) -> ContrastivePrompts:
        """Convert a name (`"harmless"`, `"helpful"`) or a mapping of the arguments.

        Raises:
            ValueError: If the name is unknown, or if the mapping has missing or unknown keys.
        """
        if isinstance(value, ContrastivePrompts):
            return value
        if value == "harmless":
            return cls.harmless()
        if value == "helpful":
            return cls.helpful()
        if isinstance(value, Mapping) and {"positive", "negative"} <= value.keys() <= set(cls.__slots__):
            return cls(**value)  # type: ignore[arg-type]
        raise ValueError(
            "Contrastive prompts must be 'harmless', 'helpful', or a mapping with the keys positive, negative and, "
            f"optionally, placement, got {value!r}."
        )

    def apply(self, prompt: Prompt) -> tuple[Prompt, Prompt]:
        """Return the prompt twice: asking for a good completion, and asking for a bad one."""
        insert = _insert_at_start if self.placement == "system" else _insert_before_reply
        return insert(prompt, self.positive), insert(prompt, self.negative)


def _insert_at_start(prompt: Prompt, description: str) -> Prompt:
    sentence = f"Write {description}."
    if isinstance(prompt, str):
        return f"{sentence}\n\n{prompt.lstrip()}"
    first, *rest = prompt
    if first["role"] == "system":
        return [{**first, "content": f"{sentence}\n\n{first['content']}"}, *rest]
    return [{"role": "system", "content": sentence}, *prompt]


def _insert_before_reply(prompt: Prompt, description: str) -> Prompt:
    if isinstance(prompt, str):
        before, colon, after = prompt.rpartition(":")
        if colon and not after.strip():  # an open turn, such as "Assistant:"
            return f"{before} ({description}):{after}"
        return f"{prompt.rstrip()} ({description})\n"
    user_turns = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    if not user_turns:
        raise ValueError(f"A conversational prompt needs a user message to insert the description into: {prompt!r}.")
    last = user_turns[-1]
    message = {**prompt[last], "content": f"{prompt[last]['content']} ({description})"}
    return [*prompt[:last], message, *prompt[last + 1 :]]
