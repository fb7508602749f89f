"""Sampling with `model.generate`, in the training process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import GenerationConfig


class TransformersBackend:
    """Samples with the training weights themselves, through `model.generate`.

    Args:
        accelerator: Unwraps the model that it has wrapped.
        num_generations: Completions per prompt, K.
        eos_token_ids: Every id that ends a completion.
        pad_token_id: Any valid id.
        sampling: Further fields of `GenerationConfig` (`max_new_tokens`, `temperature`, ...).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        num_generations: int,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        sampling: Mapping[str, Any],
    ) -> None:
        self._accelerator = accelerator
        self._eos_token_ids = tuple(eos_token_ids)
        self._pad_token_id = pad_token_id
        self._config = GenerationConfig(
            **{
                "do_sample": True,
                "use_cache": True,  # the Trainer turns it off in the model's own config
                **sampling,
                "num_return_sequences": num_generations,
                "eos_token_id": list(self._eos_token_ids),
                "pad_token_id": pad_token_id,
            }
        )

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Samples K completions for each of B prompts; see `GenerationBackend`."""
        policy = self._accelerator.unwrap_model(model)
        width = max(len(ids) for ids in prompt_ids)
        device = self._accelerator.device
        padded = [[self._pad_token_id] * (width - len(ids)) + list(ids) for ids in prompt_ids]
        input_ids = torch.tensor(padded, device=device)  # (B, W), padded on the left
        lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device)
        attention_mask = (torch.arange(width, device=device) >= width - lengths.unsqueeze(1)).long()  # (B, W)

        was_training = policy.training
        policy.eval()  # no dropout, and activation checkpointing (which turns the KV cache off) rests
        try:
            with torch.no_grad():
                sequences = policy.generate(
                    input_ids=input_ids, attention_mask=attention_mask, generation_config=self._config
                )  # (B * K, W + T)
        finally:
            policy.train(was_training)
        completions = [self._until_eos(ids) for ids in sequences[:, width:].tolist()]
        num_generations = len(completions) // len(prompt_ids)
        return [completions[start : start + num_generations] for start in range(0, len(completions), num_generations)]

    def _until_eos(self, ids: list[int]) -> list[int]:
        # By position, not by pad id: the pad token is often an end-of-sequence token too.
        for position, token in enumerate(ids):
            if token in self._eos_token_ids:
                return ids[: position + 1]
        return ids
