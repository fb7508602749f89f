"""Sampling outside of training: any number of prompts, in batches, with a random state of its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from .base import group_by_prompt

# The global random state is the process's: generations take turns with it.
_RANDOM_STATE = threading.Lock()


class BatchedGenerator:
    """Continues prompts, those of like length together, and leaves the global random state as it was.

    Args:
        model: The model, on the device where it is to run.
        tokenizer: Its tokenizer.
        batch_size: Prompts continued at once.
        max_new_tokens: Longest continuation, end-of-sequence token included. `None`: half of the model's positions,
            at most 2048.

    Raises:
        ValueError: If nothing ends a text, or no position is left for a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_new_tokens: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if max_new_tokens is None:
            max_new_tokens = 2048 if positions is None else min(2048, positions // 2)
        if max_new_tokens < 1 or (positions is not None and max_new_tokens >= positions):
            raise ValueError(
                f"`max_new_tokens` must be at least 1 and leave room for a prompt; got {max_new_tokens}, with a model "
                f"of {positions} positions."
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.max_prompt_length = None if positions is None else positions - max_new_tokens
        self.eos_token_ids = _eos_token_ids(model, tokenizer)
        self._pad_token_id = self.eos_token_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any], seed: int | None = None
    ) -> list[list[int]]:
        """Token ids of each prompt's continuation; one without an end-of-sequence token at its end ran out of room.

        Args:
            prompts: Token ids.
            sampling: Fields of `GenerationConfig`. `repetition_penalty` is for what is generated alone: penalising the
                prompt, as transformers does by default, would keep a model from quoting it.
            seed: Makes the continuations depend on the prompts alone. `None`: they differ from call to call.
        """
        continuations: list[list[int]] = [[]] * len(prompts)
        # The longest come first, so that memory runs out at once or never.
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        device = self.model.device
        indices = [] if device.type == "cpu" else [device.index or 0]
        with _RANDOM_STATE, torch.random.fork_rng(indices, device_type=device.type if indices else "cuda"):
            torch.seed() if seed is None else torch.manual_seed(seed)
            for start in range(0, len(prompts), self.batch_size):
                batch = by_length[start : start + self.batch_size]
                generated = self._generate([prompts[index] for index in batch], dict(sampling))
                for index, continuation in zip(batch, generated, strict=True):
                    continuations[index] = continuation
        return continuations

    def _generate(self, prompts: Sequence[Sequence[int]], sampling: dict[str, Any]) -> list[list[int]]:
        device, width = self.model.device, max(map(len, prompts))
        input_ids = torch.tensor([[self._pad_token_id] * (width - len(ids)) + list(ids) for ids in prompts])  # (B, W)
        lengths = torch.tensor([len(ids) for ids in prompts])
        attention_mask = (torch.arange(width) >= width - lengths.unsqueeze(1)).long()  # (B, W)
        processors = LogitsProcessorList()
        if (penalty := sampling.pop("repetition_penalty", 1.0)) != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=width))
        config = GenerationConfig(
            **{
                "max_new_tokens": self.max_new_tokens,
                "use_cache": True,  # the Trainer turns it off in the model's own config
                "repetition_penalty": 1.0,
                **sampling,
                "eos_token_id": list(self.eos_token_ids),
                "pad_token_id": self._pad_token_id,
            }
        )
        with torch.inference_mode():
            sequences = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
                logits_processor=processors,
            )  # (B, W + T)
        return [group[0] for group in group_by_prompt(sequences[:, width:].tolist(), 1, self.eos_token_ids)]


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a text, the tokenizer's first."""
    declared = None if model.generation_config is None else model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])]
    eos_token_ids = tuple(dict.fromkeys(token for token in ids if token is not None))
    if not eos_token_ids:
        raise ValueError("Neither tokenizer nor model has an end-of-sequence token. Set tokenizer.eos_token.")
    return eos_token_ids
