"""The seam between the cycle and whoever samples: one required method."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn


class GenerationBackend(Protocol):
    """Samples completions from the policy as it is now. One that is a `TrainerCallback` too is told of every step."""

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Samples K completions for each of B prompts.

        Args:
            model: The policy, as wrapped for training.
            prompt_ids: Token ids of B prompts.

        Returns:
            Token ids of B x K completions, without padding. A completion that ended by itself ends in its
            end-of-sequence token; one without was cut off.
        """
        ...


def group_by_prompt(
    completion_ids: Sequence[list[int]], num_generations: int, eos_token_ids: Collection[int]
) -> list[list[list[int]]]:
    """Groups the completions of one prompt after the other, each cut after its first end-of-sequence token."""
    completions = [_until_eos(ids, eos_token_ids) for ids in completion_ids]
    return [completions[start : start + num_generations] for start in range(0, len(completions), num_generations)]


def _until_eos(ids: list[int], eos_token_ids: Collection[int]) -> list[int]:
    # By position, not by pad id: the pad token is often an end-of-sequence token too.
    for position, token in enumerate(ids):
        if token in eos_token_ids:
            return ids[: position + 1]
    return ids


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of its own: what is sampled inside is the same every time, and what follows is as without it."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
