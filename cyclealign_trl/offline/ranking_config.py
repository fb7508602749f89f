"""Arguments of `RankingTrainer`."""

from __future__ import annotations

from argparse import SUPPRESS
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from ..training.config_checks import (
    check_choice,
    check_init_kwargs,
    check_trainer_settings,
    default_bf16,
    state_without_tokens,
)
from .losses import LOSSES


@dataclass
class RankingConfig(TrainingArguments):
    """
    Arguments of [`RankingTrainer`], in addition to those of [`~transformers.TrainingArguments`].

    Some inherited arguments have other defaults: `learning_rate=5e-6` with a constant schedule (PRO's),
    `logging_steps=10`, `remove_unused_columns=False`, `dataloader_pin_memory=False` (batches are lists, which cannot
    be pinned), and `bf16` is on if the accelerator supports it.

    Args:
        loss_type (`str`, *optional*, defaults to `"pro"`):
            Ranking loss: `"pro"` (arXiv 2306.17492) or `"rrhf"` (arXiv 2304.05302).
        sft_weight (`float`, *optional*, defaults to `0.05`):
            Weight of the SFT loss, times (K-1)^2 for K completions per prompt (PRO's rule). The SFT loss is a sum
            over tokens. 0 trains on the ranking loss alone.
        max_prompt_length (`int` or `None`, *optional*, defaults to `512`):
            Maximum number of tokens of a prompt. Longer prompts are truncated on the left. `None` keeps them whole.
        max_completion_length (`int`, *optional*, defaults to `128`):
            Maximum number of tokens of a completion, including the end-of-sequence token. Longer completions are
            truncated on the right.
        chat_template (`str` or `None`, *optional*, defaults to `None`):
            Chat template for a model without one: a Jinja file, or a model that has one. It is saved with the model.
        chat_template_kwargs (`dict` or `None`, *optional*, defaults to `None`):
            Keyword arguments for the chat template of conversational prompts.
        model_init_kwargs (`dict` or `None`, *optional*, defaults to `None`):
            Keyword arguments for `from_pretrained` if the model is given by name.
    """

    _LOSS_TYPES: ClassVar[tuple[str, ...]] = tuple(LOSSES)
    _SAMPLING_STRATEGIES: ClassVar[tuple[str, ...]] = ("random", "sequential")
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "chat_template_kwargs",
        "model_init_kwargs",
    ]

    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=10, metadata={"help": "Number of optimiser steps between two logs."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Train in bfloat16. Defaults to whether the accelerator supports it and fp16 is off."},
    )
    # Not worth setting, so the command line help leaves them out.
    remove_unused_columns: bool | None = field(default=False, metadata={"help": SUPPRESS})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": SUPPRESS})

    loss_type: str = field(
        default="pro", metadata={"help": 'Ranking loss: "pro" (arXiv 2306.17492) or "rrhf" (arXiv 2304.05302).'}
    )
    sft_weight: float = field(
        default=0.05,
        metadata={
            "help": "Weight of the SFT loss, times (K-1)^2 for K completions per prompt (PRO's rule). The SFT loss is "
            "a sum over tokens. 0 trains on the ranking loss alone."
        },
    )
    max_prompt_length: int | None = field(
        default=512,
        metadata={
            "help": "Maximum number of tokens of a prompt. Longer prompts are truncated on the left. None keeps them "
            "whole."
        },
    )
    max_completion_length: int = field(
        default=128,
        metadata={
            "help": "Maximum number of tokens of a completion, including the end-of-sequence token. Longer "
            "completions are truncated on the right."
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template for a model without one: a Jinja file, or a model that has one. It is saved with "
            "the model."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the chat template of conversational prompts."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for from_pretrained if the model is given by name."}
    )

    def __getstate__(self) -> dict[str, Any]:
        return state_without_tokens(self)

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = default_bf16(self)
        super().__post_init__()
        check_choice("loss_type", self.loss_type, self._LOSS_TYPES)
        check_init_kwargs(self.model_init_kwargs)
        check_trainer_settings(self, self._SAMPLING_STRATEGIES)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the trainer reads all columns.")
        if self.sft_weight < 0:
            raise ValueError(f"sft_weight must be 0 or more, got {self.sft_weight}.")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1 token or None, got {self.max_prompt_length}.")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1 token, got {self.max_completion_length}.")
