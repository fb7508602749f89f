"""Evaluate models by the rewards of their replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from ..aligner.upstreams import Upstream
from ..models.reward_scorer import RewardScorer
from ..types import valid_text
from .intervals import check_confidence_level
from .metrics.reward_score import check_transform
from .prompts import PromptSet, load_prompts
from .replies import collect_replies
from .reply_scores import StoredScorer
from .reward_report import RewardReport
from .sources import ReplySettings, ReplySource, UpstreamSource, parse_source


def evaluate_models(
    models: Sequence[str | ReplySource] | Mapping[str, str | Upstream],
    reward_model: str | RewardScorer,
    prompts: PromptSet | None = None,
    *,
    output_dir: str | PathLike[str] = "outputs/evaluation",
    settings: ReplySettings | None = None,
    reward_model_kwargs: Mapping[str, Any] | None = None,
    transform: str = "sigmoid",
    confidence_level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> RewardReport:
    """Evaluate models by the rewards of their greedy replies to the same prompts, as the CycleAlign paper does.

    Replies and scores are stored in `output_dir` as soon as their batch is finished. An interrupted or extended
    evaluation generates and scores only what is missing. Models are loaded one at a time, then the reward model.

    Args:
        models: Texts that `parse_source` reads (models, adapters, endpoints, aligners, data sets of replies), or such
            texts and `Upstream`s by the names to report.
        reward_model: Name or path of a sequence classifier with one output, or a `RewardScorer`.
        prompts: Prompts in groups, from `load_prompts` or `read_prompts`. `None` loads the test prompts of HH-RLHF's
            four subsets.
        output_dir: Folder of replies and scores.
        settings: How replies are generated. `None` means the paper's settings.
        reward_model_kwargs: Keyword arguments of `RewardScorer`, if the reward model is named.
        transform: `"sigmoid"` to report 100 times the sigmoid of the rewards, as in the paper's tables, or `"none"`.
        confidence_level: Coverage of the intervals.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        ValueError: If an argument is invalid, stored replies or scores have other settings, or a model or the reward
            model cannot read a prompt.
        OSError: If there is no such model.
        UpstreamError: If an endpoint does not answer.
    """
    check_confidence_level(confidence_level)
    check_transform(transform)
    if isinstance(models, str) or not models:
        raise ValueError(f"models must be at least one model in a list or a dictionary, got {models!r}.")
    sources = _make_sources(models)
    scorer = StoredScorer(reward_model, output_dir, reward_model_kwargs)
    prompts = prompts or load_prompts()
    replies = collect_replies(sources, prompts.prompts, output_dir, settings)
    return RewardReport(
        reward_model=scorer.name,
        prompts=prompts.prompts,
        group_sizes=prompts.group_sizes,
        replies=replies,
        scores={name: scorer.score(name, prompts.prompts, of_model) for name, of_model in replies.items()},
        transform=transform,
        confidence_level=confidence_level,
        n_resamples=n_resamples,
        seed=seed,
    )


def _make_sources(models: Sequence[str | ReplySource] | Mapping[str, str | Upstream]) -> list[ReplySource]:
    if not isinstance(models, Mapping):
        return [parse_source(model) if isinstance(model, str) else model for model in models]
    sources: list[ReplySource] = []
    for name, model in models.items():
        source = parse_source(model) if isinstance(model, str) else UpstreamSource(name, model)
        source.name = valid_text(name)
        sources.append(source)
    return sources
