"""Evaluation of the demo's policy on held-out questions."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import numpy as np
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.intervals import Estimate, bootstrap_group_means
from ..models.generation_backend import seeded
from ..models.transformers_backend import generate
from .tasks import DemoTask


@dataclass(frozen=True, slots=True)
class HeldOutSamples:
    """Several completions of each held-out question, and the mean of their scores."""

    completions: list[tuple[str, list[str]]]
    scores: list[float]

    @property
    def score(self) -> float:
        """Mean score over the questions."""
        return fmean(self.scores)


def sample_held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: DemoTask, seed: int = 0
) -> HeldOutSamples:
    """Sample completions of each held-out question of a task, the same for the same weights and seed."""
    prompt_ids = [
        list(tokenizer.apply_chat_template(_user(question), add_generation_prompt=True)["input_ids"])
        for question in task.held_out_questions
        for _ in range(task.num_samples)
    ]
    config = GenerationConfig(
        do_sample=True,
        temperature=task.settings["temperature"],
        top_p=task.settings["top_p"],
        top_k=0,
        max_new_tokens=task.settings["max_completion_length"],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(seed, model.device):
        completion_ids = generate(model, prompt_ids, config, model.device)
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    completions = [
        (question, texts[index * task.num_samples : (index + 1) * task.num_samples])
        for index, question in enumerate(task.held_out_questions)
    ]
    return HeldOutSamples(
        completions, [fmean(task.score(question, text) for text in texts) for question, texts in completions]
    )


def compare_scores(before: HeldOutSamples, after: HeldOutSamples, seed: int = 0) -> tuple[Estimate, ...]:
    """Return the mean score before, after, and its change, with 95% bootstrap intervals over the questions."""
    values = np.array([before.scores, after.scores]).T  # (questions, 2)
    values = np.column_stack([values, values[:, 1] - values[:, 0]])
    groups = ["held out"] * len(values)
    means = bootstrap_group_means(values, groups, None, n_resamples=2000, confidence_level=0.95, seed=seed)
    return tuple(means.micro)


def _user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]
