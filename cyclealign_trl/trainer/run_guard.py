"""Stops a run that must not go on, with a checkpoint to resume from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._compat import PREFIX_CHECKPOINT_DIR
from ..errors import CycleAlignError


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
