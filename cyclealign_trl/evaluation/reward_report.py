"""Report of an evaluation with a reward model: figures, tables and files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .intervals import Estimate, bootstrap_group_means
from .metrics.reward_score import transform_rewards
from .prompts import EvaluationPrompt
from .replies import Reply
from .reward_tables import differences_table, means_table, notes, totals_table


@dataclass(frozen=True)
class RewardReport:
    """Rewards of models on the same prompts, by group and in total.

    Args:
        reward_model: Name of the reward model.
        prompts: The B prompts.
        group_sizes: Number of prompts of each group in the data set, the weights of the total.
        replies: B replies of each model.
        scores: B outputs of the reward model for each model. `None` for a reply that failed or has no finite score.
        transform: `"sigmoid"` to report 100 times the sigmoid of the outputs, as the paper's tables do, or `"none"`.
        confidence_level: Coverage of the intervals.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.
    """

    reward_model: str
    prompts: tuple[EvaluationPrompt, ...]
    group_sizes: Mapping[str, int]
    replies: Mapping[str, list[Reply]]
    scores: Mapping[str, list[float | None]]
    transform: str = "sigmoid"
    confidence_level: float = 0.95
    n_resamples: int = 1000
    seed: int = 0

    @cached_property
    def figures(self) -> dict[str, Any]:
        """Return the figures as JSON-compatible data.

        - `groups`: number of `prompts` that were evaluated, and `size` of each group in the data set.
        - `models`: for each model `groups`, `micro` (the total, weighted by the sizes of the groups) and `macro`
          (unweighted), each with `mean`, its `interval`, and the `count` of scored replies; the number of `failed`
          and of `unscored` replies; and `length_limited`, the share of replies that reached the token limit.
        - `differences`: for each pair of models, `model` minus `baseline` on the prompts that both have a score for,
          as for a single model.
        """
        models = list(self.replies)
        pairs = list(combinations(models, 2))
        groups = [prompt.group for prompt in self.prompts]
        scores = np.array([self.scores[name] for name in models], dtype=float).T.reshape(len(groups), -1)  # (B, M)
        values = transform_rewards(scores, self.transform)
        column = {name: values[:, index] for index, name in enumerate(models)}
        columns = [*column.values(), *(column[later] - column[earlier] for earlier, later in pairs)]
        table = np.stack(columns, axis=1)  # (B, M + pairs)
        means = bootstrap_group_means(
            table, groups, self.group_sizes, self.n_resamples, self.confidence_level, self.seed
        )

        def figures_of(index: int) -> dict[str, Any]:
            present = ~np.isnan(table[:, index])
            counts = Counter(group for group, there in zip(groups, present, strict=True) if there)
            return {
                "groups": {name: _figure(row[index], counts[name]) for name, row in means.groups.items()},
                "micro": _figure(means.micro[index], counts.total()),
                "macro": _figure(means.macro[index], counts.total()),
            }

        evaluated = Counter(groups)
        return {
            "groups": {name: {"prompts": evaluated[name], "size": self.group_sizes[name]} for name in evaluated},
            "models": {name: figures_of(index) | self._counts(name) for index, name in enumerate(models)},
            "differences": [
                {"model": later, "baseline": earlier, **figures_of(len(models) + index)}
                for index, (earlier, later) in enumerate(pairs)
            ],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-compatible data, without the single replies."""
        return {
            "reward_model": self.reward_model,
            "transform": self.transform,
            "confidence_level": self.confidence_level,
            "n_resamples": self.n_resamples,
            "seed": self.seed,
            **self.figures,
        }

    def to_markdown(self) -> str:
        """Return Markdown tables: mean rewards, totals with intervals, and differences from the first model."""
        title = f"Reward ({self.reward_model})"
        parts = [means_table(title, self.figures), totals_table(self.figures, self.confidence_level)]
        if self.figures["differences"]:
            parts.append(differences_table(self.figures, self.confidence_level))
        return "\n\n".join([*parts, *notes(self.figures)])

    def to_dataset(self) -> Dataset:
        """Return one row per model and prompt, with the output of the reward model as `score` and what is reported as
        `reward`. The other columns are `prompt_id`, `group`, `prompt`, `model`, `completion` and `finish_reason`.
        """
        rows: list[dict[str, Any]] = []
        for name, replies in self.replies.items():
            for prompt, reply, score in zip(self.prompts, replies, self.scores[name], strict=True):
                reward = None if score is None else float(transform_rewards(np.array(score), self.transform))
                rows.append(
                    {"prompt_id": prompt.id, "group": prompt.group, "prompt": prompt.prompt, "model": name,
                     "completion": reply.completion, "finish_reason": reply.finish_reason, "score": score,
                     "reward": reward}
                )  # fmt: skip
        return Dataset.from_list(rows)

    def save(self, output_dir: str | PathLike[str]) -> list[str]:
        """Write `report.json`, `report.md`, and `rewards.parquet` with the rows of `to_dataset`.

        Returns:
            The names of the files.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.to_markdown() + "\n", encoding="utf-8")
        self.to_dataset().to_parquet(folder / "rewards.parquet")
        return ["report.json", "report.md", "rewards.parquet"]

    def _counts(self, name: str) -> dict[str, Any]:
        replies = self.replies[name]
        failed = sum(reply.failed for reply in replies)
        return {
            "failed": failed,
            "unscored": self.scores[name].count(None) - failed,
            "length_limited": sum(reply.finish_reason == "length" for reply in replies) / len(replies),
        }


def _figure(estimate: Estimate, count: int) -> dict[str, Any]:
    value, interval = estimate
    return {"mean": value, "interval": interval and list(interval), "count": count}
