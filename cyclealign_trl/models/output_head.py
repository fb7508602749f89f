"""Log-probabilities of chosen tokens from hidden states, without the logits of all of them at once.

Only the rows that predict a token of a completion reach the output head. Their logits exist one tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from .._compat import ChunkedLogProbFunction, maybe_gather_lm_head_ctx

_ROWS, _COLUMNS = 512, 1024
"""Size of a tile of logits, which stays in a processor's cache."""
_KERNEL_COLUMNS = 32768
"""Columns of a tile of TRL's kernel."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """Change of an output head's products to logits: `cap * tanh(scale * z / cap)`, without a cap `scale * z`.

    Args:
        scale: Factor of the products.
        cap: Bound of the logits. `None` means no bound.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LogitTransform:
        """Return the transform that a model's configuration names.

        Architectures have different names for it, and some apply it without one. The caller has to compare the
        log-probabilities with those of the model's own forward pass.
        """
        config = config.get_text_config()
        values = vars(config)
        scales = [values.get(name) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
        if (divisor := values.get("logits_scaling")) is not None:
            scales.append(divisor if config.model_type == "hyperclovax" else 1 / divisor)
        caps = [values.get(name) for name in ("final_logit_softcapping", "logits_soft_cap")]
        return cls(
            next((float(scale) for scale in scales if scale is not None), 1.0),
            next((float(cap) for cap in caps if cap is not None), None),
        )

    def logits(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Turn products with the head's weight into logits, in place."""
        if bias is not None:
            products.add_(bias)
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.cap is not None:
            products.div_(self.cap).tanh_().mul_(self.cap)
        return products

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of the logits by the products, without `scale`."""
        return 1.0 if self.cap is None else 1 - (logits / self.cap) ** 2


def head_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
) -> Tensor:
    """Return the log-probability of one token per row.

    Args:
        hidden: Hidden states, `(N, H)`.
        weight: Weight of the output head, `(V, H)`. Its gradient costs nothing if it is frozen.
        bias: Bias of the output head, `(V,)`.
        targets: Token ids, `(N,)`.
        transform: Change of the products to logits.

    Returns:
        Log-probabilities `(N,)`, in float32 or wider.
    """
    # FSDP 2 shards the head. Gather it once, not for each chunk.
    weight, bias = _whole(weight), None if bias is None else _whole(bias)
    if hidden.device.type != "cpu":
        kernel_arguments: Any = (1.0, _KERNEL_COLUMNS, transform.cap, transform.scale, ("log_probs",))
        with maybe_gather_lm_head_ctx(weight, bias):
            logps: Tensor = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *kernel_arguments)[0]
        return logps
    with torch.autocast("cpu", enabled=False):
        result: Tensor = _HeadLogps.apply(hidden, weight, bias, targets, transform)
    return result


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class _HeadLogps(torch.autograd.Function):
    """Log-probabilities of tokens, with four products of the head's size in all, or two if the head is frozen.

    With `p` the softmax of a row's logits, the gradient of `log p[target]` is `onehot(target) - p`. The backward pass
    computes each tile of `p` again. If the head is frozen, the loss enters a row as a single factor, so the forward
    pass computes the gradient of the hidden state for a factor of 1. It needs the mean of the head's rows under `p`,
    which is attention with the hidden state as the query, accumulated tile by tile with a running maximum.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_units = needs_hidden and not (needs_weight or needs_bias)
        own = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # (N, H)
        log_totals, units = own.new_empty(len(own), 1), torch.empty_like(own) if needs_units else None
        with maybe_gather_lm_head_ctx(weight, bias):
            target_weight = weight[targets].to(own.dtype)  # (N, H)
            target_bias = None if bias is None else bias[targets].unsqueeze(1)
            target_logits = transform.logits((own * target_weight).sum(1, keepdim=True), target_bias)  # (N, 1)
            for rows in _slices(len(own), _ROWS):
                maxima, totals = own.new_full((len(own[rows]), 1), float("-inf")), own.new_zeros(len(own[rows]), 1)
                means = torch.zeros_like(own[rows])
                for columns in _slices(len(weight), _COLUMNS):
                    tile_weight = weight[columns].to(own.dtype)  # (C, H)
                    logits = transform.logits(own[rows] @ tile_weight.t(), None if bias is None else bias[columns])
                    slope = transform.slope(logits) if needs_units else 1.0
                    larger = torch.maximum(maxima, logits.amax(1, keepdim=True))
                    shrink, maxima = (maxima - larger).exp_(), larger
                    mass = logits.sub_(maxima).exp_()  # (R, C)
                    totals.mul_(shrink).add_(mass.sum(1, keepdim=True))
                    if needs_units:
                        means.mul_(shrink).addmm_(mass.mul_(slope) if transform.cap else mass, tile_weight)
                log_totals[rows] = maxima + totals.log()
                if units is not None:
                    units[rows] = target_weight[rows] * transform.slope(target_logits[rows]) - means / totals
        ctx.transform, ctx.weight, ctx.bias = transform, weight, bias  # ZeRO-3 gathers weights in place
        if units is None:
            ctx.save_for_backward(hidden, targets, log_totals, target_logits)
        else:
            ctx.save_for_backward(units)
        return (target_logits - log_totals).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        transform, weight, bias = ctx.transform, ctx.weight, ctx.bias
        grad = grads[0].unsqueeze(1) * transform.scale  # (N, 1)
        if len(ctx.saved_tensors) == 1:
            return ctx.saved_tensors[0] * grad, None, None, None, None
        hidden, targets, log_totals, target_logits = ctx.saved_tensors
        own = hidden.to(grad.dtype)
        scaled = own * grad  # (N, H)
        means = torch.zeros_like(own)  # (N, H)
        with maybe_gather_lm_head_ctx(weight, bias):
            # Zeros cost a pass over the memory of the whole head. The first rows of each tile overwrite it instead.
            grad_weight = (torch.empty_like if len(own) else torch.zeros_like)(weight, dtype=grad.dtype)
            grad_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
            for columns in _slices(len(weight), _COLUMNS):
                tile_weight = weight[columns].to(grad.dtype)  # (C, H)
                for rows in _slices(len(own), _ROWS):
                    logits = transform.logits(own[rows] @ tile_weight.t(), None if bias is None else bias[columns])
                    slope = transform.slope(logits)
                    mass = logits.sub_(log_totals[rows]).exp_()  # (R, C)
                    mass = mass.mul_(slope) if transform.cap else mass
                    means[rows].addmm_(mass, tile_weight)
                    grad_weight[columns].addmm_(mass.t(), scaled[rows], alpha=-1, beta=min(rows.start, 1))
                    if grad_bias is not None:
                        grad_bias[columns].addmv_(mass.t(), grad[rows].squeeze(1), alpha=-1)
            slope = transform.slope(target_logits)
            grad_hidden = (weight[targets].to(grad.dtype) * slope - means) * grad
        grad_weight.index_add_(0, targets, scaled * slope)
        if grad_bias is not None:
            grad_bias.index_add_(0, targets, (grad * slope).squeeze(1))
        return grad_hidden, grad_weight, grad_bias, None, None


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
