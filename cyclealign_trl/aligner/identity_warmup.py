"""Identity warm-up: an aligner first learns to copy answers, then to correct them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

IDENTITY_COLUMN = "identity"


def num_warmup_rows(fraction: float, num_rows: int) -> int:
    """Return the number of rows in the warm-up."""
    return int(fraction * num_rows)


def with_warmup(dataset: Dataset, fraction: float) -> Dataset:
    """Prepend the warm-up: copies of the first rows with the answer as the correction.

    Args:
        dataset: Rows of `prompt`, `answer`, `correction`.
        fraction: Fraction of the rows to copy.

    Returns:
        All rows, with a column `identity` that is true for rows of the warm-up.
    """
    warmup = dataset.select(range(num_warmup_rows(fraction, len(dataset))))
    warmup = warmup.remove_columns("correction").add_column("correction", list(warmup["answer"]))
    parts = [
        part.add_column(IDENTITY_COLUMN, [identity] * len(part))
        for part, identity in ((warmup, True), (dataset, False))
    ]
    return concatenate_datasets([part for part in parts if len(part)])


class WarmupSampler(Sampler[int]):
    """Sample the warm-up rows once, then the other rows once per epoch, each pass in a new order.

    The passes form one stream of windows, each with the rows of one optimiser step. A window never mixes warm-up rows
    with other rows, nor rows of two passes. If the last window of a pass is not full, it is filled with rows from the
    start of the same pass. An epoch of the Trainer has as many windows as one pass over the other rows, so with a
    warm-up it does not start where a pass starts.

    Args:
        identity: For each row, whether it belongs to the warm-up.
        window: Number of rows in one optimiser step, over all processes and micro-batches.
        seed: Seed of the orders.
        epoch: Returns the current epoch of the Trainer, and is called at the start of each iteration. `set_epoch`
            is called too late if a run resumes in a later epoch.

    Example:
        >>> sampler = WarmupSampler([True, False, False, False], window=2, seed=0, epoch=lambda: 0)
        >>> sampler.num_warmup_steps, sampler.num_epoch_steps, list(sampler)[:2]
        (1, 2, [0, 0])
    """

    def __init__(self, identity: Sequence[bool], window: int, seed: int, epoch: Callable[[], int]) -> None:
        self.warmup = [index for index, is_warmup in enumerate(identity) if is_warmup]
        self.rest = [index for index, is_warmup in enumerate(identity) if not is_warmup]
        self.window = window
        self.seed = seed
        self.epoch = epoch

    @property
    def num_warmup_steps(self) -> int:
        """Number of optimiser steps in the warm-up."""
        return -(-len(self.warmup) // self.window)

    @property
    def num_epoch_steps(self) -> int:
        """Number of optimiser steps in one pass over the other rows."""
        return -(-len(self.rest) // self.window)

    def __len__(self) -> int:
        return self.num_epoch_steps * self.window

    def __iter__(self) -> Iterator[int]:
        current_pass, order = -1, list[int]()
        first = self.epoch() * self.num_epoch_steps - self.num_warmup_steps
        for step in range(first, first + self.num_epoch_steps):
            # Pass 0 is the warm-up, with negative steps. Pass 1 is the first pass over the other rows.
            if step < 0:
                pass_index, window = 0, step + self.num_warmup_steps
            else:
                pass_index, window = step // self.num_epoch_steps + 1, step % self.num_epoch_steps
            if pass_index != current_pass:
                current_pass, order = pass_index, self._order(pass_index)
            yield from order[window * self.window : (window + 1) * self.window]

    def _order(self, pass_index: int) -> list[int]:
        """Return the rows of one pass in random order, filled up to whole windows."""
        rows = self.rest if pass_index else self.warmup
        # The shift keeps the later passes of one seed apart from the first passes of the next seeds.
        generator = torch.Generator().manual_seed((self.seed << 20) + pass_index)
        order = [rows[index] for index in torch.randperm(len(rows), generator=generator).tolist()]
        return [order[index % len(order)] for index in range(-(-len(order) // self.window) * self.window)]
