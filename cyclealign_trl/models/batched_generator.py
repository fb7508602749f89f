"""Continue any number of prompts in batches, outside of training, without changing the global random state."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from .batches import longest_first
from .generation_backend import group_by_prompt, seeded
from .loading import max_positions, sync_special_tokens
from .transformers_backend import generate

# Threads share the global random state, which `seeded` sets, so only one of them can generate at a time.
_RANDOM_STATE = threading.Lock()


class BatchedGenerator:
    """Continue prompts in batches of similar length, without changing the global random state.

    Args:
        model: The model, on the device to run on.
        tokenizer: The model's tokenizer.
        batch_size: Prompts per batch.
        max_new_tokens: Longest continuation in tokens, end-of-sequence token included. `None` means half of the
            model's positions, up to 2048.

    Raises:
        ValueError: If there is no end-of-sequence token, `batch_size` or `max_new_tokens` is below 1, or
            `max_new_tokens` leaves no position for a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_new_tokens: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        positions = max_positions(model)
        if max_new_tokens is None:
            max_new_tokens = 2048 if positions is None else min(2048, positions // 2)
        if max_new_tokens < 1 or (positions is not None and max_new_tokens >= positions):
            raise ValueError(
                f"max_new_tokens must be at least 1 and leave room for a prompt; got {max_new_tokens}, with a model "
                f"of {positions} positions."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.max_prompt_length = None if positions is None else positions - max_new_tokens
        self.eos_token_ids = sync_special_tokens(model, tokenizer)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], seed: int | None = None
    ) -> list[list[int]]:
        """Return the token ids of each prompt's continuation.

        A continuation without an end-of-sequence token at its end was truncated.

        Args:
            prompts: Token ids of the prompts.
            sampling: Fields of `GenerationConfig`. `repetition_penalty` applies to generated tokens only. In
                transformers it applies to the prompt's tokens too, which would keep a model from quoting the prompt.
            seed: Random seed. `None` means a different one for each call.
        """
        continuations: list[list[int]] = [[]] * len(prompts)
        seed = random.SystemRandom().getrandbits(63) if seed is None else seed
        with _RANDOM_STATE, seeded(seed, self.model.device):
            for batch in longest_first([len(ids) for ids in prompts], self.batch_size):
                generated = self._generate([prompts[index] for index in batch], dict(sampling))
                for index, continuation in zip(batch, generated, strict=True):
                    continuations[index] = continuation
        return continuations

    def _generate(self, prompts: Sequence[Sequence[int]], sampling: dict[str, Any]) -> list[list[int]]:
        processors = LogitsProcessorList()
        if (penalty := sampling.pop("repetition_penalty", 1.0)) != 1.0:
            processors.append(
                RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=max(len(ids) for ids in prompts))
            )
        config = GenerationConfig(
            **{
                "max_new_tokens": self.max_new_tokens,
                "use_cache": True,  # the Trainer turns it off in the model's config
                "repetition_penalty": 1.0,
                **sampling,
                "eos_token_id": list(self.eos_token_ids),
                "pad_token_id": self.tokenizer.pad_token_id,
            }
        )
        generated = generate(
            self.model,
            prompts,
            config,
            self.model.device,
            logits_processor=processors,
            synced_gpus=False,  # under ZeRO-3, `generate` would wait for processes that have no prompts
        )
        return [group[0] for group in group_by_prompt(generated, 1, self.eos_token_ids)]
