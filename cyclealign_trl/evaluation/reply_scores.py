"""Score collected replies with a reward model, each at most once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoConfig

from ..chat.store import digest
from ..models.batches import longest_first
from ..models.loading import digest_weights, hub_kwargs, loading
from ..models.model_pool import ModelReference
from ..models.reward_scorer import RewardScorer, check_num_labels
from .markdown_table import printable
from .prompts import EvaluationPrompt
from .replies import Reply, file_name
from .row_file import KEY, RowFile
from .sources import match_key


class StoredScorer:
    """A reward model whose scores are stored, and which is loaded when one of them is missing.

    Args:
        reward_model: Name or path of the reward model, or a `RewardScorer`.
        output_dir: Folder of the evaluation. Scores are stored in `scores/REWARD_MODEL/NAME.jsonl`.
        reward_model_kwargs: Keyword arguments of `RewardScorer`, if the model is named.

    Raises:
        OSError: If there is no such model.
        ValueError: If the model has not one output, or `reward_model_kwargs` are wrong or given for a loaded model.
    """

    def __init__(
        self,
        reward_model: str | RewardScorer,
        output_dir: str | PathLike[str],
        reward_model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._kwargs = dict(reward_model_kwargs or {})
        self._scorer = reward_model if isinstance(reward_model, RewardScorer) else None
        self.name = reward_model if isinstance(reward_model, str) else reward_model.name
        self._batch_size: int = self._kwargs.get("batch_size", 16)
        self._folder = Path(output_dir) / "scores" / file_name(self.name)
        if self._scorer is None:
            try:
                inspect.signature(RewardScorer).bind(self.name, **self._kwargs)
            except TypeError as error:
                raise ValueError(f"RewardScorer does not accept these reward_model_kwargs: {error}.") from error
            # The weights are loaded when the replies are there. A wrong model must not wait for that.
            with loading(self.name):
                kwargs = hub_kwargs(self._kwargs.get("model_init_kwargs", {}))
                check_num_labels(AutoConfig.from_pretrained(self.name, **kwargs), self.name)
            reference = ModelReference.find(self.name)
            relevant = {name: value for name, value in self._kwargs.items() if name not in ("batch_size", "device")}
            self._settings: dict[str, Any] = {**reference.identity, **_as_text(relevant)}
        else:
            if self._kwargs:
                raise ValueError(
                    f"reward_model_kwargs {sorted(self._kwargs)} have no effect on a loaded reward model."
                )
            self._batch_size = self._scorer.batch_size
            self._settings = {
                "weights": digest_weights(self._scorer.model)[:16],
                "max_length": self._scorer.max_length,
                "chat_template": digest(self._scorer.tokenizer.chat_template).hex()[:16],
            }

    def score(self, name: str, prompts: Sequence[EvaluationPrompt], replies: Sequence[Reply]) -> list[float | None]:
        """Return the output of the reward model for each reply of a model.

        Failed replies, and outputs that are not finite numbers, are `None`.

        Args:
            name: Name of the model that replied.
            prompts: The prompts.
            replies: One reply per prompt.

        Raises:
            ValueError: If stored scores come from other settings, or the reward model cannot read a prompt.
        """
        file = RowFile(self._folder / f"{file_name(name)}.jsonl", self._settings)
        pairs = [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if not reply.failed]
        lengths = [len(match_key(prompt.prompt)) + len(reply.completion) for prompt, reply in pairs]
        # As for replies, the batches do not depend on what is stored.
        batches = [[pairs[index] for index in batch] for batch in longest_first(lengths, self._batch_size)]
        missing = [[pair for pair in batch if not _is_stored(file, pair[1])] for batch in batches]
        remaining = sum(map(len, missing))
        if remaining:
            with tqdm(total=len(pairs), initial=len(pairs) - remaining, desc=f"Scores of {printable(name)}",
                      disable=None) as progress:  # fmt: skip
                for batch in filter(None, missing):
                    scores = self._score_batch(batch)
                    file.append(
                        {KEY: reply.prompt_id, "completion_id": _completion_id(reply), "score": score}
                        for (_, reply), score in zip(batch, scores, strict=True)
                    )
                    progress.update(len(batch))
        return [None if reply.failed else file.rows[reply.prompt_id]["score"] for reply in replies]

    def _score_batch(self, batch: Sequence[tuple[EvaluationPrompt, Reply]]) -> list[float | None]:
        if self._scorer is None:
            self._scorer = RewardScorer(self.name, **self._kwargs)
        try:
            scores = self._scorer.score(
                [prompt.prompt for prompt, _ in batch], [reply.completion for _, reply in batch]
            )
        except TemplateError as error:
            raise ValueError(f"The chat template of {self.name} rejects a prompt: {error}.") from error
        return [score if math.isfinite(score) else None for score in scores]


def _completion_id(reply: Reply) -> str:
    return digest(reply.completion).hex()[:16]


def _is_stored(file: RowFile, reply: Reply) -> bool:
    row = file.rows.get(reply.prompt_id)
    return row is not None and row["completion_id"] == _completion_id(reply)


def _as_text(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON-compatible data."""
    return {
        name: _as_text(value) if isinstance(value, Mapping) else value if isinstance(value, int) else str(value)
        for name, value in settings.items()
    }
