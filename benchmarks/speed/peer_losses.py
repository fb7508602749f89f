"""Compute ranking losses as other projects do, written from the papers and the documented methods.

Each function takes a model and a `Group` and returns a scalar loss. They differ in how they get the log-probabilities
of the responses, and `rrhf_2023` also in the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from benchmarks.peer_adapter import SFT_WEIGHT

from .shapes import Group

Loss = Callable[[Any, Group], Tensor]


def pro_2023(model: Any, group: Group) -> Tensor:
    """Return PRO + SFT as trained in 2023: all responses padded as one batch, then one forward pass for each.

    Each pass takes the log-softmax of all logits of its row.
    """
    ids, attention_mask, is_response = group.padded()
    sums = [
        _gathered_sums(model, ids[row, None], attention_mask[row, None], is_response[row, None])
        for row in range(group.n)
    ]
    return _pro_objective(torch.cat(sums), group)


def rrhf_2023(model: Any, group: Group) -> Tensor:
    """Return RRHF as trained in 2023: one padded batch, and the log-softmax of all its logits."""
    return _rrhf_objective(_gathered_sums(model, *group.padded()), group)


def trl_padded(model: Any, group: Group) -> Tensor:
    """Return PRO + SFT from a padded batch, `logits_to_keep` and `selective_log_softmax`, as trainers of TRL do."""
    from cyclealign_trl._compat import selective_log_softmax  # not above: Unsloth must be imported before TRL

    ids, attention_mask, is_response = group.padded()
    longest = ids.shape[1] - len(group.prompt)
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=longest + 1).logits
    token_logps = selective_log_softmax(logits[:, :-1], ids[:, -longest:])  # (K, C)
    return _pro_objective((token_logps * is_response[:, -longest:]).sum(dim=1), group)


PEER_LOSSES: dict[str, Loss] = {"PRO 2023": pro_2023, "RRHF 2023": rrhf_2023, "TRL, padded rows": trl_padded}


def _gathered_sums(model: Any, ids: Tensor, attention_mask: Tensor, is_response: Tensor) -> Tensor:
    """Return the summed log-probability of each response `(R,)` from the log-softmax of all logits `(R, L, V)`."""
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    logps = log_softmax(logits[:, :-1], dim=-1)  # (R, L-1, V)
    token_logps = logps.gather(2, ids[:, 1:, None]).squeeze(2)  # (R, L-1)
    return token_logps.masked_fill(~is_response[:, 1:], 0.0).sum(dim=1)


def _pro_objective(sums: Tensor, group: Group) -> Tensor:
    """Return equation 7 of PRO (arXiv 2306.17492): each response against all worse ones, plus SFT on the best."""
    scores, rewards = sums / group.lengths, group.rewards.to(sums)
    loss = sums.new_zeros(())
    for k in range(group.n - 1):
        temperatures = rewards[k] - rewards[k + 1 :]
        own = scores[k] * temperatures.max()
        loss = loss - own + torch.cat([own[None], scores[k + 1 :] * temperatures]).logsumexp(dim=0)
    return loss - SFT_WEIGHT * (group.n - 1) ** 2 * sums[0]


def _rrhf_objective(sums: Tensor, group: Group) -> Tensor:
    """Return equations 2 and 3 of RRHF (arXiv 2304.05302): a hinge for each pair in the wrong order, plus SFT."""
    scores = sums / group.lengths
    loss = -sums[0]
    for better in range(group.n):
        for worse in range(better + 1, group.n):
            loss = loss + (scores[worse] - scores[better]).clamp(min=0)
    return loss
