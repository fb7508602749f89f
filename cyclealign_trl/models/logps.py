"""Compute log-probabilities of completions without storing the logits of a whole batch.

Each row is `prompt + completion`, padded on the right. Lengths, not token ids, determine the positions that count. The
output head runs tile by tile in forward and backward (TRL's fused head). If the head cannot be fused, logits are
reduced row by row and recomputed in backward.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .._compat import add_fused_lm_head, selective_log_softmax
from .batches import pad

IGNORED = -100
_FUSED = "_cyclealign_fused_lm_head"


def fuse_lm_head(model: PreTrainedModel) -> None:
    """Prepare a causal language model for `sequence_logps`. Call this before PEFT wraps the model.

    Calling it again has no effect.
    """
    if hasattr(model, _FUSED):
        return
    hooked = "forward" in vars(model)  # accelerate replaces `forward` of a model with a device map
    add_fused_lm_head(model)
    setattr(model, _FUSED, True)
    if hooked:
        return
    fused_forward = model.forward.__func__

    # TRL binds its forward to the original model, so a deep copy would compute with the original's weights. Bind ours
    # to whichever model it is called on.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head:
            return fused_forward(self, *args, fused_lm_head=True, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def has_plain_lm_head(model: nn.Module) -> bool:
    """Return whether the output head is a plain linear layer. The fused head would ignore an adapter on it."""
    return type(model.get_output_embeddings()) is nn.Linear  # type: ignore[operator]


def sequence_logps(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    device: torch.device,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability and the length of each completion, at temperature 1.

    Args:
        model: The policy, as wrapped for training. Every process of a run must make the same calls.
        prompt_ids: Token ids of N prompts, at least one token each.
        completion_ids: Token ids of N completions. An absent completion is an empty list, with a sum of 0.
        pad_token_id: Any valid id.
        device: Device of the model.
        fused: Whether to use the fused head, which needs `fuse_lm_head` and `has_plain_lm_head`.

    Returns:
        Sums `(N,)` in float32, and lengths `(N,)` in tokens.
    """
    # One token of the prompt is enough for an absent completion.
    contexts = [prompt if completion else prompt[:1]
                for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]  # fmt: skip
    rows = [[*context, *completion] for context, completion in zip(contexts, completion_ids, strict=True)]
    input_ids, attention_mask = pad(rows, pad_token_id, device)  # both (N, L)
    targets = [[*[IGNORED] * len(context), *completion]
               for context, completion in zip(contexts, completion_ids, strict=True)]  # fmt: skip
    label_ids, _ = pad(targets, IGNORED, device)  # (N, L)

    if fused:
        output = model(input_ids=input_ids, attention_mask=attention_mask, labels=label_ids, fused_lm_head=True)
        token_logps = output.log_probs  # (N, L-1), 0 outside completions
    else:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        token_logps = _reduce_logits(logits[:, :-1], label_ids[:, 1:])
    completion_lengths = torch.tensor([len(completion) for completion in completion_ids], device=device)
    return token_logps.float().sum(dim=1), completion_lengths


def _reduce_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log-probabilities of labels `(N, L)` from logits `(N, L, V)`, and 0 for ignored labels.

    Working row by row avoids a second tensor of the logits' size.
    """

    def row_logps(row_logits: Tensor, row_labels: Tensor) -> Tensor:
        picked: Tensor = selective_log_softmax(row_logits.float(), row_labels.clamp(min=0))
        return picked.masked_fill(row_labels == IGNORED, 0.0)

    rows = zip(logits.split(1), labels.split(1), strict=True)
    return torch.cat([checkpoint(row_logps, row, targets, use_reentrant=False) for row, targets in rows])
