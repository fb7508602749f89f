"""What a run does when its ranker may spend no more."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import BudgetExhaustedError
from ..rankers.budget import BUDGET_EXHAUSTED
from .run_guard import RunGuard

logger = logging.getLogger(__name__)


class BudgetGuard(RunGuard):
    """Stops a run when the first ranking is not paid for, or says once that it goes on without.

    Args:
        at_cap: Whether to `"stop"`, or to go on with SFT alone.
    """

    error = BudgetExhaustedError

    def __init__(self, at_cap: str) -> None:
        self.at_cap = at_cap
        self._spent: str | None = None
        self._warned = False

    def observe(self, failures: Iterable[str | None], spent: str) -> None:
        """Takes in why each ranking of a step failed, and what is spent. The same on every process."""
        if BUDGET_EXHAUSTED not in failures:
            return
        self._spent = spent
        if self.at_cap == "sft" and not self._warned:
            self._warned = True
            logger.warning(
                "The ranker's budget is used up: %s. Prompts that it does not rank train SFT alone, on the completion "
                "that the policy ranks first, or a corrector's version of it. Raise the cap and resume to have later "
                "ones ranked.",
                spent,
            )

    @property
    def verdict(self) -> str | None:
        """Why the run must stop, if it must."""
        if self._spent is None or self.at_cap != "stop":
            return None
        return f"The ranker's budget is used up: {self._spent}. Raise the cap to go on, or set at_budget_cap='sft'."

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets what an earlier run saw."""
        self._spent = None
