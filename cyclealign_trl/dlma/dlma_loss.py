"""The loss of DLMA."""

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
    """Direct Large Model Alignment (DLMA, arXiv 2402.11907): DPO whose margin is the clipped self-reward.

    `-log sigmoid(beta * (h - margin_weight * clip(R)))` with the implicit reward gap `h`, the chosen completion's
    log-ratio to the reference less that of the rejected one. A pair with a large self-reward must be told apart
    further; a negative one lowers the bar. A `margin_weight` of 0 is DPO.

    Args:
        policy_chosen_logps: Summed log-probabilities under the policy, `(B,)`.
        policy_rejected_logps: Likewise, `(B,)`.
        ref_chosen_logps: Summed log-probabilities under the reference, `(B,)`.
        ref_rejected_logps: Likewise, `(B,)`.
        self_rewards: The pairs' self-rewards R in nats, `(B,)`.
        beta: How strongly the policy is held to the reference: the smaller, the less.
        margin_weight: Weight of the self-reward inside the margin. The paper's form has `beta * margin_weight`.
        margin_clip: Range that self-rewards are clipped to, in nats.

    Returns:
        Loss per pair, `(B,)`.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, self_rewards)
    chosen, rejected, ref_chosen, ref_rejected, rewards = (
        values.to(torch.promote_types(values.dtype, torch.float32)) for values in logps
    )
    gaps = (chosen - ref_chosen) - (rejected - ref_rejected)  # (B,)
    return -logsigmoid(beta * (gaps - margin_weight * rewards.clamp(*margin_clip)))
