"""Sampling with `model.generate`, in the training process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import GenerationConfig

from .._compat import add_hooks, remove_hooks
from .base import group_by_prompt


class TransformersBackend:
    """Samples with the training weights themselves, through `model.generate`.

    Args:
        accelerator: Unwraps the model that it has wrapped.
        num_generations: Completions per prompt, K.
        eos_token_ids: Every id that ends a completion.
        pad_token_id: Any valid id.
        sampling: Further fields of `GenerationConfig` (`max_new_tokens`, `temperature`, ...).

    Raises:
        ValueError: If FSDP 1 is to split the model.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        num_generations: int,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        sampling: Mapping[str, Any],
    ) -> None:
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise ValueError(
                "model.generate cannot sample from a policy that FSDP 1 has split. Set fsdp_version: 2 in "
                "accelerate's config, or fsdp_config={'version': 2}."
            )
        self._accelerator = accelerator
        self._num_generations = num_generations
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
            with torch.no_grad(), self._gathered(model):
                sequences = policy.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    generation_config=self._config,
                    # The processes meet in every forward: whoever is done goes on until all are. `generate` sees by
                    # itself that it must under ZeRO-3, but not under accelerate's FSDP2.
                    synced_gpus=True if self._accelerator.is_fsdp2 else None,
                )  # (B * K, W + T)
        finally:
            policy.train(was_training)
        return group_by_prompt(sequences[:, width:].tolist(), self._num_generations, self._eos_token_ids)

    @contextmanager
    def _gathered(self, model: nn.Module) -> Iterator[None]:
        """Under ZeRO-3, the whole weights on every process: not gathered for each token, or mistaken for training."""
        plugin = self._accelerator.state.deepspeed_plugin
        if plugin is None or plugin.zero_stage != 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(model.parameters()):
            remove_hooks(model)
            try:
                yield
            finally:
                add_hooks(model)
