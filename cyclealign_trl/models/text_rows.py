"""Lay out prompts and their completions in rows for one forward pass.

`padded_rows` gives each text a row of its own, prompt included. `SharedRows` holds each prompt once, and after it its
completions, which the attention mask keeps apart. The positions of a completion continue those of the prompt in both
layouts, so a model that respects mask and positions computes the same hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .batches import pad

TokenIds = Sequence[int]
Groups = Mapping[tuple[int, ...], Sequence[TokenIds]]
"""Completions of each prompt."""

_PROMPT, _PADDING = -1, -2
_WINDOWED = "sliding_attention"


@dataclass(frozen=True, slots=True)
class TextRows:
    """R rows of L tokens with M tokens of completions in them.

    Args:
        inputs: Keyword arguments of the model's forward pass.
        rows: Row of the hidden state that predicts each token of a completion, `(M,)`.
        columns: Its column, counted from the right end, so from -L to -1, `(M,)`.
        targets: The tokens of the completions, completion by completion, `(M,)`.
    """

    inputs: dict[str, Any]
    rows: Tensor
    columns: Tensor
    targets: Tensor


@dataclass(slots=True)
class _Row:
    """A row under construction: a prompt and some of its completions."""

    prompt: TokenIds
    completions: list[TokenIds]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def positions(self) -> list[int]:
        """Positions of the tokens. Each completion continues the prompt."""
        start = len(self.prompt)
        return [*range(start), *(start + place for completion in self.completions for place in range(len(completion)))]

    @property
    def owners(self) -> list[int]:
        """Completion that each token belongs to, or `_PROMPT`."""
        own = (owner for owner, completion in enumerate(self.completions) for _ in completion)
        return [*[_PROMPT] * len(self.prompt), *own]


def padded_rows(groups: Groups, pad_token_id: int, device: torch.device) -> TextRows:
    """Give each text a row `prompt + completion`, padded on the right."""
    rows = [_Row(prompt, [completion]) for prompt, completions in groups.items() for completion in completions]
    # The policy of a process without completions still takes part in the forward pass.
    rows = rows or [_Row(next(iter(groups))[:1], [])]
    input_ids, attention_mask = pad(_tokens(rows), pad_token_id, device)  # both (R, L)
    return _text_rows({"input_ids": input_ids, "attention_mask": attention_mask}, rows)


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows `prompt + completion + completion + ...`, padded on the right, under a mask that keeps completions apart.

    A row ends where the attention between its completions, which the mask removes but the device computes, would cost
    more than another copy of the prompt.

    Args:
        hidden_size: Width of the model's hidden states.
        boolean_mask: Whether the attention implementation reads boolean masks. Others add a mask to the scores.
        mask_dtype: Type of a mask that is added.
        window: Number of tokens that a token sees in layers with a sliding window. `None` means no such layers.
        layer_types: Types of the model's layers, if they have different masks.
        max_length: Largest number of tokens in a row with several completions.
    """

    hidden_size: int
    boolean_mask: bool
    mask_dtype: torch.dtype
    window: int | None
    layer_types: frozenset[str]
    max_length: int | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> SharedRows:
        """Return the rows for a model's configuration. The caller has to compare their results with padded rows."""
        config = config.get_text_config()
        return cls(
            config.hidden_size,
            boolean_mask=config._attn_implementation == "sdpa",
            mask_dtype=config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32,
            window=getattr(config, "sliding_window", None),
            layer_types=frozenset(getattr(config, "layer_types", None) or ()),
        )

    def lay_out(self, groups: Groups, pad_token_id: int, device: torch.device) -> TextRows:
        """Fill rows with the completions of each prompt, in their order."""
        rows: list[_Row] = []
        for prompt, completions in groups.items():
            limit = self._efficient_length(len(prompt))
            row: _Row | None = None
            for completion in completions:
                if row is None or row.length + len(completion) > limit:
                    row = _Row(prompt, [])
                    rows.append(row)
                row.completions.append(completion)
        input_ids, _ = pad(_tokens(rows), pad_token_id, device)  # (R, L)
        position_ids, _ = pad([row.positions for row in rows], 0, device)  # (R, L)
        owners, _ = pad([row.owners for row in rows], _PADDING, device)  # (R, L)
        masks = self._masks(owners, position_ids)
        return _text_rows({"input_ids": input_ids, "position_ids": position_ids, "attention_mask": masks}, rows)

    def _efficient_length(self, prompt_length: int) -> int:
        """Return the length of a row at which a completion costs least.

        In a row of `p` tokens of the prompt and `c` of completions, a token costs about `24 h^2` operations per layer
        in products with weights, and a pair of tokens `4 h` in attention. The cost per token of a completion,
        `(p + c + (p + c)^2 / 6h) / c`, has its minimum at `c = sqrt(p (p + 6h))`.
        """
        length = prompt_length + math.isqrt(prompt_length * (prompt_length + 6 * self.hidden_size))
        return length if self.max_length is None else min(length, self.max_length)

    def _masks(self, owners: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the mask `(R, 1, L, L)`, or one per type of layer. A token sees the prompt and its own completion."""
        seen = (owners.unsqueeze(1) == _PROMPT) | (owners.unsqueeze(1) == owners.unsqueeze(2))  # (R, L, L)
        seen = seen.tril()
        if not self.window or (self.layer_types and _WINDOWED not in self.layer_types):
            return self._formatted(seen)
        windowed = self._formatted(seen & (positions.unsqueeze(2) - positions.unsqueeze(1) < self.window))
        if self.layer_types <= {_WINDOWED}:
            return windowed
        return {name: windowed if name == _WINDOWED else self._formatted(seen) for name in self.layer_types}

    def _formatted(self, seen: Tensor) -> Tensor:
        seen = seen.unsqueeze(1)  # (R, 1, L, L)
        if self.boolean_mask:
            return seen
        added = torch.zeros(seen.shape, dtype=self.mask_dtype, device=seen.device)
        return added.masked_fill(~seen, torch.finfo(self.mask_dtype).min)


def _tokens(rows: Sequence[_Row]) -> list[list[int]]:
    return [[*row.prompt, *(token for completion in row.completions for token in completion)] for row in rows]


def _text_rows(inputs: dict[str, Any], rows: Sequence[_Row]) -> TextRows:
    """Add the places of the completions' tokens to the inputs."""
    device, width = inputs["input_ids"].device, inputs["input_ids"].shape[1]
    row_numbers: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(rows):
        start = len(row.prompt)
        for completion in row.completions:
            # The last token of the prompt predicts the first one of every completion.
            columns += [len(row.prompt) - 1 - width, *range(start - width, start + len(completion) - 1 - width)]
            row_numbers += [number] * len(completion)
            targets += completion
            start += len(completion)
    places = torch.tensor([row_numbers, columns, targets], dtype=torch.long, device=device)  # (3, M)
    return TextRows(inputs, *places)
