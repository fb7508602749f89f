"""The DLMA loss as a pure function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dlma_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    self_rewards: Tensor,
    beta: float = 0.1,
    margin_weight: float = 0.2,
    margin_clip: tuple[float, float] = (-40.0, 40.0),
) -> Tensor:
    """Compute the loss of Direct Large Model Alignment (DLMA, arXiv 2402.11907): DPO with self-rewards as margins.

    The loss is `-log sigmoid(beta * (h - margin_weight * clip(R)))`. `h` is the implicit reward gap: the log-ratio of
    policy to reference of the chosen completion, minus the log-ratio of the rejected one. The larger the self-reward
    `R`, the larger the gap that the loss asks for. With a `margin_weight` of 0, the loss is DPO.

    Args:
        policy_chosen_logps: Summed log-probabilities of the chosen completions under the policy, `(B,)`.
        policy_rejected_logps: Summed log-probabilities of the rejected completions under the policy, `(B,)`.
        ref_chosen_logps: Summed log-probabilities of the chosen completions under the reference, `(B,)`.
        ref_rejected_logps: Summed log-probabilities of the rejected completions under the reference, `(B,)`.
        self_rewards: Self-rewards R of the pairs in nats, `(B,)`.
        beta: Strength of the pull towards the reference model.
        margin_weight: Weight of the self-reward in the margin. The paper's weight is `beta * margin_weight`.
        margin_clip: Range to clip self-rewards to, in nats.

    Returns:
        Loss per pair, `(B,)`.
    """
    inputs = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, self_rewards)
    chosen, rejected, ref_chosen, ref_rejected, rewards = (
        values.to(torch.promote_types(values.dtype, torch.float32)) for values in inputs
    )
    gaps = (chosen - ref_chosen) - (rejected - ref_rejected)  # (B,)
    return -logsigmoid(beta * (gaps - margin_weight * rewards.clamp(*margin_clip)))
