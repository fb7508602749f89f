"""Arguments of `AlignerTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..training.config_checks import check_init_kwargs, default_bf16, state_without_tokens
from .aligner_template import DEFAULT_TEMPLATE, make_template


@dataclass
class AlignerConfig(SFTConfig):
    """
    Arguments of [`AlignerTrainer`]: those of [`~trl.SFTConfig`], and these.

    Of the inherited ones, some have other defaults here, after the paper (arXiv 2402.02416): `lr_scheduler_type` is
    cosine with `warmup_steps=0.03` of all steps, `adam_beta2=0.95`, `max_length=2048`. `bf16` is on where the
    accelerator has it.

    Args:
        aligner_template (`str`, *optional*, defaults to `"labels"`):
            What question and answer are put into: `"labels"`, `"instruction"`, `"conversation"`, or a text of your
            own with {question} and {answer}. It is saved with the model.
        warmup_fraction (`float`, *optional*, defaults to `0.2`):
            Part of the rows that training begins with, the answer itself as the correction (identity warm-up). 0
            leaves it out.
    """

    bf16: bool | None = field(
        default=None, metadata={"help": "Use bfloat16. If not set: where the accelerator has it and fp16 is off."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Steps over which the learning rate rises; below 1, a part of all steps."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    max_length: int | None = field(
        default=2048,
        metadata={
            "help": "Longest question, answer and correction together, in tokens. A longer row loses the beginning of "
            "its question, or is left out where that does not do. None keeps all whole."
        },
    )
    # TRL's default is True under the old name, which warns; see `__post_init__`.
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute activations again in the backward pass, to save memory. If not set: on.",
            "nargs": "?",
            "const": True,
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of activation_checkpointing.", "nargs": "?", "const": True}
    )

    aligner_template: str = field(
        default=DEFAULT_TEMPLATE,
        metadata={
            "help": 'What question and answer are put into: "labels", "instruction", "conversation", or a text of '
            "your own with {question} and {answer}. It is saved with the model."
        },
    )
    warmup_fraction: float = field(
        default=0.2,
        metadata={
            "help": "Part of the rows that training begins with, the answer itself as the correction (identity "
            "warm-up). 0 leaves it out."
        },
    )

    def __getstate__(self) -> dict[str, Any]:
        return state_without_tokens(self)

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = default_bf16(self)
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        super().__post_init__()
        make_template(self.aligner_template)
        check_init_kwargs(self.model_init_kwargs)
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must be from 0 to 1, got {self.warmup_fraction}.")
        if self.packing or self.eval_packing:
            raise ValueError("packing must be False: a packed row would mix warm-up with the rest, and corrections.")
        if self.completion_only_loss is False or self.assistant_only_loss:
            raise ValueError(
                "The loss is on the correction alone: leave out completion_only_loss=False and assistant_only_loss."
            )
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy must be 'random', got {self.train_sampling_strategy!r}: the warm-up comes "
                "first, and each epoch has an order of its own."
            )
