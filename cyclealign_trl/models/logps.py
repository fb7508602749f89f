"""Compute log-probabilities of completions without storing the logits of a whole batch.

Each row is `prompt + completion`, padded on the right. Lengths, not token ids, determine the positions that count. The
output head runs tile by tile in forward and backward (TRL's fused head). If the head cannot be fused, logits are
reduced row by row and recomputed in backward.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .._compat import add_fused_lm_head, selective_log_softmax
from .batches import pad

logger = logging.getLogger(__name__)

IGNORED = -100
_FUSED = "_cyclealign_fused_lm_head"
_PLAIN_HEAD = (
    "The fused output head does not compute the log-probabilities of %s (%s). They are computed from full logits "
    "instead, which takes more memory."
)


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


def fused_head_is_exact(model: nn.Module, causal_lm: PreTrainedModel | None = None) -> bool:
    """Return whether the fused head gives the log-probabilities of the model's plain forward pass.

    The fused head multiplies hidden states by the weight of the output head. It cannot be used if the head has an
    adapter, or if the architecture transforms hidden states or logits in a way that the fused head does not know. No
    list of architectures decides on this: two short texts are scored both ways. They are also scored with a larger
    head, because a cap on logits has no effect on the small logits of a new model.

    This is the one place that decides how a model is scored.

    Args:
        model: A model after `fuse_lm_head`, with its adapter, or the same model as wrapped by FSDP. If the model is
            sharded, every process must call this at the same time. Under ZeRO-3, the weights are gathered for it.
        causal_lm: The model without wrappers and adapter. Defaults to `model`.
    """
    causal_lm = cast("PreTrainedModel", model) if causal_lm is None else causal_lm
    head = causal_lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    first, second = _sample_ids(causal_lm)
    texts = [first[:3], second[:2]], [first[3:], second[2:]]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), gathered(causal_lm):
            settings: Any = {"pad_token_id": first[0], "device": head.weight.device}
            tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2
            for scale in (1.0, 32.0):
                with _scaled_head(head, scale):
                    plain, _ = sequence_logps(model, *texts, **settings, fused=False)
                    fused, _ = sequence_logps(model, *texts, **settings, fused=True)
                if not torch.allclose(fused, plain, rtol=tolerance, atol=tolerance):
                    difference = (fused - plain).abs().max().item()
                    logger.warning(_PLAIN_HEAD, type(causal_lm).__name__, f"a difference of {difference:.3g} nats")
                    return False
    except Exception as error:  # an architecture whose outputs the fused head cannot read
        logger.warning(_PLAIN_HEAD, type(causal_lm).__name__, f"{type(error).__name__}: {error}")
        return False
    finally:
        model.train(was_training)
    return True


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather the weights of a model that ZeRO-3 has sharded on every process."""
    parameters = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def _sample_ids(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    vocabulary = model.config.get_text_config().vocab_size
    ids = [3 + 7 * index for index in range(13)]
    return [index % vocabulary for index in ids[:7]], [index % vocabulary for index in ids[7:]]


@contextmanager
def _scaled_head(head: nn.Linear, scale: float) -> Iterator[None]:
    """Multiply the weight of the output head by a power of 2, which can be undone exactly."""
    with torch.no_grad():
        head.weight.mul_(scale)
        try:
            yield
        finally:
            head.weight.mul_(1 / scale)


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
        fused: Whether to use the fused head, which needs `fuse_lm_head` and `fused_head_is_exact`.

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
