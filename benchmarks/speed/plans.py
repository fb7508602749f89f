"""Choose what is measured, by size of the machine and time at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Part = Literal["loss", "step", "memory"]
OURS, GRPO, RLOO, ONLINE_DPO, UNSLOTH = TRAINER_NAMES = (
    "CycleAlignTrainer",
    "TRL GRPOTrainer",
    "TRL RLOOTrainer",
    "TRL OnlineDPOTrainer",
    "Unsloth GRPOTrainer",
)


@dataclass(frozen=True)
class LossWork:
    """Forward and backward of a ranking loss for one prompt.

    Args:
        model: A name in `MODELS`.
        length: Tokens of the prompt and its longest response together.
        prompt_share: Share of `length` that is prompt.
        n: Responses, K.
        lora: Whether LoRA layers are trained, and all other weights and the head are frozen.
    """

    model: str
    length: int
    prompt_share: float = 0.75
    n: int = 4
    lora: bool = False

    @property
    def lengths(self) -> tuple[int, list[int]]:
        """Tokens of the prompt and of each response.

        Responses are evenly spread from the longest to a third of it, as replies of one model differ in length.
        """
        prompt = round(self.length * self.prompt_share)
        longest, last = self.length - prompt, max(1, self.n - 1)
        return prompt, [max(1, math.ceil(longest * (1 - 2 / 3 * index / last))) for index in range(self.n)]

    def __str__(self) -> str:
        weights = "LoRA" if self.lora else "full"
        return f"{self.model} x {self.length}, {self.prompt_share:.0%} prompt, K {self.n}, {weights}"


@dataclass(frozen=True)
class StepWork:
    """Optimiser steps of a trainer that samples.

    Args:
        model: A name in `MODELS`.
        prompts: Prompts per step.
        prompt_length: Tokens of each prompt.
        n: Completions per prompt, K. Online DPO always samples 2.
        new_tokens: Tokens of each completion.
        lora: Whether LoRA layers are trained instead of all weights.
        vllm: Whether vLLM samples instead of `model.generate`.
        activation_checkpointing: Whether activations are recomputed in the backward pass.
        zero2: Whether DeepSpeed runs ZeRO-2, in one process.
        trainers: The trainers to run.
    """

    model: str
    prompts: int
    prompt_length: int
    n: int
    new_tokens: int
    lora: bool = False
    vllm: bool = False
    activation_checkpointing: bool = False
    zero2: bool = False
    trainers: tuple[str, ...] = TRAINER_NAMES

    def __str__(self) -> str:
        settings = ["LoRA" if self.lora else "full", "vLLM" if self.vllm else "generate"]
        settings += ["activation checkpointing"] * self.activation_checkpointing + ["ZeRO-2"] * self.zero2
        return f"{self.model}, {self.prompts} x {self.n} x {self.new_tokens} after {self.prompt_length}, " + ", ".join(
            settings
        )


@dataclass(frozen=True)
class Plan:
    """Works to measure, and the time for them.

    Args:
        loss: Works of the part "loss", the most important first.
        step: Works of the part "step", the most important first.
        memory: Works of the part "memory", which differ in the number of responses.
        seconds: Seconds for each part. What does not fit is reported as not run.
        rounds: Rounds of the losses that count, at most.
        step_rounds: How often each trainer runs.
        steps: Steps of each run, without the first, which does not count.
    """

    loss: tuple[LossWork, ...]
    step: tuple[StepWork, ...]
    memory: tuple[LossWork, ...]
    seconds: dict[Part, float]
    rounds: int = 5
    step_rounds: int = 2
    steps: int = 3


def _around(base: LossWork, shares: tuple[float, ...] = (), ns: tuple[int, ...] = ()) -> tuple[LossWork, ...]:
    """Return works that differ from one in the share of the prompt or in the number of responses."""
    return (*(replace(base, prompt_share=share) for share in shares), *(replace(base, n=n) for n in ns))


def _over_n(base: LossWork) -> tuple[LossWork, ...]:
    return tuple(replace(base, n=n) for n in (2, 4, 8, 16))


_CPU, _CPU_STEP = LossWork("32k", 256), StepWork("8k", 8, 128, 4, 64)
_GPU, _GPU_STEP = LossWork("Qwen3-0.6B", 2048), StepWork("Qwen3-0.6B", 8, 512, 8, 128)
_OURS_AND_GRPO = replace(_GPU_STEP, trainers=(OURS, GRPO))
_TINY, _TINY_STEP = LossWork("tiny", 32), StepWork("tiny", 2, 12, 3, 4)

PLANS = {
    "tiny": Plan(
        loss=(_TINY, replace(_TINY, lora=True), *_around(_TINY, (0.25, 0.9), (2,))),
        step=(
            _TINY_STEP,
            replace(_TINY_STEP, lora=True, activation_checkpointing=True),
            replace(_TINY_STEP, vllm=True),
        ),
        memory=_over_n(_TINY),
        seconds={"loss": 60, "step": 120, "memory": 30},
        rounds=1,
        step_rounds=1,
        steps=1,
    ),
    "quick": Plan(
        loss=(_CPU, replace(_CPU, lora=True)),
        step=(StepWork("8k", 4, 64, 4, 32),),
        memory=_over_n(LossWork("8k", 128)),
        seconds={"loss": 50, "step": 40, "memory": 20},
        rounds=1,
        step_rounds=1,
        steps=2,
    ),
    "cpu": Plan(
        loss=(
            _CPU,
            replace(_CPU, lora=True),
            replace(_CPU, model="151k", length=128),
            *_around(_CPU, (0.25, 0.9), (2,)),
            replace(_CPU, length=512),
            *_around(_CPU, (0.5,), (16, 8)),
            replace(_CPU, model="151k", length=512),
            replace(_CPU, model="151k", length=512, lora=True),
        ),
        step=(_CPU_STEP, replace(_CPU_STEP, lora=True), replace(_CPU_STEP, prompt_length=384)),
        memory=_over_n(_CPU),
        seconds={"loss": 250, "step": 150, "memory": 50},
        rounds=2,
        steps=1,
    ),
    "gpu": Plan(
        loss=(
            _GPU,
            replace(_GPU, lora=True),
            *_around(_GPU, (0.25, 0.5, 0.9), (2, 8, 16)),
            replace(_GPU, model="Qwen3-1.7B"),
            replace(_GPU, model="Qwen3-8B", lora=True),
            replace(_GPU, model="Qwen3-8B"),
            replace(_GPU, model="Qwen3-1.7B", lora=True),
        ),
        step=(
            _GPU_STEP,
            replace(_OURS_AND_GRPO, vllm=True),
            replace(_OURS_AND_GRPO, model="Qwen3-8B", lora=True, activation_checkpointing=True),
            replace(_OURS_AND_GRPO, model="Qwen3-1.7B"),
            replace(_GPU_STEP, lora=True),
            replace(_OURS_AND_GRPO, model="Qwen3-8B", lora=True, activation_checkpointing=True, vllm=True),
            replace(_OURS_AND_GRPO, activation_checkpointing=True),
            replace(_OURS_AND_GRPO, zero2=True),
            replace(_OURS_AND_GRPO, lora=True, activation_checkpointing=True, zero2=True),
        ),
        memory=_over_n(_GPU),
        seconds={"loss": 210, "step": 300, "memory": 60},
        step_rounds=1,
        steps=2,
    ),
}
"""Plans by name. "gpu" has more works than fit into its seconds: `--only` and `--work` choose among them."""
