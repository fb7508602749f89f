"""`AlignerTrainer`: a model learns to correct the answers of others."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SchedulerType, TrainerCallback
from trl import SFTTrainer

from ..data.formats import completion_text
from ..models.loading import check_positions, short_model_name
from ..training.base_trainer import CardBeforePush, Optimizers, PublishedTrainer, ResumableTrainer
from ..training.dataset_checks import check_no_stream, column_names, dataset_size, named_datasets
from ..training.model_card import ALIGNER, TrainedModel
from .aligner_config import AlignerConfig
from .aligner_template import AlignerTemplate, make_template
from .identity_warmup import IDENTITY, WarmupSampler, with_warmup

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "answer", "correction")


class AlignerTrainer(PublishedTrainer, ResumableTrainer, SFTTrainer):
    """Trains an aligner (arXiv 2402.02416): given a question and somebody's answer, it writes a better answer.

    SFT on the correction and its end-of-sequence token alone, after question and answer in a template. Training
    begins with an identity warm-up: the first `warmup_fraction` of the rows once, with the answer as the correction.
    Then come all rows, for `num_train_epochs` epochs. One learning rate schedule spans both.

    Args:
        model: A causal language model, or its name on the Hub or on disk.
        args: The arguments.
        train_dataset: Rows of `prompt` (text or messages), `answer` and `correction` (texts, or lists of one
            assistant message).
        eval_dataset: Likewise, or a mapping of several. They have no warm-up rows.
        processing_class: The tokenizer; by default the one of the model's name.
        peft_config: Trains an adapter instead of all weights.
        callbacks: Further callbacks.
        optimizers: An optimiser and a schedule of your own.

    Raises:
        ValueError: If a column is missing, no row fits into `max_length`, that is more than the model's positions, or
            `max_steps` ends within the warm-up.
    """

    _tag_names: Sequence[str] = ()  # our card brings its own
    _name = "Aligner"
    args: AlignerConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: AlignerConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
    ) -> None:
        if args is None:
            args = AlignerConfig(f"{short_model_name(model)}-Aligner")
        if train_dataset is None:
            raise ValueError("train_dataset is missing: an aligner learns from rows of prompt, answer, correction.")
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_no_stream(name, dataset)
            _check_columns(name, dataset)
        if not isinstance(model, str) and args.model_init_kwargs is not None:
            raise ValueError(
                "model_init_kwargs has no effect on a model that is loaded already: pass its name instead."
            )
        self.template = make_template(args.aligner_template)
        self._data = {"training": dataset_size(train_dataset), "evaluation": dataset_size(eval_dataset)}
        with args.main_process_first():  # the others find in the cache what it has written there
            train_dataset = with_warmup(train_dataset, args.warmup_fraction)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        check_positions(self.model, max_length=args.max_length)
        sampler = self._get_train_sampler()
        if not sampler.rest:
            raise ValueError(f"No correction fits into max_length, {args.max_length} tokens. Raise it.")
        self._num_warmup_steps = sampler.num_warmup_steps
        if 0 < args.max_steps <= self._num_warmup_steps:
            raise ValueError(
                f"max_steps is {args.max_steps}, and the identity warm-up alone takes {self._num_warmup_steps}: "
                "nothing would be learnt but to copy. Raise max_steps, or lower warmup_fraction."
            )
        self.add_callback(CardBeforePush(self.create_model_card))

    # Data: SFTTrainer finds token ids and labels, and leaves them as they are

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: AlignerConfig, *rest: Any) -> Dataset:
        if "input_ids" not in column_names(dataset):
            with args.main_process_first():
                dataset = self._encode(dataset, processing_class, args.max_length, str(rest[-1]))
        return super()._prepare_dataset(dataset, processing_class, args, *rest)

    def _encode(self, dataset: Dataset, tokenizer: Any, max_length: int | None, name: str) -> Dataset:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no eos_token, so no correction could ever end. Set it.")
        encoder = _Encoder(self.template, tokenizer, max_length)
        encoded = dataset.map(encoder, remove_columns=[*COLUMNS], desc=f"Tokenizing {name} dataset")
        kept = encoded.filter(_has_tokens, desc=f"Dropping rows that are too long from {name} dataset")
        if dropped := len(encoded) - len(kept):
            said = f"Of {len(encoded)} rows of the {name} dataset, {dropped} do not fit into {max_length} tokens"
            if not len(kept):
                raise ValueError(f"{said}: nothing is left to train on. Raise max_length.")
            logger.warning("%s, even without their question, and are left out: max_length may be too low.", said)
        return kept

    # The Trainer's seams

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> WarmupSampler:
        args = self.args
        return WarmupSampler(
            self.train_dataset[IDENTITY],  # the one given has lost its column
            window=self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Adds the warm-up's steps to those of the epochs; see `Trainer.set_initial_training_values`."""
        _, per_epoch, examples, samples, batch_size, in_epoch, max_steps = super().set_initial_training_values(
            *args, **kwargs
        )
        # Once more, as the Trainer may have found a batch size of its own.
        self._num_warmup_steps = self._get_train_sampler().num_warmup_steps
        if self.args.max_steps <= 0:
            max_steps += self._num_warmup_steps
            samples += self._num_warmup_steps * batch_size
        return math.ceil(max_steps / per_epoch), per_epoch, examples, samples, batch_size, in_epoch, max_steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, forward and backward."""
        self._metrics["train"]["identity_warmup"].append(float(self.state.global_step < self._num_warmup_steps))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.template.save(output_dir or self.args.output_dir)

    # Checkpoints

    def _fixed_settings(self) -> dict[str, Any]:
        args = self.args
        return {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "warmup_fraction": args.warmup_fraction,
            "aligner_template": self.template.text,
            "rows of train_dataset": len(self.train_dataset),
        }

    # Publishing

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card, and the template beside it; see `PublishedTrainer.create_model_card`."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self.template.save(self.args.output_dir)

    def _describe(self, model: TrainedModel) -> TrainedModel:
        args = self.args
        return replace(
            model,
            papers=(ALIGNER,),
            method=f"{ALIGNER.link}: given a question and somebody's answer, it writes a better answer.",
            quick_start=(
                "```python\nfrom cyclealign_trl import Aligner\n\n"
                f'aligner = Aligner.from_pretrained("{model.repo_id}")\n'
                'aligner.correct(["How do I keep basil alive?"], ["Basil is easy. Stop asking."])\n```'
            ),
            settings={
                "identity warm-up": f"{args.warmup_fraction:.0%} of the rows" if args.warmup_fraction else "none",
                "learning rate": f"{args.learning_rate}, {SchedulerType(args.lr_scheduler_type).value}",
                "rows per step": str(args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
                "optimiser steps": str(self.state.global_step),
            },
            data={**model.data, **self._data},
            sections=["## Template", f"```\n{self.template.text}\n```"],
        )


@dataclass(frozen=True)
class _Encoder:
    """A row as token ids and labels; none where it is too long."""

    template: AlignerTemplate
    tokenizer: Any
    max_length: int | None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        correction = completion_text(row["correction"]).strip()
        # Tokenised by itself, as it will be written: after the text, not merged with its end.
        ids = list(self.tokenizer(correction, add_special_tokens=False, verbose=False)["input_ids"])
        ids.append(self.tokenizer.eos_token_id)
        room = None if self.max_length is None else self.max_length - len(ids)
        answer = completion_text(row["answer"]).strip()
        prompt_ids = self.template.encode(self.tokenizer, row["prompt"], answer, room)
        if prompt_ids is None:
            return {"input_ids": [], "labels": []}
        return {"input_ids": [*prompt_ids, *ids], "labels": [-100] * len(prompt_ids) + ids}


def _has_tokens(row: Mapping[str, Any]) -> bool:
    return bool(row["input_ids"])


def _check_columns(name: str, dataset: Dataset) -> None:
    columns = column_names(dataset)
    if not set(COLUMNS) <= columns:
        raise ValueError(
            f"{name} needs the columns 'prompt', 'answer' and 'correction'; it has {sorted(columns)}. "
            "load_corrections reads the published layout."
        )
    if not len(dataset):
        raise ValueError(f"{name} has no rows.")
