"""Callbacks that stop a run whose ranker fails or has spent its budget, with a checkpoint to resume from."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._compat import PREFIX_CHECKPOINT_DIR
from .._warnings import OnceLogger
from ..chat.budget import BUDGET_EXHAUSTED
from ..errors import BudgetExhaustedError, CycleAlignError, TooManyFailuresError

logger = logging.getLogger(__name__)

WINDOW = 100  # rankings that the share of failures is computed over
MINIMUM = 20  # rankings that it takes at least


class StopCallback(TrainerCallback):
    """Finish and save the current step once there is a `stop_reason`, then raise `error`.

    A subclass sets `error` and computes `stop_reason`, which must be the same on every process.
    """

    error: type[CycleAlignError]

    @property
    def stop_reason(self) -> str | None:
        """Sentence on why the run must stop and how to fix it, or `None`."""
        raise NotImplementedError

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Request a checkpoint, and skip an evaluation that would ask the ranker again."""
        if self.stop_reason is not None:
            control.should_save = True
            control.should_evaluate = False
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise after the checkpoint has been saved."""
        if self.stop_reason is not None:
            checkpoint = str(Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            raise self.error(f"{self.stop_reason} Resume with trainer.train(resume_from_checkpoint={checkpoint!r}).")


class FailureGuard(StopCallback):
    """Stop a run if too many of its last `WINDOW` rankings failed. A resumed run starts to count again.

    Args:
        max_failures: Largest share of failures that is accepted, from 0 to 1.
    """

    error = TooManyFailuresError

    def __init__(self, max_failures: float) -> None:
        self.max_failures = max_failures
        self._recent: deque[str | None] = deque(maxlen=WINDOW)

    def observe(self, failures: Iterable[str | None]) -> None:
        """Add the failure reason of each ranking, `None` for a success. Must be the same on every process."""
        self._recent.extend(failures)

    @property
    def stop_reason(self) -> str | None:
        """Counts of the failures, if they are too many."""
        reasons = Counter(reason for reason in self._recent if reason is not None)
        if len(self._recent) < MINIMUM or reasons.total() <= self.max_failures * len(self._recent):
            return None
        kinds = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        return (
            f"{reasons.total()} of the last {len(self._recent)} rankings failed ({kinds}), a larger share than "
            f"max_ranking_failures={self.max_failures}. Check the ranker, or raise the limit."
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the rankings of an earlier call of `train`."""
        self._recent.clear()


class BudgetGuard(StopCallback):
    """Stop a run when the ranker's budget is used up, or log once that it goes on without the ranker.

    Args:
        at_cap: `"stop"`, or `"sft"` to go on with SFT alone.
    """

    error = BudgetExhaustedError

    def __init__(self, at_cap: str) -> None:
        self.at_cap = at_cap
        self._spent: str | None = None
        self._once = OnceLogger(logger)

    def observe(self, failures: Iterable[str | None], spent: str) -> None:
        """Check the failure reasons of a step. Must be the same on every process.

        Args:
            failures: Failure reason of each ranking, `None` for a success.
            spent: Text on how much has been spent.
        """
        if BUDGET_EXHAUSTED not in failures:
            return
        self._spent = spent
        if self.at_cap == "sft":
            self._once.warning(
                "sft",
                "The ranker's budget is used up: %s. Prompts without a ranking train with SFT alone, on the "
                "completion that the policy ranks first, or a corrector's version of it. Raise the cap and resume to "
                "rank later prompts.",
                spent,
            )

    @property
    def stop_reason(self) -> str | None:
        """Amount spent, if the budget is used up and the run stops at the cap."""
        if self._spent is None or self.at_cap != "stop":
            return None
        return f"The ranker's budget is used up: {self._spent}. Raise the cap to go on, or set at_budget_cap='sft'."

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the spending of an earlier call of `train`."""
        self._spent = None
