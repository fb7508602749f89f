"""Which prompts an optimiser step sees: windows of prompts, each repeated for all its interactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class InteractionSampler(Sampler[int]):
    """Shuffles prompts, cuts them into windows of one optimiser step, and repeats each window.

    So every optimiser step of the Trainer's loop is one interaction, and schedules, DeepSpeed and callbacks work
    untouched. The last window is filled from the start of the shuffled order.

    Args:
        num_prompts: Prompts in the dataset.
        window: Prompts of one optimiser step, over all processes and micro-batches.
        num_interactions: How often each window is repeated.
        seed: Seed of the order.
        epoch: Tells the current epoch when the sampler is iterated. Read from the trainer's state, as a run that
            resumes in a later epoch is never told by `set_epoch` in time.

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
                f"The training set has {num_prompts} prompts, but one optimiser step takes {window} different ones "
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
        # One stream per (seed, epoch): seeds of neighbouring runs must not be each other's later epochs.
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch())
        order = torch.randperm(self.num_prompts, generator=generator).tolist()
        order += order[: -len(order) % self.window]
        for start in range(0, len(order), self.window):
            for _ in range(self.num_interactions):
                yield from order[start : start + self.window]
