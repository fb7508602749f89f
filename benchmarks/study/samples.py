"""Sample the initial policy several times per prompt, once for the whole study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclealign_trl import ModelUpstream
from cyclealign_trl.evaluation.prompts import EvaluationPrompt
from cyclealign_trl.evaluation.row_file import KEY, RowFile
from cyclealign_trl.models.model_pool import ModelReference
from cyclealign_trl.types import Prompt

from .scales import Scale


class PolicySamples:
    """Samples of the initial policy by prompt, stored as they are generated.

    Args:
        model: Name or path of the initial policy.
        path: File of the samples.
        number: Samples per prompt.
        scale: Sizes and sampling settings of the study.

    Raises:
        ValueError: If the file has samples of another model, or with other settings.
    """

    def __init__(self, model: str, path: Path, number: int, scale: Scale) -> None:
        self._model = model
        self._number = number
        self._prompts_per_batch = scale.batch_size
        self._settings: dict[str, Any] = {
            "max_new_tokens": scale.max_completion_length,
            "temperature": scale.temperature,
            "top_p": scale.top_p,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        identity = ModelReference.find(model).identity
        self._file = RowFile(path, {**identity, "number": number, **self._settings})

    def sample(self, prompts: Sequence[Prompt]) -> list[list[str]]:
        """Return the samples of each prompt, and generate those that are missing."""
        ids = [EvaluationPrompt(prompt).id for prompt in prompts]
        missing = [(key, prompt) for key, prompt in zip(ids, prompts, strict=True) if key not in self._file.rows]
        if missing:
            policy = ModelUpstream(
                self._model,
                batch_size=self._number * self._prompts_per_batch,
                max_new_tokens=self._settings["max_new_tokens"],
                generation_kwargs={
                    "do_sample": True,
                    "temperature": self._settings["temperature"],
                    "top_p": self._settings["top_p"],
                    "top_k": 0,
                    "repetition_penalty": 1.0,
                },
            )
            for start in range(0, len(missing), self._prompts_per_batch):
                chunk = missing[start : start + self._prompts_per_batch]
                repeated = [prompt for _, prompt in chunk for _ in range(self._number)]
                # The seed depends on the prompts, so that an interrupted run samples the same as an uninterrupted one.
                texts = iter(policy(repeated, seed=int(chunk[0][0], 16) % 2**63))
                self._file.append(
                    {KEY: key, "samples": [str(next(texts)) for _ in range(self._number)]} for key, _ in chunk
                )
        return [self._file.rows[key]["samples"] for key in ids]
