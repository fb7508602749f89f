"""Lay out prompts and their completions in rows of forward passes.

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
"""Completions of each prompt. Texts are numbered in this order."""

_PROMPT, _PADDING = -1, -2
_WINDOWED = "sliding_attention"


@dataclass(slots=True)
class Row:
    """A prompt and some of its completions.

    Args:
        prompt: Token ids of the prompt.
        completions: Token ids of the completions.
        texts: Numbers of the texts that they belong to.
    """

    prompt: TokenIds
    completions: list[TokenIds]
    texts: list[int]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def tokens(self) -> list[int]:
        """Token ids of the row."""
        return [*self.prompt, *(token for completion in self.completions for token in completion)]

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


@dataclass(frozen=True, slots=True)
class Places:
    """Positions at which M tokens of completions are predicted in R rows of L tokens.

    Args:
        rows: Row of the hidden state that predicts each token, `(M,)`.
        columns: Its column, counted from the right end, so from -L to -1, `(M,)`.
        targets: The tokens, completion by completion, `(M,)`.
    """

    rows: Tensor
    columns: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Places:
        """Find the places in rows that are padded on the right."""
        width = max(row.length for row in rows)
        numbers: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        for number, row in enumerate(rows):
            start = len(row.prompt)
            for completion in row.completions:
                # The last token of the prompt predicts the first one of every completion.
                columns += [len(row.prompt) - 1 - width, *range(start - width, start + len(completion) - 1 - width)]
                numbers += [number] * len(completion)
                targets += completion
                start += len(completion)
        return cls(*torch.tensor([numbers, columns, targets], dtype=torch.long, device=device))


def padded_rows(groups: Groups) -> list[Row]:
    """Give each text a row `prompt + completion`."""
    texts = [(prompt, completion) for prompt, completions in groups.items() for completion in completions]
    rows = [Row(prompt, [completion], [number]) for number, (prompt, completion) in enumerate(texts)]
    # A process without completions still takes part in the forward pass.
    return rows or [Row(next(iter(groups))[:1], [], [])]


def padded_inputs(rows: Sequence[Row], pad_token_id: int, device: torch.device) -> dict[str, Any]:
    """Return the model's inputs for rows with one completion each."""
    input_ids, attention_mask = pad([row.tokens for row in rows], pad_token_id, device)  # both (R, L)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows `prompt + completion + completion + ...`, under a mask that keeps the completions apart.

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

    def rows(self, groups: Groups) -> list[Row]:
        """Fill rows with the completions of each prompt, in their order."""
        rows: list[Row] = []
        text = 0
        for prompt, completions in groups.items():
            limit = self.efficient_length(len(prompt))
            row: Row | None = None
            for completion in completions:
                if row is None or row.length + len(completion) > limit:
                    row = Row(prompt, [], [])
                    rows.append(row)
                row.completions.append(completion)
                row.texts.append(text)
                text += 1
        return rows

    def efficient_length(self, prompt_length: int) -> int:
        """Return the length of a row at which a completion costs least.

        In a row of `p` tokens of the prompt and `c` of completions, a token costs about `24 h^2` operations per layer
        in products with weights, and a pair of tokens `4 h` in attention. The cost per token of a completion,
        `(p + c + (p + c)^2 / 6h) / c`, has its minimum at `c = sqrt(p (p + 6h))`.
        """
        length = prompt_length + math.isqrt(prompt_length * (prompt_length + 6 * self.hidden_size))
        return length if self.max_length is None else min(length, self.max_length)

    def inputs(self, rows: Sequence[Row], pad_token_id: int, device: torch.device) -> dict[str, Any]:
        """Return the model's inputs for rows."""
        input_ids, _ = pad([row.tokens for row in rows], pad_token_id, device)  # (R, L)
        position_ids, _ = pad([row.positions for row in rows], 0, device)  # (R, L)
        owners, _ = pad([row.owners for row in rows], _PADDING, device)  # (R, L)
        masks = self._masks(owners, position_ids)
        return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": masks}

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


def by_length(rows: Sequence[Row], min_tokens: int) -> list[list[Row]]:
    """Divide rows into forward passes of similar length, which need less padding.

    Args:
        rows: The rows.
        min_tokens: Number of tokens, padding included, from which a forward pass takes no further row.
    """
    passes: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        if not passes or len(passes[-1]) * passes[-1][0].length >= min_tokens:
            passes.append([])
        passes[-1].append(row)
    return passes
