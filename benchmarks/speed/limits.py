"""Count the floating-point operations that a work needs at least, and measure how many the device attains.

Only matrix products and attention count. A prompt counts once, whatever its number of completions, and the output head
counts for the tokens of completions alone. A multiplication and an addition are two operations.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from .measuring import clock
from .shapes import ModelShape


def training_flops(shape: ModelShape, prompt: int, completions: Sequence[int], lora: bool) -> float:
    """Return the operations of forward and backward for one prompt of `prompt` tokens and its completions.

    A backward pass needs the gradients of activations, and those of weights unless they are frozen. The operations of
    the LoRA layers themselves do not count.
    """
    tokens = sum(completions)
    products = 2 if lora else 3
    body = 2 * shape.body_weights * (prompt + tokens) * products
    head = 2 * shape.hidden * shape.vocabulary * tokens * products
    return body + head + 3 * _attention_flops(shape, prompt, completions)


def generation_flops(shape: ModelShape, prompt: int, completions: Sequence[int]) -> float:
    """Return the operations of sampling completions for one prompt, with a cache that they share for the prompt."""
    tokens = sum(completions)
    body = 2 * shape.body_weights * (prompt + tokens)
    return body + 2 * shape.hidden * shape.vocabulary * tokens + _attention_flops(shape, prompt, completions)


def _attention_flops(shape: ModelShape, prompt: int, completions: Sequence[int]) -> float:
    """Return the operations of causal attention in a forward pass: queries by keys, and weights by values."""
    pairs = prompt * (prompt + 1) / 2 + sum(length * prompt + length * (length + 1) / 2 for length in completions)
    return 4 * shape.layers * shape.heads * shape.head_dim * pairs


def attained_flops(device: str, size: int | None = None) -> float:
    """Return the operations per second of a large matrix product, the best of several: float32 on CPU, else bf16."""
    size = size or (1024 if device == "cpu" else 8192)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product, now = torch.empty_like(left), clock(device)
    best, end = float("inf"), time.monotonic() + 1.0
    while time.monotonic() < end:
        start = now()
        torch.mm(left, right, out=product)
        best = min(best, now() - start)
    return 2 * size**3 / best
