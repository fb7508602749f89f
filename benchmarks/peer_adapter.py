"""Entry points for side-by-side benchmarks against other projects.

A harness that compares several projects imports this file and calls `loss_step`, `trainer` and `rank_many`. The file
itself is not a benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

SFT_WEIGHT = 0.05
TRAINER_PHASES = {
    "generate": ["generation.generate"],
    "train": ["_sequence_logps", "accelerator.backward", "accelerator.clip_grad_norm_"],
}
"""Attribute paths on the trainer of the calls that make up each phase of a step."""


def loss_step() -> Callable[[Any, Any], torch.Tensor]:
    """Return a function from a model and a group of ranked token ids to the PRO loss plus SFT.

    A group has `n` responses, `prompt` ids, `responses` as ids from best to worst, and `rewards`.
    """
    from cyclealign_trl import pro_loss
    from cyclealign_trl.models.choose_scoring import choose_scoring
    from cyclealign_trl.models.logps import Scoring, add_scoring, sequence_logps

    scorings: dict[int, Scoring] = {}

    def step(model: Any, group: Any) -> torch.Tensor:
        if id(model) not in scorings:
            add_scoring(model)
            scorings[id(model)] = choose_scoring(
                model,
                num_completions=group.n,
                max_prompt_length=len(group.prompt),
                max_completion_length=max(map(len, group.responses)),
            )
        sums, lengths = sequence_logps(
            model,
            [group.prompt.tolist()] * group.n,
            [response.tolist() for response in group.responses],
            pad_token_id=0,
            device=torch.device("cpu"),
            scoring=scorings[id(model)],
        )
        ranks = torch.arange(group.n)[None]  # (1, K)
        loss = pro_loss((sums / lengths)[None], ranks, group.rewards[None].to(sums)).mean()
        objective: torch.Tensor = loss - SFT_WEIGHT * (group.n - 1) ** 2 * sums[0]
        return objective

    return step


def trainer(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    output_dir: str,
    steps: int,
    prompts_per_step: int,
    n: int,
    max_new_tokens: int,
    base_url: str,
) -> Any:
    """Return a `CycleAlignTrainer` that only needs `train()`, with a ranker at `base_url`."""
    from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, LLMRanker

    args = CycleAlignConfig(
        output_dir,
        max_steps=steps,
        num_interactions=1,
        per_device_train_batch_size=prompts_per_step,
        num_generations=n,
        max_completion_length=max_new_tokens,
        max_prompt_length=None,
        sft_target="top_ranked",
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        learning_rate=1e-6,
        disable_tqdm=True,
        top_p=1.0,
    )
    ranker = LLMRanker("loopback", base_url, "none", improve=False)
    return CycleAlignTrainer(model, ranker, args, train_dataset=dataset, processing_class=tokenizer)


def rank_many() -> Callable[[str, Sequence[str], Sequence[Sequence[str]]], list[Any]]:
    """Return a function that ranks the responses to each prompt at an endpoint."""
    from cyclealign_trl import LLMRanker, RankingRequest

    def rank(base_url: str, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> list[Any]:
        ranker = LLMRanker("loopback", base_url, "none", max_concurrency=64, improve=False)
        # Equal texts are ranked once, so the position makes them distinct.
        texts = [tuple(f"{text} {index}" for index, text in enumerate(group)) for group in responses]
        requests = [RankingRequest(prompt, group) for prompt, group in zip(prompts, texts, strict=True)]
        return list(ranker.rank(requests))

    return rank
