"""Batches of token ids for ranking losses.

Batches keep token ids and numbers in Python lists. Under DeepSpeed, the Trainer casts every float tensor of its inputs
to the training dtype, which would round rewards and log-probabilities, and padding follows from lengths, not from ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.formats import ranked_row
from ..models.renderer import Renderer
from ..types import ABSENT

TokenIds = list[int]


@dataclass(frozen=True)
class Batch:
    """Base of all batches."""

    def __contains__(self, name: object) -> bool:
        return False  # the Trainer looks for tensors such as "labels" by name, and there are none


@dataclass(frozen=True)
class RankedBatch(Batch):
    """B prompts with K ranked completions each. Prompts with fewer completions are filled up with absent ones.

    Args:
        prompt_ids: Token ids of B prompts.
        completion_ids: Token ids of B x K completions, empty for absent ones.
        ranks: `(B, K)`, 0 = best, -1 = absent.
        rewards: `(B, K)`, 0 for absent completions. `None` if the data has no rewards.
        prompt_truncated: B flags, whether the prompt was longer than `max_prompt_length`.
        completion_truncated: One flag per completion that is present, in a flat list.
    """

    prompt_ids: list[TokenIds]
    completion_ids: list[list[TokenIds]]
    ranks: list[list[int]]
    rewards: list[list[float]] | None
    prompt_truncated: list[bool]
    completion_truncated: list[bool]

    @property
    def scored_ids(self) -> list[list[TokenIds]]:
        """Token ids of the completions to score."""
        return self.completion_ids


@dataclass(frozen=True)
class RankingCollator:
    """Collate ranked rows or preference pairs, in the formats of `data.formats.ranked_row`, into a `RankedBatch`."""

    renderer: Renderer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> RankedBatch:
        """Tokenise and pad the rows.

        Raises:
            ValueError: If a row cannot be read, or some rows have rewards and others do not.
        """
        tools = [row.get("tools") for row in rows]
        rows = [ranked_row(row) for row in rows]
        prompts = [self.renderer.prompt(row["prompt"], own) for row, own in zip(rows, tools, strict=True)]
        completions = [
            self.renderer.completions(row["prompt"], row["completions"], own)
            for row, own in zip(rows, tools, strict=True)
        ]
        missing = [max(map(len, completions)) - len(group) for group in completions]
        without_rewards = sum(row["rewards"] is None for row in rows)
        if 0 < without_rewards < len(rows):  # the loss of a row must not depend on the other rows of its batch
            raise ValueError(
                f"Of {len(rows)} rows, {without_rewards} have no rewards: give rewards for all rows, or for none."
            )
        return RankedBatch(
            prompt_ids=[ids for ids, _ in prompts],
            completion_ids=[
                [ids for ids, _ in group] + [[] for _ in range(padding)]
                for group, padding in zip(completions, missing, strict=True)
            ],
            ranks=[[*row["ranks"], *[ABSENT] * padding] for row, padding in zip(rows, missing, strict=True)],
            rewards=None
            if without_rewards
            else [[*row["rewards"], *[0.0] * padding] for row, padding in zip(rows, missing, strict=True)],
            prompt_truncated=[truncated for _, truncated in prompts],
            completion_truncated=[truncated for group in completions for _, truncated in group],
        )
