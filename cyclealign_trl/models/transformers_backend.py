"""Sample completions with `model.generate`, in the training process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .._compat import add_hooks, remove_hooks
from .batches import pad
from .decoding import can_decode, decode
from .generation_backend import group_by_prompt
from .loading import without_adapter


def generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    config: GenerationConfig,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase | None = None,
    synced_gpus: bool | None = None,
    logits_processor: LogitsProcessorList | None = None,
) -> list[list[int]]:
    """Sample completions with `model.generate`, and `decode` as its loop if the model allows it.

    Args:
        model: The model, not wrapped.
        prompt_ids: Token ids of B prompts.
        config: Sampling settings, with a pad token.
        device: Device of the model.
        tokenizer: The model's tokenizer, which the field `stop_strings` needs.
        synced_gpus: Whether every process has to run the same number of forward passes. `None` leaves the decision
            to `model.generate`.
        logits_processor: Further processors of the scores.

    Returns:
        Token ids of B x `num_return_sequences` completions, padded on the right.
    """
    input_ids, attention_mask = pad(prompt_ids, config.pad_token_id, device, side="left")  # both (B, W)

    was_training = model.training
    model.eval()  # disables dropout, and activation checkpointing, which would turn the KV cache off
    try:
        with torch.no_grad(), _without_generation_config(model):
            arguments: dict[str, Any] = {"tokenizer": tokenizer, "synced_gpus": synced_gpus}
            if can_decode(without_adapter(model), config):
                arguments = {"custom_generate": partial(decode, synced_gpus=bool(synced_gpus))}
                if config.stop_strings is not None:  # `generate` does not pass the tokenizer on to a custom loop
                    criterion = StopStringCriteria(tokenizer, config.stop_strings)
                    arguments["stopping_criteria"] = StoppingCriteriaList([criterion])
                    config = GenerationConfig(**{**config.to_dict(), "stop_strings": None})
            sequences = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=config,
                logits_processor=logits_processor,
                **arguments,
            )  # (B * K, W + T)
    finally:
        model.train(was_training)
    completion_ids: list[list[int]] = sequences[:, input_ids.shape[1] :].tolist()
    return completion_ids


@contextmanager
def _without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hide the checkpoint's generation config, which `generate` fills unset fields from.

    What is sampled must depend on the given settings alone, as it does with vLLM.
    """
    models = [model, without_adapter(model)]  # PEFT copies it to its base model
    configs = [each.generation_config for each in models]
    try:
        for each in models:
            each.generation_config = GenerationConfig()
        yield
    finally:
        for each, config in zip(models, configs, strict=True):
            each.generation_config = config


class TransformersBackend:
    """Sample with the training weights, through `model.generate`.

    Args:
        accelerator: The accelerator that wraps the model.
        num_generations: Completions per prompt, K.
        eos_token_ids: Every id that ends a completion.
        pad_token_id: Any valid id.
        sampling: Further fields of `GenerationConfig` (`max_new_tokens`, `temperature`, ...).
        tokenizer: The policy's tokenizer, which the field `stop_strings` needs.

    Raises:
        ValueError: If the model is sharded by FSDP 1.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        num_generations: int,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        sampling: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise ValueError(
                "model.generate cannot sample from a policy that FSDP 1 shards. Set fsdp_version: 2 in accelerate's "
                "config, or fsdp_config={'version': 2}."
            )
        self._accelerator = accelerator
        self._num_generations = num_generations
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._config = GenerationConfig(
            **{
                "do_sample": True,
                "use_cache": True,  # the Trainer turns it off in the model's config
                **sampling,
                "num_return_sequences": num_generations,
                "eos_token_id": list(self._eos_token_ids),
                "pad_token_id": pad_token_id,
            }
        )

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Sample K completions for each of B prompts; see `GenerationBackend`."""
        with self._gathered(model):
            completion_ids = generate(
                self._accelerator.unwrap_model(model),
                prompt_ids,
                self._config,
                self._accelerator.device,
                # Every forward gathers weights from all processes, so a process must go on until all are done.
                # `generate` detects this under ZeRO-3, but not under accelerate's FSDP2.
                synced_gpus=True if self._accelerator.is_fsdp2 else None,
                tokenizer=self._tokenizer,
            )
        return group_by_prompt(completion_ids, self._num_generations, self._eos_token_ids)

    @contextmanager
    def _gathered(self, model: nn.Module) -> Iterator[None]:
        """Gather the weights of a ZeRO-3 policy on every process once, instead of once per token.

        Without its hooks, DeepSpeed does not mistake the forward passes for training.
        """
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
