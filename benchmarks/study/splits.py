"""Split the dialogues of HH-RLHF into parts that share no dialogue."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

from datasets import Dataset

from cyclealign_trl import load_hh_rlhf
from cyclealign_trl.data.hh_rlhf import SUBSETS

Part = Literal["judge", "evaluator", "policy", "evaluation"]
"""Preferences for the judge to learn from, preferences for the evaluator to learn from, dialogues to train policies
on, and dialogues to evaluate them on."""

HELPFUL = tuple(subset for subset in SUBSETS if subset.startswith("helpful"))
"""Subsets whose annotators chose the more helpful completion. In `harmless-base`, they chose the less harmful one,
which often helps less. A small reward model, trained on a few thousand pairs of all subsets, did not learn that."""

PARTS: tuple[Part, ...] = get_args(Part)
_SHARES = (0.35, 0.35, 0.12, 0.18)


def load_part(part: Part, hh_rlhf: str) -> Dataset:
    """Return the preference pairs of a part, as messages, with a column `subset`.

    Dialogues belong to a part by their first message, because HH-RLHF has several continuations of one beginning.

    Args:
        part: The part.
        hh_rlhf: Folder with the test files of HH-RLHF.
    """
    dataset = load_hh_rlhf(HELPFUL, "test", hh_rlhf)
    return dataset.filter(lambda row: part_of(row["prompt"][0]["content"]) == part, load_from_cache_file=False)


def part_of(first_message: str) -> Part:
    """Return the part of the dialogues that start with a message."""
    digest = hashlib.sha256(first_message.strip().lower().encode()).digest()
    position = int.from_bytes(digest[:8]) / 2**64
    for part, share in zip(PARTS, _SHARES, strict=True):
        position -= share
        if position < 0:
            return part
    return PARTS[-1]
