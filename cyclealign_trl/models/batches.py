"""Group rows of token ids into batches, and pad them to tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor


def longest_first(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices, rows of similar length together.

    The longest rows come first, so that a batch size that is too large runs out of memory in the first batch.

    Args:
        lengths: Number of tokens of each row.
        batch_size: Largest number of rows per batch.

    Example:
        >>> list(longest_first([3, 9, 5], batch_size=2))
        [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask of N rows of different lengths, both `(N, L)`.

    The mask follows from the lengths, because the pad token is often an end-of-sequence token too.

    Args:
        rows: Token ids of N rows.
        pad_token_id: Id to pad with.
        device: Device of the tensors.
        side: Side to pad: `"left"` for generation, `"right"` for scoring.
    """
    width = max(map(len, rows))
    left = side == "left"
    ids = [[*[pad_token_id] * ((width - len(row)) * left), *row, *[pad_token_id] * ((width - len(row)) * (not left))]
           for row in rows]  # fmt: skip
    lengths = torch.tensor([len(row) for row in rows], device=device).unsqueeze(1)  # (N, 1)
    positions = torch.arange(width, device=device)  # (L,)
    mask = positions >= width - lengths if left else positions < lengths
    return torch.tensor(ids, device=device), mask.long()
