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


def loss_step(loss_type: str = "pro") -> Callable[[Any, Any], torch.Tensor]:
    """Return a function from a model and a group of ranked token ids to a ranking loss plus SFT.

    A group has `n` responses, `prompt` ids, `responses` as ids from best to worst, and `rewards`. The loss is
    PRO's with the temperatures of the rewards, or RRHF's with `loss_type="rrhf"`.
    """
    from cyclealign_trl import pro_loss, rrhf_loss
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
            device=group.prompt.device,
            scoring=scorings[id(model)],
        )
        ranks = torch.arange(group.n, device=group.prompt.device)[None]  # (1, K)
        scores = (sums / lengths)[None]  # (1, K)
        if loss_type == "rrhf":
            objective: torch.Tensor = rrhf_loss(scores, ranks).sum() - sums[0]
        else:
            ranking = pro_loss(scores, ranks, group.rewards[None].to(sums)).sum()
            objective = ranking - SFT_WEIGHT * (group.n - 1) ** 2 * sums[0]
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
    base_url: str = "",
    *,
    ranker: Any = None,
    peft_config: Any = None,
    **settings: Any,
) -> Any:
    """Return a `CycleAlignTrainer` that only needs `train()`, with a ranker or with one at `base_url`.

    `settings` are fields of `CycleAlignConfig` that replace those of a plain run on the CPU.
    """
    from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, LLMRanker

    plain: dict[str, Any] = {
        "max_steps": steps,
        "num_interactions": 1,
        "per_device_train_batch_size": prompts_per_step,
        "num_generations": n,
        "max_completion_length": max_new_tokens,
        "max_prompt_length": None,
        "sft_target": "top_ranked",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-6,
        "disable_tqdm": True,
        "top_p": 1.0,
    }
    return CycleAlignTrainer(
        model,
        ranker or LLMRanker("loopback", base_url, "none", improve=False),
        CycleAlignConfig(output_dir, **plain | settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


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
