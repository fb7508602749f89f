"""`BaseTrainer`: what all trainers of the package add to the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import is_conversational

from .._compat import (
    PREFIX_CHECKPOINT_DIR,
    get_config_model_id,
    rotate_checkpoints,
    saving_on_this_process,
    set_timeout_of_all_groups,
    uploading_without,
)
from . import checkpoints, resumption
from .console import shorten_console
from .dataset_checks import describe_dataset
from .machines import check_output_dir
from .model_card import TrainedModel, evaluation_metrics, hub_link, model_card, public_name
from .run_file import RUN_FILE, continue_run_file, start_run_file

Optimizers = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]

UNPUBLISHED = (
    "rankings-*.sqlite*",
    "interactions/*",
    "interactions-*/*",
    "spent/*",
    "spent-*/*",
    "preference/*",
    "ranked/*",
    "prompt-completion/*",
    "pairs/*",
    "iteration-*/*",
    "win_rate/*",
    "ranking_accuracy/*",
    "runs/*",
    RUN_FILE,
    "report.html",
    "held_out.json",
    "*.tmp",
)
"""Files in an output directory that are never pushed with a model: prompts, completions, spending, and reports.

All trainers share the list, because runs of several methods can share an output directory.
"""


class BaseTrainer(Trainer):
    """Trainer that resumes from complete checkpoints only, and publishes its model with a card of the package.

    A subclass says how it was trained (`_describe`), which settings a resumed run must share (`_resume_settings`), and
    what else a checkpoint keeps (`_state`, `_load_state`).

    Raises:
        ValueError: If `save_on_each_node` does not fit the output directories of several machines.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_output_dir(self.args)
        shorten_console(self)
        self.add_callback(_CardBeforePush(self.create_model_card))
        self.add_callback(_TimeoutOfAllGroups())

    # Hooks of subclasses

    def _resume_settings(self) -> dict[str, Any]:
        """Return the settings that decide which rows come in which step. A resumed run must share them."""
        args = self.args
        return {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "rows of train_dataset": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
        }

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this process in addition to the Trainer's part, as JSON data."""
        return {}

    def _load_state(self, state: dict[str, Any]) -> None:
        """Restore what `_state` returned."""

    def _start_new_run(self) -> None:
        """Prepare a run that starts from step 0, possibly in the output directory of an earlier one."""

    def _describe(self, model: TrainedModel) -> TrainedModel:
        """Add how the model was trained to its description."""
        raise NotImplementedError

    def _run_record(self) -> dict[str, Any]:
        """Return what `run.json` says about the run in addition to settings and versions, as JSON data."""
        base_model = get_config_model_id(self.model.config)
        return {
            "trainer": type(self).__name__,
            "model": public_name(base_model) if base_model else None,
            "data": {
                "training": describe_dataset(self.train_dataset),
                "evaluation": describe_dataset(self.eval_dataset),
            },
        }

    # Checkpoints

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:  # transformers.trainer_utils.TrainOutput
        """Train from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: `True` resumes from the last complete checkpoint, a path from that one.

        Raises:
            CheckpointError: If there is no complete checkpoint, or it was saved by another number of processes or with
                settings under which other rows would come next.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint is None:
            if self.args.should_save:
                checkpoints.set_aside(Path(self.args.output_dir))
            self.accelerator.wait_for_everyone()
            self._start_new_run()
            if self.is_world_process_zero():
                start_run_file(Path(self.args.output_dir), self._run_record(), self.args)
            return super().train(None, *args, **kwargs)
        self._load_state(
            resumption.load_state(checkpoint, self.args.process_index, self.args.world_size, self._resume_settings())
        )
        if self.is_world_process_zero():
            continue_run_file(Path(self.args.output_dir), self.args)
        return super().train(str(checkpoint), *args, **kwargs)

    def end(self) -> None:
        """End the run on all processes; see `Trainer.end`. Call it last in a script."""
        self.accelerator.wait_for_everyone()
        # References to the process group that are left would be torn down at exit, which can abort the program.
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()

    def _checkpoint_to_resume(self, requested: str | bool | None) -> Path | None:
        # A command line passes every value as text.
        wanted = {"true": True, "false": None}.get(str(requested).lower(), requested)
        path = Path(wanted) if isinstance(wanted, str) and wanted else wanted or None
        return resumption.choose_checkpoint(path, Path(self.args.output_dir), self.args.process_index)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Fetch the micro-batches of the next optimiser step, or none if a finished run was resumed."""
        # The Trainer would take one more step before it checks.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            return [], None
        samples: tuple[list[Any], torch.Tensor | int | None]
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Our part comes first: the Trainer's part pushes the folder to the Hub and may delete old ones.
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.mark_incomplete(checkpoint)
        self.accelerator.wait_for_everyone()
        checkpoints.save(checkpoint, self.args.process_index, self._resume_settings(), self._state())
        with self._rotating_after_all(checkpoint.parent):
            super()._save_checkpoint(model, trial)

    @contextmanager
    def _rotating_after_all(self, run_dir: Path) -> Iterator[None]:
        """Delete old checkpoints only when all machines have completed the new one.

        If a machine died before that, another one would have deleted the last checkpoint that both have.
        """
        args = self.args
        if not args.save_on_each_node:
            yield
            return
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            yield
        finally:
            args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if args.should_save:
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # ZeRO-3 gathers the weights on process 0 alone.
        gathered = state_dict is not None or not self.is_deepspeed_enabled
        writes = self.args.save_on_each_node and self.args.should_save and gathered
        with saving_on_this_process(self.model) if writes else nullcontext():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled and self.args.should_save and self.args.process_index > 0:
            # DeepSpeed needs this file on each machine, and writes it on process 0 alone.
            Path(output_dir, "latest").write_text(f"global_step{self.model_wrapped.global_steps}", encoding="utf-8")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # every process writes this last; only the Trainer's state follows
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.mark_complete(Path(output_dir), self.args.world_size)

    # Publishing

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # huggingface_hub.CommitInfo
        """Publish the model or adapter, its tokenizer and its card; see `Trainer.push_to_hub`.

        Logs, stored rankings and exported data are not uploaded.
        """
        with uploading_without(UNPUBLISHED):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with uploading_without(UNPUBLISHED):
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
        """Write the model card to `README.md` in the output directory. `push_to_hub` calls this.

        Args:
            language: Language of the model, for the metadata.
            license: License of the model, for the metadata. By default, none is declared.
            tags: Further tags.
            model_name: Heading of the card. Defaults to the name of the repository.
            finetuned_from: Model that was trained. Defaults to the name that it was loaded by.
            tasks: Task on the Hub. Defaults to text generation.
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
                    "training": describe_dataset(self.train_dataset),
                    "evaluation": describe_dataset(self.eval_dataset),
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


class _CardBeforePush(TrainerCallback):
    """Write the card before every push, also of checkpoints, for which the Trainer writes none."""

    def __init__(self, write_card: Callable[[], None]) -> None:
        self._write_card = write_card

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write_card()


class _TimeoutOfAllGroups(TrainerCallback):
    """Let `ddp_timeout` apply to all process groups, which exist when training begins."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_timeout_of_all_groups(args.ddp_timeout_delta)


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
