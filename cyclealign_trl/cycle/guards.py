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
from ..errors import BudgetExhaustedError, CycleAlignError, RankerError, TooManyFailuresError

logger = logging.getLogger(__name__)

WINDOW = 100  # rankings that the share of failures is computed over
MINIMUM = 20  # rankings that it takes at least
FIRST = 8  # rankings of a run that all fail before it stops


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
            raise self.resumable(self.stop_reason, args, state)

    @classmethod
    def resumable(cls, reason: str, args: TrainingArguments, state: TrainerState) -> CycleAlignError:
        """Return the error of a run that saved a checkpoint at its current step."""
        checkpoint = str(Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        return cls.error(f"{reason} Resume with trainer.train(resume_from_checkpoint={checkpoint!r}).")


class RankerErrorGuard(StopCallback):
    """Stop a run whose ranker raised `RankerError`. The prompts without a ranking weigh nothing in the last step."""

    error = RankerError

    def __init__(self) -> None:
        self._message: str | None = None

    def observe(self, error: RankerError | None) -> None:
        """Check the error of a step. Whether there is one must be the same on every process."""
        if error is not None:
            self._message = str(error)

    @property
    def stop_reason(self) -> str | None:
        """Message of the error, if there is one."""
        return self._message

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the error of an earlier call of `train`."""
        self._message = None


class FailureGuard(StopCallback):
    """Stop a run if too many of its last `WINDOW` rankings failed, or all of its first `FIRST` rankings.

    A resumed run starts to count again. A run that ends without any ranking logs an error.

    Args:
        max_failures: Largest share of failures that is accepted, from 0 to 1.
    """

    error = TooManyFailuresError

    def __init__(self, max_failures: float) -> None:
        self.max_failures = max_failures
        self.last_detail = ""  # of a failure on this process
        self._recent: deque[str | None] = deque(maxlen=WINDOW)
        self._ranked = False

    def observe(self, failures: Iterable[str | None]) -> None:
        """Add the failure reason of each ranking, `None` for a success. Must be the same on every process."""
        failures = list(failures)
        self._recent.extend(failures)
        self._ranked = self._ranked or None in failures

    @property
    def stop_reason(self) -> str | None:
        """Counts of the failures, if they are too many."""
        reasons = self._reasons
        minimum = MINIMUM if self._ranked else FIRST
        if len(self._recent) < minimum or reasons.total() <= self.max_failures * len(self._recent):
            return None
        return (
            f"{reasons.total()} of the last {len(self._recent)} rankings failed ({_kinds(reasons)}), a larger share "
            f"than max_ranking_failures={self.max_failures}. Check the ranker, or raise the limit.{self._example}"
        )

    @property
    def _reasons(self) -> Counter[str]:
        return Counter(reason for reason in self._recent if reason is not None)

    @property
    def _example(self) -> str:
        return f" The last failure: {self.last_detail.rstrip('.')}." if self.last_detail else ""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log an error if no ranking succeeded."""
        if self._recent and not self._ranked:
            logger.error(
                "THE RUN HAS LEARNED NOTHING FROM ITS RANKER: all of its rankings failed (%s).%s",
                _kinds(self._reasons),
                self._example,
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the rankings of an earlier call of `train`."""
        self._recent.clear()
        self._ranked = False
        self.last_detail = ""


def _kinds(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())


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
