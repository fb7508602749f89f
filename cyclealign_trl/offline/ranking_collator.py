"""From texts to token ids: prompts and completions as the policy reads and writes them, and batches of both.

Batches stay plain Python lists: a float that passes through the Trainer's input preparation is cast to the training
dtype under DeepSpeed, and lengths, not token ids, say what is padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.formats import ranked_row
from ..models.renderer import Renderer
from ..types import ABSENT


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

    renderer: Renderer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [ranked_row(row) for row in rows]
        width = max(len(row["completions"]) for row in rows)
        batch: dict[str, Any] = {
            name: [] for name in ("prompt_ids", "completion_ids", "ranks", "rewards", "prompt_cut", "completion_cut")
        }
        for row in rows:
            prompt_ids, prompt_cut = self.renderer.prompt(row["prompt"])
            completions = [self.renderer.completion(row["prompt"], text) for text in row["completions"]]
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
