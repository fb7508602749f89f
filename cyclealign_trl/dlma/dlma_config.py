"""Arguments of `DLMATrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..offline.ranking_config import RankingConfig


@dataclass
class DLMAConfig(RankingConfig):
    """
    Arguments of [`DLMATrainer`]: those of [`RankingConfig`], and these.

    Of the inherited ones, these have other defaults, those of the paper's released run: `learning_rate=5e-7` with a
    constant schedule after `warmup_steps=150`, `optim="rmsprop"`, `max_grad_norm=10`, `num_train_epochs=1`,
    `max_prompt_length=256`, `max_completion_length=256`; and `sft_weight=0`. `loss_type` must stay `"dlma"`:
    `margin_weight` says how far it is from DPO.

    Args:
        beta (`float`, *optional*, defaults to `0.1`):
            How strongly the policy is held to the reference: the smaller, the less.
        margin_weight (`float`, *optional*, defaults to `0.2`):
            Weight of the self-reward in the margin. 0 is DPO, and needs no self-rewards.
        margin_clip (`list[float]`, *optional*, defaults to `[-40.0, 40.0]`):
            Range that self-rewards are clipped to, in nats.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Whether to score all pairs with the reference before training, instead of keeping it in memory.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether the policy trains without dropout, as policy and reference are compared.
    """

    _LOSS_TYPES: ClassVar[tuple[str, ...]] = ("dlma",)

    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "The learning rate schedule."})
    warmup_steps: float = field(default=150, metadata={"help": "Steps of linear warm-up; below 1, a share of all."})
    optim: str = field(default="rmsprop", metadata={"help": "The optimiser."})
    max_grad_norm: float = field(default=10.0, metadata={"help": "Largest norm of the gradient."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})
    max_prompt_length: int | None = field(
        default=256,
        metadata={"help": "Longest prompt in tokens. A longer one loses its beginning. None keeps prompts whole."},
    )
    max_completion_length: int = field(
        default=256,
        metadata={"help": "Longest completion in tokens, end-of-sequence token included. A longer one loses its end."},
    )
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the SFT loss on the chosen completion."})

    loss_type: str = field(
        default="dlma", metadata={"help": 'Must stay "dlma": margin_weight says how far it is from DPO.'}
    )
    beta: float = field(
        default=0.1, metadata={"help": "How strongly the policy is held to the reference: the smaller, the less."}
    )
    margin_weight: float = field(
        default=0.2, metadata={"help": "Weight of the self-reward in the margin. 0 is DPO, and needs no self-rewards."}
    )
    margin_clip: list[float] = field(
        default_factory=lambda: [-40.0, 40.0],
        metadata={"help": "Range that self-rewards are clipped to, in nats."},
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Whether to score all pairs with the reference before training, instead of keeping it in memory."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether the policy trains without dropout, as policy and reference are compared."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"beta must be above 0, got {self.beta}.")
        if self.margin_weight < 0:
            raise ValueError(f"margin_weight must be 0 or more, got {self.margin_weight}.")
        if len(self.margin_clip) != 2 or not self.margin_clip[0] < self.margin_clip[1]:
            raise ValueError(f"margin_clip must be a lower and a higher bound, got {self.margin_clip}.")
