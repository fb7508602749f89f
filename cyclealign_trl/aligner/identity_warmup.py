"""Identity warm-up: an aligner first learns to leave answers as they are, then to correct them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

IDENTITY = "identity"


def num_warmup_rows(fraction: float, num_rows: int) -> int:
    """How many of the rows make the warm-up."""
    return int(fraction * num_rows)


def with_warmup(dataset: Dataset, fraction: float) -> Dataset:
    """Puts the first part of the rows in front once more, with the answer itself as the correction.

    Args:
        dataset: Rows of `prompt`, `answer`, `correction`.
        fraction: Which part.

    Returns:
        The rows with a column `identity`, true for those of the warm-up.
    """
    warmup = dataset.select(range(num_warmup_rows(fraction, len(dataset))))
    warmup = warmup.remove_columns("correction").add_column("correction", list(warmup["answer"]))
    parts = [
        part.add_column(IDENTITY, [identity] * len(part)) for part, identity in ((warmup, True), (dataset, False))
    ]
    return concatenate_datasets([part for part in parts if len(part)])


class WarmupSampler(Sampler[int]):
    """Draws the warm-up once, then the other rows for as many epochs as are asked for, each in an order of its own.

    All of it is one stream, cut into windows of one optimiser step, and a window never mixes warm-up with the rest,
    nor two epochs: where the last of a pass is not full, it is filled from the start of the pass. An epoch of the
    Trainer is as many windows as one pass over the other rows has, wherever in the stream they lie.

    Args:
        identity: Per row, whether it is part of the warm-up.
        window: Rows of one optimiser step, over all processes and micro-batches.
        seed: Seed of the orders.
        epoch: Tells the Trainer's current epoch when the sampler is iterated. Read from the trainer's state, as a run
            that resumes in a later epoch is never told by `set_epoch` in time.

    Example:
        >>> sampler = WarmupSampler([True, False, False, False], window=2, seed=0, epoch=lambda: 0)
        >>> sampler.num_warmup_steps, sampler.num_epoch_steps, list(sampler)[:2]
        (1, 2, [0, 0])
    """

    def __init__(self, identity: Sequence[bool], window: int, seed: int, epoch: Callable[[], int]) -> None:
        self.warmup = [index for index, of_warmup in enumerate(identity) if of_warmup]
        self.rest = [index for index, of_warmup in enumerate(identity) if not of_warmup]
        self.window = window
        self.seed = seed
        self.epoch = epoch

    @property
    def num_warmup_steps(self) -> int:
        """Optimiser steps of the warm-up."""
        return -(-len(self.warmup) // self.window)

    @property
    def num_epoch_steps(self) -> int:
        """Optimiser steps of one pass over the other rows."""
        return -(-len(self.rest) // self.window)

    def __len__(self) -> int:
        return self.num_epoch_steps * self.window

    def __iter__(self) -> Iterator[int]:
        drawn, order = -1, list[int]()
        first = self.epoch() * self.num_epoch_steps - self.num_warmup_steps
        for step in range(first, first + self.num_epoch_steps):
            # Pass 0 is the warm-up, at negative steps; pass 1 the first epoch of the rest.
            number, position = divmod(step, self.num_epoch_steps) if step >= 0 else (-1, step + self.num_warmup_steps)
            if number + 1 != drawn:
                drawn, order = number + 1, self._order(number + 1)
            yield from order[position * self.window : (position + 1) * self.window]

    def _order(self, number: int) -> list[int]:
        rows = self.rest if number else self.warmup
        # One stream per (seed, pass): seeds of neighbouring runs must not be each other's later passes.
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        order = [rows[index] for index in torch.randperm(len(rows), generator=generator).tolist()]
        return [order[index % len(order)] for index in range(-(-len(order) // self.window) * self.window)]
