"""A `Trainer` that publishes its model with our card, and without what belongs to no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import is_conversational

from .._compat import (
    PREFIX_CHECKPOINT_DIR,
    get_config_model_id,
    uploading_without,
)
from ..cycle.publishing import NOT_WITH_THE_MODEL
from . import checkpoints
from .dataset_checks import dataset_size
from .model_card import TrainedModel, evaluation_metrics, hub_link, model_card


class PublishedTrainer(Trainer):
    """Writes the card, and pushes model, tokenizer and card. A subclass says how the model was trained."""

    def _describe(self, model: TrainedModel) -> TrainedModel:
        """Adds to a description of the model how it was trained."""
        raise NotImplementedError

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # huggingface_hub.CommitInfo
        """Publishes model or adapter, tokenizer and card, and what a subclass writes beside its card.

        See `Trainer.push_to_hub`. A log of interactions stays here, and so do stored rankings and exports.
        """
        with uploading_without(NOT_WITH_THE_MODEL):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with uploading_without(NOT_WITH_THE_MODEL):
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the model card into the output directory, as `README.md`. `push_to_hub` does so by itself.

        Args:
            language: The model's language, for the metadata.
            license: Its license, for the metadata. None is declared by default.
            tags: Further tags.
            model_name: The heading; by default the name of the repository.
            finetuned_from: What it was trained from; by default the name that the model was loaded by.
            tasks: Its task on the Hub; by default text generation.
            dataset_tags: Names of the data sets on the Hub.
            dataset: The same.
            dataset_args: Their configurations.
        """
        if not self.is_world_process_zero():
            return
        repo_id = self._repo_id
        datasets = list(dict.fromkeys([*_as_list(dataset_tags), *_as_list(dataset)]))
        source = ", ".join(hub_link(name, "datasets/") for name in datasets)
        if dataset_args:
            source += f" ({', '.join(_as_list(dataset_args))})"
        model = self._describe(
            TrainedModel(
                name=model_name or repo_id.split("/")[-1],
                repo_id=repo_id,
                base_model=finetuned_from or get_config_model_id(self.model.config) or None,
                is_adapter=is_peft_model(self.model),
                conversational=self.train_dataset is not None and is_conversational(next(iter(self.train_dataset))),
                data={
                    **({"source": source} if source else {}),
                    "training": dataset_size(self.train_dataset),
                    "evaluation": dataset_size(self.eval_dataset),
                },
                evaluation=evaluation_metrics(self.state.log_history),
            )
        )
        metadata = {"language": language, "license": license, **({"pipeline_tag": tasks} if tasks else {})}
        card = model_card(model, datasets=datasets, tags=_as_list(tags), **metadata)
        card.save(Path(self.args.output_dir, "README.md"))

    @property
    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


Optimizers = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]


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


class CardBeforePush(TrainerCallback):
    """Has the card written whenever the Trainer starts a push, also those of checkpoints, for which it writes none.

    Args:
        write: Writes the card.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes it."""
        self._write()
