"""Ranking losses as pure functions of tensors, and the registry that `loss_type` looks them up in.

Shapes: B prompts with K completions each. The score of a completion is the policy's mean log-probability per token.
Its rank is 0 for the best completion, equal ranks are ties, and -1 marks an absent completion. Sums run in float32 or
wider: bfloat16 scores give float32 losses.

To add a loss: write the function, and add it to `LOSSES` with its paper.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..training.model_card import Paper
from ..types import ABSENT


class LossFunction(Protocol):
    """Signature of a ranking loss."""

    def __call__(self, scores: Tensor, ranks: Tensor, rewards: Tensor | None) -> Tensor:
        """Return the loss per prompt `(B,)` from scores, ranks and, if the data has them, rewards, all `(B, K)`."""
        ...


class RankingLoss(NamedTuple):
    """A ranking loss and its paper, which the model card cites."""

    function: LossFunction
    paper: Paper


def pro_loss(scores: Tensor, ranks: Tensor, rewards: Tensor | None = None) -> Tensor:
    """Return the loss of Preference Ranking Optimization (PRO, arXiv 2306.17492).

    Each completion competes with all that rank below it: for completions sorted from best to worst, the loss is
    `-sum_k log(exp(p_k) / sum_{i >= k} exp(p_i))`. With rewards, every comparison has a temperature: `p_i` is
    multiplied by the reward gap `r_k - r_i`, and `p_k` by the largest gap. Completions of equal rank do not compete.
    The loss is computed through log-sum-exp, so it is exact and finite at any length.

    Args:
        scores: Mean log-probabilities, `(B, K)`.
        ranks: Integer ranks, `(B, K)`.
        rewards: Rewards that the ranks come from, `(B, K)`, for PRO's temperatures. They must not grow with the rank.

    Returns:
        Loss per prompt, `(B,)`. It is 0, with a gradient of 0, for prompts with fewer than two different ranks.

    Raises:
        ValueError: If a completion has a larger reward than one that ranks above it.
    """
    scores, better, absent = _compare(scores, ranks)
    logits = scores.unsqueeze(1).expand_as(better)  # (B, K, K): [b, k, i] is p_i in the term of completion k
    own = scores
    if rewards is not None:
        rewards = rewards.to(scores).masked_fill(absent, 0.0)
        gaps = rewards.unsqueeze(2) - rewards.unsqueeze(1)  # (B, K, K): r_k - r_i
        gaps = gaps.masked_fill(~better, 0.0)
        if (gaps < 0).any():
            raise ValueError(
                "PRO's temperatures need rewards that fall with the rank: a completion has a reward "
                f"{-gaps.min().item():.6g} larger than one that ranks above it. Derive the ranks from the rewards."
            )
        logits = logits * gaps
        own = scores * gaps.amax(dim=2)
    logits = logits.masked_fill(~better, float("-inf"))
    denominator = torch.logsumexp(torch.cat([logits, own.unsqueeze(2)], dim=2), dim=2)  # (B, K)
    return ((denominator - own) * better.any(dim=2)).sum(dim=1)


def rrhf_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Return the ranking loss of RRHF (arXiv 2304.05302, section 3.1).

    The loss is `sum over pairs of max(0, p_worse - p_better)`, without a margin and without a mean over pairs. Pairs
    of equal rank do not count.

    Args:
        scores: Mean log-probabilities, `(B, K)`.
        ranks: Integer ranks, `(B, K)`.

    Returns:
        Loss per prompt, `(B,)`. It is 0, with a gradient of 0, for prompts with fewer than two different ranks.
    """
    scores, better, _ = _compare(scores, ranks)
    hinge = (scores.unsqueeze(1) - scores.unsqueeze(2)).clamp(min=0.0)  # (B, K, K): [b, k, i] is max(0, p_i - p_k)
    return (hinge * better).sum(dim=(1, 2))


LOSSES: dict[str, RankingLoss] = {
    "pro": RankingLoss(
        pro_loss,
        Paper(
            "PRO",
            "Preference Ranking Optimization for Human Alignment",
            "Song, Feifan and Yu, Bowen and Li, Minghao and Yu, Haiyang and Huang, Fei and Li, Yongbin and "
            "Wang, Houfeng",
            2023,
            "2306.17492",
        ),
    ),
    "rrhf": RankingLoss(
        lambda scores, ranks, rewards: rrhf_loss(scores, ranks),  # noqa: ARG005 - RRHF does not use rewards
        Paper(
            "RRHF",
            "RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
            "Yuan, Zheng and Yuan, Hongyi and Tan, Chuanqi and Wang, Wei and Huang, Songfang and Huang, Fei",
            2023,
            "2304.05302",
        ),
    ),
}
"""Ranking losses by the name that `loss_type` takes."""


def pair_margins(scores: Tensor, ranks: Tensor) -> Tensor:
    """Return by how much the policy scores the better completion above the worse, for every pair of different rank.

    Args:
        scores: Mean log-probabilities, `(B, K)`.
        ranks: Integer ranks, `(B, K)`.

    Returns:
        Margins `(P,)` of the batch's P pairs. The share above 0 is the policy's pairwise ranking accuracy.
    """
    margins = scores.unsqueeze(2) - scores.unsqueeze(1)  # (B, K, K): [b, k, i] is p_k - p_i
    return margins[ranks_above(ranks)]


def ranks_above(ranks: Tensor) -> Tensor:
    """Return which completions compete: `(B, K, K)`, true at `[b, k, i]` if completion k ranks strictly above i."""
    present = ranks != ABSENT  # (B, K)
    return (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & present.unsqueeze(2) & present.unsqueeze(1)


def _compare(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores in float32 or wider, `ranks_above`, and which completions are absent."""
    if scores.shape != ranks.shape or scores.dim() != 2:
        raise ValueError(f"Scores and ranks must both be (B, K), got {tuple(scores.shape)} and {tuple(ranks.shape)}.")
    absent = ranks == ABSENT  # (B, K)
    # An absent score can be anything, even NaN. Fill it before any arithmetic, or it poisons the gradient.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(absent, 0.0)
    return scores, ranks_above(ranks), absent
