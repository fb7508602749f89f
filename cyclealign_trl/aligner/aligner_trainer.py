"""`AlignerTrainer`: train a model to correct the answers of other models."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SchedulerType, TrainerCallback
from trl import SFTTrainer

from ..data.formats import completion_text, plain_prompt
from ..models.loading import (
    check_positions,
    check_tokenizer,
    check_vocabulary,
    loading,
    max_positions,
    short_model_name,
)
from ..models.special_text import TextEncoder
from ..training.base_trainer import BaseTrainer, Optimizers
from ..training.config_checks import check_config_class
from ..training.dataset_checks import check_has_rows, check_map_style, column_names, describe_dataset, named_datasets
from ..training.model_card import Paper, TrainedModel
from ..training.row_checks import COMPLETION, PROMPT, RowCheck, check_rows, plain_rows
from .aligner_config import AlignerConfig
from .aligner_template import AlignerTemplate, make_template, render_question
from .corrections import CORRECTION_COLUMNS
from .identity_warmup import IDENTITY_COLUMN, WarmupSampler, with_warmup

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

PAPER = Paper(
    "Aligner",
    "Aligner: Efficient Alignment by Learning to Correct",
    "Ji, Jiaming and Chen, Boyuan and Lou, Hantao and Hong, Donghai and Zhang, Borong and Pan, Xuehai and Dai, Juntao "
    "and Qiu, Tianyi and Yang, Yaodong",
    2024,
    "2402.02416",
)


class AlignerTrainer(BaseTrainer, SFTTrainer):
    """Train an aligner (arXiv 2402.02416), a model that turns a question and an answer into a better answer.

    The loss is SFT on the correction and its end-of-sequence token, given the question and the answer in a template.
    Training starts with an identity warm-up: one pass over the first `warmup_fraction` of the rows, with the answer as
    the correction. Then it takes `num_train_epochs` passes over all rows. One learning rate schedule spans both.

    Args:
        model: A causal language model, or its name on the Hub or on disk.
        args: Arguments of the training.
        train_dataset: Rows of `prompt` (text or messages), `answer` and `correction` (texts, or lists of one
            assistant message).
        eval_dataset: Rows in the same format, or a mapping of several data sets. They get no warm-up rows.
        processing_class: Tokenizer. Defaults to the one of the model's name.
        peft_config: PEFT configuration, to train an adapter instead of all weights.
        callbacks: Additional callbacks.
        optimizers: Optimiser and learning rate scheduler to use instead of the default ones.

    Raises:
        TypeError: If `args` belongs to another trainer, or `processing_class` is not a tokenizer.
        ValueError: If a data set has no rows or lacks a column, no row fits into `max_length`, `max_length` exceeds
            the model's positions, or `max_steps` ends within the warm-up.
    """

    _tag_names: Sequence[str] = ()  # the model card has tags of its own
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
        check_config_class(self, args, AlignerConfig)
        if processing_class is not None:
            check_tokenizer("processing_class", processing_class)
        if train_dataset is None:
            raise ValueError("train_dataset is missing. Pass rows of prompt, answer and correction.")
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_has_rows(name, dataset)
        train_dataset, eval_dataset = plain_rows(train_dataset), plain_rows(eval_dataset)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_map_style(name, dataset)
            _check_columns(name, dataset)
            check_rows(name, dataset, _ROW_CHECK)
        if not isinstance(model, str) and args.model_init_kwargs is not None:
            raise ValueError(
                "model_init_kwargs have no effect on a model that is already loaded. Pass its name instead."
            )
        self.template = make_template(args.aligner_template)
        self._data = {"training": describe_dataset(train_dataset), "evaluation": describe_dataset(eval_dataset)}
        with args.main_process_first():  # the other processes read the result from the cache
            train_dataset = with_warmup(train_dataset, args.warmup_fraction)
        with loading(model):
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
        for name, dataset in named_datasets(self.train_dataset, self.eval_dataset):
            _check_longest(name, dataset, max_positions(self.model))
        sampler = self._get_train_sampler()
        if not sampler.rest:
            raise ValueError(f"No correction fits into max_length={args.max_length} tokens. Raise max_length.")
        self._num_warmup_steps = sampler.num_warmup_steps
        if 0 < args.max_steps <= self._num_warmup_steps:
            raise ValueError(
                f"max_steps is {args.max_steps}, but the identity warm-up alone takes {self._num_warmup_steps} steps, "
                "so the model would only learn to copy. Raise max_steps, or lower warmup_fraction."
            )

    # Data: SFTTrainer leaves rows alone that have token ids and labels already

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: AlignerConfig, *rest: Any) -> Dataset:
        if "input_ids" not in column_names(dataset):
            with args.main_process_first():
                dataset = self._encode(dataset, processing_class, args.max_length, str(rest[-1]))
        return super()._prepare_dataset(dataset, processing_class, args, *rest)

    def _encode(self, dataset: Dataset, tokenizer: Any, max_length: int | None, name: str) -> Dataset:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no eos_token, which has to end each correction. Set it.")
        encoder = _Encoder(self.template, TextEncoder(tokenizer), max_length)
        encoded = dataset.map(encoder, remove_columns=[*CORRECTION_COLUMNS], desc=f"Tokenizing {name} dataset")
        kept = encoded.filter(_has_tokens, desc=f"Dropping rows that are too long from {name} dataset")
        if dropped := len(encoded) - len(kept):
            report = (
                f"{dropped} of {len(encoded)} rows of the {name} dataset do not fit into max_length={max_length} "
                "tokens, even without their question"
            )
            if not len(kept):
                raise ValueError(f"{report}. No row is left: raise max_length.")
            logger.warning("%s. They are dropped: raise max_length to keep them.", report)
        return kept

    # Hooks of the Trainer

    def train(self, *args: Any, **kwargs: Any) -> Any:  # transformers.trainer_utils.TrainOutput
        """Train from the start or from a checkpoint; see `BaseTrainer.train`."""
        check_vocabulary(self.model, self.processing_class)
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> WarmupSampler:
        args = self.args
        return WarmupSampler(
            self.train_dataset[IDENTITY_COLUMN],  # the Trainer has removed the column from its argument
            window=self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Add the steps of the warm-up to those of the epochs; see `Trainer.set_initial_training_values`."""
        _, per_epoch, examples, samples, batch_size, in_epoch, max_steps = super().set_initial_training_values(
            *args, **kwargs
        )
        # Count again, because `auto_find_batch_size` can change the batch size.
        self._num_warmup_steps = self._get_train_sampler().num_warmup_steps
        if self.args.max_steps <= 0:
            max_steps += self._num_warmup_steps
            samples += self._num_warmup_steps * batch_size
        return math.ceil(max_steps / per_epoch), per_epoch, examples, samples, batch_size, in_epoch, max_steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train on one micro-batch, and log whether it belongs to the warm-up."""
        self._metrics["train"]["identity_warmup"].append(float(self.state.global_step < self._num_warmup_steps))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.template.save(output_dir or self.args.output_dir)

    # Checkpoints

    def _resume_settings(self) -> dict[str, Any]:
        return {
            **super()._resume_settings(),
            "warmup_fraction": self.args.warmup_fraction,
            "aligner_template": self.template.text,
        }

    # Publishing

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card and the template; see `BaseTrainer.create_model_card`."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self.template.save(self.args.output_dir)

    def _describe(self, model: TrainedModel) -> TrainedModel:
        args = self.args
        return replace(
            model,
            papers=(PAPER,),
            method=f"{PAPER.link}: given a question and an answer, it writes a better answer.",
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
    """Turn a row into token ids and labels, both empty if the row is too long."""

    template: AlignerTemplate
    encoder: TextEncoder
    max_length: int | None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        correction = completion_text(row["correction"]).strip()
        # Inference generates it after the prompt, so no token can span both.
        ids = [*self.template.encode_correction(self.encoder, correction), self.encoder.tokenizer.eos_token_id]
        max_prompt_length = None if self.max_length is None else self.max_length - len(ids)
        answer = completion_text(row["answer"]).strip()
        prompt_ids = self.template.encode(self.encoder, plain_prompt(row["prompt"]), answer, max_prompt_length)
        if prompt_ids is None:
            return {"input_ids": [], "labels": []}
        return {"input_ids": [*prompt_ids, *ids], "labels": [-100] * len(prompt_ids) + ids}


def _read_row(row: Mapping[str, Any]) -> tuple[str, str, str]:
    question = render_question(plain_prompt(row["prompt"]))
    if not question:
        raise ValueError(f"column 'prompt' is empty: {row['prompt']!r}. Remove the row.")
    return question, completion_text(row["answer"]), completion_text(row["correction"])


_ROW_CHECK = RowCheck(
    {"prompt": PROMPT, "answer": COMPLETION, "correction": COMPLETION},
    read=_read_row,
    collate=lambda rows: [_read_row(row) for row in rows],
)


def _has_tokens(row: Mapping[str, Any]) -> bool:
    return bool(row["input_ids"])


def _check_longest(name: str, dataset: Dataset, positions: int | None) -> None:
    """Raise `ValueError` if tokenised rows are too long for the model, which they can be without `max_length`."""
    rows = dataset.select_columns("input_ids").with_format("arrow")
    longest = max(
        pc.max(pc.list_value_length(rows[start : start + 10_000]["input_ids"])).as_py()
        for start in range(0, len(dataset), 10_000)
    )
    if positions is not None and longest > positions:
        raise ValueError(
            f"The longest row of {name} has {longest} tokens, but the model has {positions} positions. Set max_length "
            f"to {positions}: longer questions lose their beginning."
        )


def _check_columns(name: str, dataset: Dataset) -> None:
    columns = column_names(dataset)
    if not set(CORRECTION_COLUMNS) <= columns:
        raise ValueError(
            f"{name} needs the columns 'prompt', 'answer' and 'correction', got {sorted(columns)}. load_corrections "
            "converts the published layout."
        )
