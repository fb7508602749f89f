"""Contrastive prompts: the same request twice, once asking for a good reply and once for a bad one.

What a model makes likelier under the one than under the other, it takes to be good (DLMA, arXiv 2402.11907). No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ..types import Prompt

Placement = Literal["reply", "system"]


@dataclass(frozen=True, slots=True)
class ContrastivePrompts:
    """Two descriptions of a coming reply, and how a prompt asks for it.

    Placement `"reply"` puts the description in parentheses next to the reply: into the open tag of a plain-text
    dialogue (`Assistant (a kind reply):`), else behind the text; in a conversation, whose tags are the template's,
    behind the last user message. Placement `"system"` asks for it in a sentence at the very beginning: in the system
    message of a conversation, or on a line of its own.

    Args:
        positive: Describes a good reply, as a noun phrase: "a kind reply".
        negative: Describes a bad one.
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
            raise ValueError(f"Both descriptions must say something; got {self.positive!r} and {self.negative!r}.")
        if self.positive == self.negative:
            raise ValueError(f"positive and negative are the same, {self.positive!r}: they would contrast nothing.")
        if self.placement not in get_args(Placement):
            raise ValueError(f"placement must be one of {get_args(Placement)}, got {self.placement!r}.")

    @classmethod
    def harmless(cls, placement: Placement = "reply") -> ContrastivePrompts:
        """Law-abiding, considerate replies against illegal, hurtful ones."""
        return cls(
            "a harmless reply that keeps to the law, does right by others and insults nobody",
            "a harmful reply that breaks the law, does wrong to others and insults them",
            placement,
        )

    @classmethod
    def helpful(cls, placement: Placement = "reply") -> ContrastivePrompts:
        """Useful replies against useless ones."""
        return cls(
            "a helpful reply that gives the person what they need",
            "an unhelpful reply that is of no use to the person",
            placement,
        )

    @classmethod
    def of(cls, value: ContrastivePrompts | Mapping[str, str] | str) -> ContrastivePrompts:
        """The prompts that a name (`"harmless"`, `"helpful"`) or a mapping of the arguments describes.

        Raises:
            ValueError: If it describes none.
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
            "Contrastive prompts are 'harmless', 'helpful', or a positive and a negative description "
            f"(and a placement); got {value!r}."
        )

    def apply(self, prompt: Prompt) -> tuple[Prompt, Prompt]:
        """The prompt asking for a good reply, and asking for a bad one."""
        return self._ask(prompt, self.positive), self._ask(prompt, self.negative)

    def _ask(self, prompt: Prompt, description: str) -> Prompt:
        if self.placement == "system":
            sentence = f"Write {description}."
            if isinstance(prompt, str):
                return f"{sentence}\n\n{prompt.lstrip()}"
            first, *rest = prompt
            if first["role"] == "system":
                return [{**first, "content": f"{sentence}\n\n{first['content']}"}, *rest]
            return [{"role": "system", "content": sentence}, *prompt]
        if isinstance(prompt, str):
            opened, colon, after = prompt.rpartition(":")
            if colon and not after.strip():  # an open turn, such as "Assistant:"
                return f"{opened} ({description}):{after}"
            return f"{prompt.rstrip()} ({description})\n"
        last_user = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
        if last_user is None:
            raise ValueError(f"A conversation without a user's message asks for no reply: {prompt!r}.")
        message = prompt[last_user]
        asking = {**message, "content": f"{message['content']} ({description})"}
        return [*prompt[:last_user], asking, *prompt[last_user + 1 :]]
