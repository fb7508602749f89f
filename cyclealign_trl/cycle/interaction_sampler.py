"""Sampler that repeats windows of prompts, so that every optimiser step is one interaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class InteractionSampler(Sampler[int]):
    """Shuffle prompts, divide them into windows of one optimiser step, and repeat each window.

    Every optimiser step of the Trainer's loop is then one interaction, so schedules, DeepSpeed and callbacks need no
    change. The last window is filled up from the start of the shuffled order.

    Args:
        num_prompts: Number of prompts in the data set.
        window: Number of prompts per optimiser step, over all processes and micro-batches.
        num_interactions: Number of repetitions of each window.
        seed: Seed of the order.
        epoch: Returns the current epoch when iteration starts. It reads the trainer's state, because `set_epoch`
            comes too late for a run that resumes in a later epoch.

    Raises:
        ValueError: If there are fewer prompts than one window takes.

    Example:
        >>> list(InteractionSampler(3, window=2, num_interactions=2, seed=0, epoch=lambda: 0))
        [2, 0, 2, 0, 1, 2, 1, 2]
    """

    def __init__(
        self, num_prompts: int, window: int, num_interactions: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        if num_prompts < window:
            raise ValueError(
                f"The training set has {num_prompts} prompts, but one optimiser step needs {window} different ones "
                "(per_device_train_batch_size x gradient_accumulation_steps x processes). Lower one of these."
            )
        self.num_prompts = num_prompts
        self.window = window
        self.num_interactions = num_interactions
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        num_windows = -(-self.num_prompts // self.window)
        return num_windows * self.window * self.num_interactions

    def __iter__(self) -> Iterator[int]:
        # One stream per (seed, epoch): epoch 1 of seed 0 must differ from epoch 0 of seed 1.
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch())
        order = torch.randperm(self.num_prompts, generator=generator).tolist()
        order += order[: -len(order) % self.window]
        for start in range(0, len(order), self.window):
            for _ in range(self.num_interactions):
                yield from order[start : start + self.window]
