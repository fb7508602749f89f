"""Arguments of `AlignerTrainer`."""

from __future__ import annotations

from argparse import SUPPRESS
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..training.config_checks import check_init_kwargs, default_bf16, state_without_tokens
from .aligner_template import DEFAULT_TEMPLATE, make_template


@dataclass
class AlignerConfig(SFTConfig):
    """
    Arguments of [`AlignerTrainer`]: those of [`~trl.SFTConfig`] and the ones below.

    Some inherited arguments have the paper's values as defaults (arXiv 2402.02416): `lr_scheduler_type="cosine"` with
    `warmup_steps=0.03` of all steps, `adam_beta2=0.95`, `max_length=2048`. `bf16` defaults to on if the accelerator
    supports it.

    Args:
        aligner_template (`str`, *optional*, defaults to `"labels"`):
            Template for question and answer: `"labels"`, `"instruction"`, `"conversation"`, or a text of your own with
            {question} and {answer}. It is saved with the model.
        warmup_fraction (`float`, *optional*, defaults to `0.2`):
            Fraction of the rows to start training on with the answer as the correction (identity warm-up). 0 skips the
            warm-up.
    """

    bf16: bool | None = field(
        default=None, metadata={"help": "Use bfloat16. Defaults to on if the accelerator supports it and fp16 is off."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=0.03,
        metadata={"help": "Number of steps in which the learning rate rises, or a fraction of all steps if below 1."},
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    max_length: int | None = field(
        default=2048,
        metadata={
            "help": "Maximum number of tokens in question, answer and correction together. A longer row loses the "
            "beginning of its question, and is dropped if that is not enough. None keeps all rows whole."
        },
    )
    # TRL defaults the deprecated name to True, which would warn. `__post_init__` sets the default instead.
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass to save memory. Defaults to on.",
            "nargs": "?",
            "const": True,
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated alias of activation_checkpointing.", "nargs": "?", "const": True}
    )

    # Have no effect or a single legal value (see `__post_init__`), so the command line help leaves them out.
    dataset_text_field: str = field(default="text", metadata={"help": SUPPRESS})
    packing: bool = field(default=False, metadata={"help": SUPPRESS})
    packing_strategy: str = field(default="bfd", metadata={"help": SUPPRESS})
    eval_packing: bool | None = field(default=None, metadata={"help": SUPPRESS})
    completion_only_loss: bool | None = field(default=None, metadata={"help": SUPPRESS})
    assistant_only_loss: bool = field(default=False, metadata={"help": SUPPRESS})
    train_sampling_strategy: str = field(default="random", metadata={"help": SUPPRESS})

    aligner_template: str = field(
        default=DEFAULT_TEMPLATE,
        metadata={
            "help": 'Template for question and answer: "labels", "instruction", "conversation", or a text of your own '
            "with {question} and {answer}. It is saved with the model."
        },
    )
    warmup_fraction: float = field(
        default=0.2,
        metadata={
            "help": "Fraction of the rows to start training on with the answer as the correction (identity warm-up). "
            "0 skips the warm-up."
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
            raise ValueError(
                "packing and eval_packing must be False, because a packed row would mix several corrections, and the "
                "warm-up with other rows."
            )
        if self.completion_only_loss is False or self.assistant_only_loss:
            raise ValueError(
                "The loss is on the correction alone. Leave out completion_only_loss=False and assistant_only_loss."
            )
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy must be 'random', got {self.train_sampling_strategy!r}. The warm-up comes "
                "first, then each epoch in a random order."
            )
