"""Arguments of `DLMATrainer`."""

from __future__ import annotations

from argparse import SUPPRESS
from dataclasses import dataclass, field
from typing import ClassVar

from ..offline.ranking_config import RankingConfig


@dataclass
class DLMAConfig(RankingConfig):
    """
    Arguments of [`DLMATrainer`], in addition to those of [`RankingConfig`].

    Some inherited arguments have other defaults, taken from the paper's released run: `learning_rate=5e-7` with a
    constant schedule after `warmup_steps=150`, `optim="rmsprop"`, `max_grad_norm=10`, `num_train_epochs=1`,
    `max_prompt_length=256` and `max_completion_length=256`. `sft_weight` defaults to 0, and `loss_type` must be
    `"dlma"`. For DPO, set `margin_weight=0`.

    Args:
        beta (`float`, *optional*, defaults to `0.1`):
            Strength of the pull towards the reference model.
        margin_weight (`float`, *optional*, defaults to `0.2`):
            Weight of the self-reward in the margin. 0 gives DPO, which needs no self-rewards.
        margin_clip (`list[float]`, *optional*, defaults to `[-40.0, 40.0]`):
            Range to clip self-rewards to, in nats.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Whether to score all pairs with the reference model before training, instead of keeping it in memory.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to train the policy without dropout, so that policy and reference are comparable.
    """

    _LOSS_TYPES: ClassVar[tuple[str, ...]] = ("dlma",)

    learning_rate: float = field(default=5e-7, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=150, metadata={"help": "Number of warm-up steps. A value below 1 is a share of all steps."}
    )
    optim: str = field(default="rmsprop", metadata={"help": "Optimiser."})
    max_grad_norm: float = field(default=10.0, metadata={"help": "Maximum norm of the gradient."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs."})
    max_prompt_length: int | None = field(
        default=256,
        metadata={
            "help": "Maximum number of tokens of a prompt. Longer prompts are truncated on the left. None keeps them "
            "whole."
        },
    )
    max_completion_length: int = field(
        default=256,
        metadata={
            "help": "Maximum number of tokens of a completion, including the end-of-sequence token. Longer "
            "completions are truncated on the right."
        },
    )
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the SFT loss on the chosen completion."})

    # Has a single legal value, so the command line help leaves it out.
    loss_type: str = field(default="dlma", metadata={"help": SUPPRESS})
    beta: float = field(default=0.1, metadata={"help": "Strength of the pull towards the reference model."})
    margin_weight: float = field(
        default=0.2,
        metadata={"help": "Weight of the self-reward in the margin. 0 gives DPO, which needs no self-rewards."},
    )
    margin_clip: list[float] = field(
        default_factory=lambda: [-40.0, 40.0],
        metadata={"help": "Range to clip self-rewards to, in nats."},
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Whether to score all pairs with the reference model before training, instead of keeping it in "
            "memory."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether to train the policy without dropout, so that policy and reference are comparable."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"beta must be above 0, got {self.beta}.")
        if self.margin_weight < 0:
            raise ValueError(f"margin_weight must be 0 or more, got {self.margin_weight}.")
        if len(self.margin_clip) != 2 or not self.margin_clip[0] < self.margin_clip[1]:
            raise ValueError(f"margin_clip must be a lower and a higher bound, got {self.margin_clip}.")
