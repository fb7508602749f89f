"""The protocol of generation backends, and helpers that they share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn


class GenerationBackend(Protocol):
    """Sampler of completions from the current policy, with one required method.

    The trainer registers a backend that is a `TrainerCallback` as a callback.
    """

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Sample K completions for each of B prompts.

        Args:
            model: The policy, as wrapped for training.
            prompt_ids: Token ids of B prompts.

        Returns:
            Token ids of B x K completions, without padding. A completion without an end-of-sequence token at its end
            was truncated.
        """
        ...


def group_by_prompt(
    completion_ids: Sequence[list[int]], num_generations: int, eos_token_ids: Collection[int]
) -> list[list[list[int]]]:
    """Return one group of completions per prompt, each truncated after its first end-of-sequence token.

    Args:
        completion_ids: Token ids of B x K completions, prompt by prompt.
        num_generations: Completions per prompt, K.
        eos_token_ids: Every id that ends a completion.
    """
    completions = [_until_eos(ids, eos_token_ids) for ids in completion_ids]
    return [completions[start : start + num_generations] for start in range(0, len(completions), num_generations)]


def _until_eos(ids: list[int], eos_token_ids: Collection[int]) -> list[int]:
    # The pad token is often an end-of-sequence token too, so padding cannot be removed by id.
    for position, token in enumerate(ids):
        if token in eos_token_ids:
            return ids[: position + 1]
    return ids


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Sample with a seed inside the block, and restore the random state of the CPU and the device after it."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
