"""Ranking losses as pure functions of tensors.

Shapes: B prompts, K completions each. A completion's `score` is the policy's mean log-probability per token, its
`rank` 0 = best, equal ranks tie, -1 = absent. Sums run in float32 at least: bfloat16 scores give float32 losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import ABSENT


def ranks_above(ranks: Tensor) -> Tensor:
    """Which completions compete: a boolean `(B, K, K)`, `[b, k, i]` where completion k ranks strictly above i.

    Args:
        ranks: Integer ranks, `(B, K)`.
    """
    present = ranks != ABSENT  # (B, K)
    return (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & present.unsqueeze(2) & present.unsqueeze(1)


def pro_loss(scores: Tensor, ranks: Tensor, rewards: Tensor | None = None) -> Tensor:
    """Preference Ranking Optimization (PRO, arXiv 2306.17492): each completion against all that rank below it.

    For completions in order of merit, `-sum_k log(exp(p_k) / sum_{i >= k} exp(p_i))`. With rewards, every
    comparison has a temperature: `p_i` is multiplied by the reward gap `r_k - r_i`, and `p_k` itself by the largest
    gap. Completions of equal rank never compete. Computed through log-sum-exp: exact, and finite at any length.

    Args:
        scores: Mean log-probabilities, `(B, K)`.
        ranks: Integer ranks, `(B, K)`.
        rewards: Rewards that produced the ranks, `(B, K)`, for PRO's temperatures. Must not grow with the rank.

    Returns:
        Loss per prompt, `(B,)`: 0 with a gradient of 0 where fewer than two ranks are present.

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
                f"{-gaps.min().item():.6g} larger than one that ranks above it. Derive ranks from the rewards."
            )
        logits = logits * gaps
        own = scores * gaps.amax(dim=2)
    logits = logits.masked_fill(~better, float("-inf"))
    denominator = torch.logsumexp(torch.cat([logits, own.unsqueeze(2)], dim=2), dim=2)  # (B, K)
    return ((denominator - own) * better.any(dim=2)).sum(dim=1)


def rrhf_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Rank Responses to align Human Feedback (RRHF, arXiv 2304.05302), section 3.1.

    `sum over pairs of max(0, p_worse - p_better)`: no margin, no mean over pairs. Pairs of equal rank do not count.

    Args:
        scores: Mean log-probabilities, `(B, K)`.
        ranks: Integer ranks, `(B, K)`.

    Returns:
        Loss per prompt, `(B,)`: 0 with a gradient of 0 where fewer than two ranks are present.
    """
    scores, better, _ = _compare(scores, ranks)
    hinge = (scores.unsqueeze(1) - scores.unsqueeze(2)).clamp(min=0.0)  # (B, K, K): [b, k, i] is max(0, p_i - p_k)
    return (hinge * better).sum(dim=(1, 2))


def _compare(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in float32 or wider, `ranks_above`, and what is absent."""
    if scores.shape != ranks.shape or scores.dim() != 2:
        raise ValueError(f"Scores and ranks must both be (B, K); got {tuple(scores.shape)} and {tuple(ranks.shape)}.")
    absent = ranks == ABSENT  # (B, K)
    # A hole may hold anything, even NaN: fill it before any arithmetic, or it would poison the gradient.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(absent, 0.0)
    return scores, ranks_above(ranks), absent


def pair_margins(scores: Tensor, ranks: Tensor) -> Tensor:
    """Score of the better completion less that of the worse, for every pair of different rank.

    Args:
        scores: The policy's mean log-probabilities, `(B, K)`.
        ranks: Integer ranks, `(B, K)`: 0 = best, equal ranks tie, -1 = absent.

    Returns:
        Margins `(P,)` of the batch's P pairs. The share above 0 is the policy's pairwise ranking accuracy.
    """
    margins = scores.unsqueeze(2) - scores.unsqueeze(1)  # (B, K, K): [b, k, i] is p_k - p_i
    return margins[ranks_above(ranks)]
