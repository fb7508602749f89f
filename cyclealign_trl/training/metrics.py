"""Metrics between two logs: means, counts and times, over all processes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

Mode = Literal["train", "eval"]


class MetricStore:
    """Collect metrics until they are logged, apart for training and evaluation.

    `add_local` and `add_tensors` are collective: every process must call them, with the same names.

    Args:
        accelerator: Reduces over the processes.
        mode: Returns the mode that values are added to.
    """

    def __init__(self, accelerator: Accelerator, mode: Callable[[], Mode]) -> None:
        self._accelerator = accelerator
        self._mode = mode
        # Weighted sums, not lists of values: a run that never logs would fill the memory.
        self._totals: dict[Mode, defaultdict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._weights: dict[Mode, defaultdict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._counts: dict[Mode, defaultdict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def add_mean(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add a value to a weighted mean. The value must be the same on all processes."""
        self._totals[self._mode()][name] += value * weight
        self._weights[self._mode()][name] += weight

    def add_count(self, name: str, count: float) -> None:
        """Add to a sum. The count must be the same on all processes."""
        self._counts[self._mode()][name] += count

    def add_local(self, metrics: Mapping[str, float]) -> None:
        """Add values of this process to means over all processes."""
        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=self._accelerator.device)
        for name, value in zip(metrics, self._accelerator.reduce(values, "mean").tolist(), strict=True):
            self.add_mean(name, value)

    def add_tensors(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the elements of tensors to means. The tensors of two processes can differ in size, and can be empty."""
        totals = torch.stack(
            [
                part
                for values in metrics.values()
                for part in (values.detach().float().sum(), torch.tensor(float(values.numel()), device=values.device))
            ]
        )
        summed = self._accelerator.reduce(totals).view(-1, 2).tolist()
        for name, (total, count) in zip(metrics, summed, strict=True):
            if count:
                self.add_mean(name, total / count, weight=count)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to `time/<name>`. Seconds inside of other timers count for those."""
        started, before = time.perf_counter(), sum(self._seconds.values())
        try:
            yield
        finally:
            timed_inside = sum(self._seconds.values()) - before
            self._seconds[name] += time.perf_counter() - started - timed_inside

    def add_times(self) -> None:
        """Add the seconds since the last call to means over all processes."""
        self.add_local({f"time/{name}": seconds for name, seconds in self._seconds.items()})
        self._seconds.clear()

    def drain(self, mode: Mode) -> dict[str, float]:
        """Return the means and counts of a mode, and start over."""
        drained = {name: total / self._weights[mode][name] for name, total in self._totals[mode].items()}
        drained.update(self._counts[mode])
        for values in (self._totals, self._weights, self._counts):
            values[mode].clear()
        return drained
