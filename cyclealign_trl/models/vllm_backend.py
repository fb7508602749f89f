"""Sample completions with vLLM, on the training GPUs or in a separate server, through TRL's `VLLMGeneration`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .._compat import VLLMGeneration
from .generation_backend import group_by_prompt


class VLLMBackend(TrainerCallback):
    """Sample with vLLM, and send it the policy's weights once per optimiser step, before the first completion.

    The backend is a callback, so that it knows when an optimiser step or a loaded checkpoint changes the weights.

    Args:
        model: The policy, not wrapped yet.
        accelerator: The accelerator that will wrap the policy.
        processing_class: The policy's tokenizer.
        num_generations: Completions per prompt, K.
        eos_token_ids: Every id that ends a completion.
        settings: Further arguments of `VLLMGeneration` (`mode`, `max_completion_length`, `temperature`, ...).

    Raises:
        ValueError: If `mode` is `"colocate"` and the policy has no name for vLLM to load.
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
                "vLLM loads the policy by name, but this model has none. Save it together with its tokenizer, and "
                "pass the folder as the model."
            )
        self._num_generations = num_generations
        self._eos_token_ids = tuple(eos_token_ids)
        self._engine = VLLMGeneration(
            model=model,
            accelerator=accelerator,
            processing_class=processing_class,
            logprobs=None,  # completions are scored with the training weights
            **{
                **settings,
                # vLLM reads end-of-sequence ids from the model's files, where some of ours are missing.
                "generation_kwargs": {"stop_token_ids": [*eos_token_ids], **settings.get("generation_kwargs", {})},
            },
        )
        self._stale = True

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Sample K completions for each of B prompts; see `GenerationBackend`.

        Every process must make the same number of calls with the same number of prompts, because weights (and in
        server mode prompts) are gathered from all processes. The Trainer's batches meet this condition.
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

    on_train_begin = _weights_changed  # a resumed run has loaded a checkpoint
    on_optimizer_step = _weights_changed
    on_train_end = _weights_changed  # `load_best_model_at_end` has loaded a checkpoint
