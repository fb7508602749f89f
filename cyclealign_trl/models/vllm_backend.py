"""Sampling with vLLM, on the training GPUs or in a server of its own, through TRL's `VLLMGeneration`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .._compat import VLLMGeneration
from .generation_backend import group_by_prompt


class VLLMBackend(TrainerCallback):
    """Samples with vLLM, which gets the policy's weights once per optimiser step, before the step's first completion.

    As a callback it learns when the weights change: by a step, or by a checkpoint that was loaded.

    Args:
        model: The policy, not wrapped yet.
        accelerator: Knows how the policy will be wrapped.
        processing_class: The policy's tokenizer.
        num_generations: Completions per prompt, K.
        eos_token_ids: Every id that ends a completion.
        settings: Further arguments of `VLLMGeneration` (`mode`, `max_completion_length`, `temperature`, ...).

    Raises:
        ValueError: If vLLM is to load a policy that has no name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        accelerator: Accelerator,
        processing_class: PreTrainedTokenizerBase,
        num_generations: int,
        eos_token_ids: Sequence[int],
        settings: Mapping[str, Any],
    ) -> None:
        if settings["mode"] == "colocate" and not model.name_or_path:
            raise ValueError(
                "vLLM loads the policy by its name, and this model has none. Save it with its tokenizer, and pass the "
                "folder's name as the model."
            )
        self._num_generations = num_generations
        self._eos_token_ids = tuple(eos_token_ids)
        self._engine = VLLMGeneration(
            model=model,
            accelerator=accelerator,
            processing_class=processing_class,
            logprobs=None,  # scores come from the training weights
            **{
                **settings,
                # vLLM knows the ids in the model's files only.
                "generation_kwargs": {"stop_token_ids": [*eos_token_ids], **settings.get("generation_kwargs", {})},
            },
        )
        self._stale = True

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Samples K completions for each of B prompts; see `GenerationBackend`.

        All processes must call it equally often and with equally many prompts: the weights, and for a server the
        prompts too, are gathered from all of them. The Trainer's batches are such.
        """
        if self._stale:
            self._engine.sync_weights()
            self._stale = False
        _, completion_ids, _, _ = self._engine.generate(
            prompts=[list(ids) for ids in prompt_ids for _ in range(self._num_generations)],
            images=None,
            num_generations=self._num_generations,
        )
        return group_by_prompt(completion_ids, self._num_generations, self._eos_token_ids)

    def _weights_changed(self, *args: Any, **kwargs: Any) -> None:
        self._stale = True

    on_train_begin = _weights_changed  # after a checkpoint was loaded to resume from
    on_optimizer_step = _weights_changed
    on_train_end = _weights_changed  # after the best checkpoint was loaded
