"""Sizes of the study: every row gets the same number of judge calls or of pairs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Settings that all rows share.

    Args:
        calls: Judge calls of a row that asks the judge, and pairs or prompts of a row that does not.
        batch_size: Prompts or pairs per optimiser step.
        num_generations: Completions per judge call.
        max_prompt_length: Longest prompt in tokens. Longer ones are left out.
        max_completion_length: Longest completion in tokens, in training and in the evaluation.
        temperature: Temperature of the initial policy's samples and of those in the cycle.
        top_p: Nucleus of these samples.
        num_improvements: Samples of the initial policy that the judge picks its improved completion from.
        evaluation_prompts: Prompts per subset of HH-RLHF to evaluate on.
        learning_rate: Learning rate of all rows, constant.
        lora_rank: Rank of the adapters.
        save_steps: Optimiser steps between checkpoints.
    """

    calls: int
    batch_size: int
    num_generations: int
    max_prompt_length: int
    max_completion_length: int
    num_improvements: int
    evaluation_prompts: int
    temperature: float = 0.7
    top_p: float = 0.95
    learning_rate: float = 2e-4
    lora_rank: int = 8
    save_steps: int = 6

    @property
    def steps(self) -> int:
        """Return the number of optimiser steps of a row."""
        return self.calls // self.batch_size


SCALES = {
    "tiny": Scale(
        calls=4,
        batch_size=2,
        num_generations=2,
        max_prompt_length=128,
        max_completion_length=8,
        num_improvements=2,
        evaluation_prompts=1,
        save_steps=1,
    ),
    "small": Scale(
        calls=96,
        batch_size=4,
        num_generations=4,
        max_prompt_length=128,
        max_completion_length=64,
        num_improvements=8,
        evaluation_prompts=50,
    ),
    "full": Scale(
        calls=480,
        batch_size=16,
        num_generations=4,
        max_prompt_length=512,
        max_completion_length=128,
        num_improvements=8,
        evaluation_prompts=125,
        learning_rate=1e-4,
    ),
}
"""`tiny` is for the tests, `small` for a few minutes per row on a quiet CPU core, and `full` for a GPU."""
