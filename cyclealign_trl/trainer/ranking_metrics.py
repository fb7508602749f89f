"""How the policy's own order compares with the ranks that it is trained on."""

from __future__ import annotations

from torch import Tensor

from ..losses import ranks_above


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
