"""Stops a run that must not go on, with a checkpoint to resume from."""

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


class RunGuard(TrainerCallback):
    """Where there is a verdict, has the step under way finished and saved, then raises.

    A subclass says what the `verdict` is, the same on every process, and which `error` is raised.
    """

    error: type[CycleAlignError]

    @property
    def verdict(self) -> str | None:
        """Why the run must stop, if it must."""
        raise NotImplementedError

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Has a doomed run saved, and not evaluated at the ranker's expense."""
        if self.verdict is not None:
            control.should_save = True
            control.should_evaluate = False
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises once the checkpoint is there."""
        if self.verdict is not None:
            checkpoint = str(Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            raise self.error(f"{self.verdict} Resume with trainer.train(resume_from_checkpoint={checkpoint!r}).")


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
        self._once = OnceLogger(logger)

    def observe(self, failures: Iterable[str | None], spent: str) -> None:
        """Takes in why each ranking of a step failed, and what is spent. The same on every process."""
        if BUDGET_EXHAUSTED not in failures:
            return
        self._spent = spent
        if self.at_cap == "sft":
            self._once.warning(
                "sft",
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
