"""Arguments of `RankingTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from transformers import TrainingArguments

from ..training.config_checks import check_choice, check_init_kwargs, default_bf16, state_without_tokens

LossType = Literal["pro", "rrhf"]


@dataclass
class RankingConfig(TrainingArguments):
    """
    Arguments of [`RankingTrainer`]: those of [`~transformers.TrainingArguments`], and these.

    Of the inherited ones, some have other defaults here: `learning_rate=5e-6` with a constant schedule (PRO's),
    `logging_steps=10`, `remove_unused_columns=False`, `dataloader_pin_memory=False` (there is nothing to pin: batches
    are lists), and `bf16` is on where the accelerator has it.

    Args:
        loss_type (`str`, *optional*, defaults to `"pro"`):
            Ranking loss: `"pro"` (arXiv 2306.17492) or `"rrhf"` (arXiv 2304.05302).
        sft_weight (`float`, *optional*, defaults to `0.05`):
            Weight of the SFT loss, times (K-1)^2 for K completions per prompt (PRO's rule). The SFT loss is a sum
            over tokens. 0 trains on the ranking loss alone.
        max_prompt_length (`int` or `None`, *optional*, defaults to `512`):
            Longest prompt in tokens. A longer one loses its beginning. `None` keeps prompts whole.
        max_completion_length (`int`, *optional*, defaults to `128`):
            Longest completion in tokens, end-of-sequence token included. A longer one loses its end.
        chat_template_kwargs (`dict` or `None`, *optional*, defaults to `None`):
            Keyword arguments for the chat template of conversational prompts.
        model_init_kwargs (`dict` or `None`, *optional*, defaults to `None`):
            Keyword arguments for `from_pretrained` where the model is given by name.
    """

    _LOSS_TYPES: ClassVar[tuple[str, ...]] = get_args(LossType)
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "chat_template_kwargs",
        "model_init_kwargs",
    ]

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    logging_steps: float = field(default=10, metadata={"help": "Log every this many optimiser steps."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Use bfloat16. If not set: where the accelerator has it and fp16 is off."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the other columns belong to the prompt."}
    )

    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Of no use: batches are lists."})

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
        metadata={"help": "Longest prompt in tokens. A longer one loses its beginning. None keeps prompts whole."},
    )
    max_completion_length: int = field(
        default=128,
        metadata={"help": "Longest completion in tokens, end-of-sequence token included. A longer one loses its end."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the chat template of conversational prompts."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for from_pretrained where the model is given by name."},
    )

    def __getstate__(self) -> dict[str, Any]:
        return state_without_tokens(self)

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = default_bf16(self)
        super().__post_init__()
        check_choice("loss_type", self.loss_type, self._LOSS_TYPES)
        check_init_kwargs(self.model_init_kwargs)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the trainer reads the text columns themselves.")
        if self.sft_weight < 0:
            raise ValueError(f"sft_weight must be 0 or more, got {self.sft_weight}.")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1 token or None, got {self.max_prompt_length}.")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1 token, got {self.max_completion_length}.")
