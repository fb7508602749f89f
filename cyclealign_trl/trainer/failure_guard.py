"""Stops a run whose ranker has stopped ranking, with a checkpoint to resume from."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import TooManyFailuresError
from .run_guard import RunGuard

WINDOW = 100  # rankings to look back on
MINIMUM = 20  # rankings that it takes to judge


class FailureGuard(RunGuard):
    """Watches the share of failed rankings among the last `WINDOW`. A resumed run is judged afresh.

    Args:
        max_failures: The largest share of failures, from 0 to 1, that is let pass.
    """

    error = TooManyFailuresError

    def __init__(self, max_failures: float) -> None:
        self.max_failures = max_failures
        self._recent: deque[str | None] = deque(maxlen=WINDOW)

    def observe(self, failures: Iterable[str | None]) -> None:
        """Takes in why each ranking failed; `None` for one that did not. The same on every process."""
        self._recent.extend(failures)

    @property
    def verdict(self) -> str | None:
        """Why the run must stop, if it must."""
        reasons = Counter(reason for reason in self._recent if reason is not None)
        if len(self._recent) < MINIMUM or reasons.total() <= self.max_failures * len(self._recent):
            return None
        kinds = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        return (
            f"{reasons.total()} of the last {len(self._recent)} rankings failed ({kinds}), a larger share than "
            f"max_ranking_failures={self.max_failures}. Look into the ranker, or raise the limit."
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets what an earlier run saw."""
        self._recent.clear()
