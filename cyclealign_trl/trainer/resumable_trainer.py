"""A `Trainer` that goes on from its last whole checkpoint, and from no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .._compat import PREFIX_CHECKPOINT_DIR
from . import checkpoints


class ResumableTrainer(Trainer):
    """Marks each checkpoint when all processes have written all of it, and keeps what a subclass wants kept there."""

    # What a subclass changes

    def _fixed_settings(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it goes on with: whatever says what comes in which step."""
        return {}

    def _kept_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this process beside the Trainer's part, as JSON."""
        return {}

    def _restore(self, state: dict[str, Any]) -> None:
        """Takes back what `_kept_state` gave."""

    def _start_afresh(self) -> None:
        """Makes room for a new run."""

    # The Trainer's seams

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:  # transformers.trainer_utils.TrainOutput
        """Trains, from the start or from a checkpoint: the last complete one (`True`), or a given folder.

        Raises:
            CheckpointError: If there is no complete checkpoint, or it was saved by another number of processes or
                with settings under which other prompts would come next.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint is None:
            if self.args.should_save:
                checkpoints.set_aside(Path(self.args.output_dir))
            self.accelerator.wait_for_everyone()
            self._start_afresh()
            return super().train(None, *args, **kwargs)
        state = checkpoints.load(checkpoint, self.args.process_index, self.args.world_size, self._fixed_settings())
        self._restore(state)
        return super().train(str(checkpoint), *args, **kwargs)

    def end(self) -> None:
        """Ends the run for good, on all processes together; see `Trainer.end`. Call it last in a script."""
        self.accelerator.wait_for_everyone()
        # What still held on to the group of processes would be torn down with the program, and may abort it then.
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        # A command line has only texts.
        wanted = {"true": True, "false": None}.get(str(asked).lower(), asked)
        if wanted is True:
            return checkpoints.last_complete_checkpoint(Path(self.args.output_dir))
        return Path(str(wanted)) if wanted else None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Fetches the micro-batches of the next optimiser step; none where a run was resumed that was finished."""
        if self.state.global_step >= self.state.max_steps:  # the Trainer would take one more step before it looks
            return [], None
        samples: tuple[list[Any], torch.Tensor | int | None]
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before the Trainer's own part, which pushes the folder to the Hub and may delete old ones.
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.mark_incomplete(checkpoint)
        self.accelerator.wait_for_everyone()
        checkpoints.save(checkpoint, self.args.process_index, self._fixed_settings(), self._kept_state())
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # the last that each process writes: the Trainer's own state follows
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.mark_complete(Path(output_dir), self.args.world_size)
