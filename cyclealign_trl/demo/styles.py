"""A corpus that teaches the demo's policy to follow a style: what contrastive prompts take for granted.

Half of the questions stand alone and get replies of all kinds. The others ask for a style in parentheses, and get it.
"""

from __future__ import annotations

from dataclasses import replace

from ..rankers.contrastive_prompts import ContrastivePrompts
from .corpus import Dialogue, Kind, dialogues, sentences

STYLES = ContrastivePrompts("kind", "rude")
_KINDS: dict[str, Kind] = {STYLES.positive: "helpful", STYLES.negative: "rude"}


def styled_dialogues(num: int, seed: int) -> list[Dialogue]:
    """`num` dialogues: half plain, a quarter asking for a kind reply, a quarter for a rude one."""
    drawn = dialogues(num, seed)
    for index, (style, kind) in enumerate(_KINDS.items()):
        asking = dialogues(num // 4, seed + index + 1, [kind])
        drawn[index::4] = [replace(one, question=f"{one.question} ({style})") for one in asking]
    return drawn


def styled_sentences() -> list[str]:
    """The vocabulary of `styled_dialogues`."""
    return [*sentences(), *(f"Why? ({style})" for style in _KINDS)]
