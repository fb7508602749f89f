"""Compute log-probabilities of completions, with each prompt computed once and logits for their tokens alone."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .._compat import selective_log_softmax
from .output_head import LogitTransform, head_logps
from .text_rows import Groups, Places, Row, SharedRows, by_length, padded_inputs, padded_rows

_ADDED = "_cyclealign_scoring"
_PLAIN_ROWS = 64  # rows of logits that are reduced at a time
# Tokens of a forward pass, from which more of them at once are not faster.
_MIN_TOKENS_ON_CPU, _MIN_TOKENS_ELSEWHERE = 1024, 32768


@dataclass(frozen=True, slots=True)
class Scoring:
    """Way to score a model.

    Args:
        fused: Whether log-probabilities come from hidden states and the weight of the output head, so that the logits
            of all tokens never exist at once. Otherwise they come from the model's logits.
        shared: Rows in which the completions of a prompt share it. `None` means that every completion has a row of its
            own, with a copy of the prompt.
        several_passes: Whether a batch can take several forward passes, of texts of similar length. Several processes
            have to run the same number of them.
        reason: Why the model is not scored in a faster way.
    """

    fused: bool = False
    shared: SharedRows | None = None
    several_passes: bool = False
    reason: str = ""

    def __str__(self) -> str:
        layout = "each completion in a row of its own" if self.shared is None else "each prompt computed once"
        head = "fused output head" if self.fused else "plain output head"
        return f"{layout}, {head}" + (f" ({self.reason})" if self.reason else "")


PLAIN = Scoring()
"""The model's own forward pass on padded rows."""


@dataclass
class ScoredOutput(ModelOutput):
    """Output of a forward pass that returns log-probabilities `(M,)` instead of logits."""

    log_probs: Tensor | None = None


def add_scoring(model: PreTrainedModel) -> None:
    """Let a causal language model return log-probabilities of chosen tokens. Call this before PEFT wraps the model.

    Calling it again has no effect.
    """
    if hasattr(model, _ADDED):
        return
    setattr(model, _ADDED, True)
    original = vars(model).get("forward")  # accelerate replaces `forward` of a model with a device map

    # Bind the forward pass to whichever model it is called on, so that a deep copy computes with its own weights.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, scored: Sequence[Tensor] | None = None, **kwargs: Any) -> Any:
        if scored is None:
            return original(*args, **kwargs) if original is not None else type(self).forward(self, *args, **kwargs)
        rows, columns, targets = scored
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state  # (R, L, H)
        head = self.get_output_embeddings()
        # A device map can put the head on another device.
        hidden, rows, columns, targets = (tensor.to(head.weight.device) for tensor in (hidden, rows, columns, targets))
        length = hidden.shape[1]  # prompt tuning adds tokens on the left
        chosen = hidden.flatten(0, 1).index_select(0, rows * length + length + columns)  # (M, H)
        transform = LogitTransform.of(self.config)
        return ScoredOutput(log_probs=head_logps(chosen, head.weight, head.bias, targets, transform))

    model.forward = types.MethodType(forward, model)


def sequence_logps(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    device: torch.device,
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability and the length of each completion, at temperature 1.

    Equal texts are computed once, and so are equal prompts if the model's scoring allows it. Absent completions are
    not computed at all.

    Args:
        model: The policy, as wrapped for training. Every process of a run must make the same calls.
        prompt_ids: Token ids of N prompts, at least one token each.
        completion_ids: Token ids of N completions. An absent completion is an empty list, with a sum of 0.
        pad_token_id: Any valid id.
        device: Device of the model.
        scoring: How to score, from `choose_scoring`.

    Returns:
        Sums `(N,)` in float32 or wider, and lengths `(N,)` in tokens.
    """
    keys = [(tuple(prompt), tuple(completion)) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    distinct: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for prompt, completion in keys:
        if completion:
            distinct.setdefault(prompt, {})[completion] = None
    groups = {prompt: list(completions) for prompt, completions in distinct.items()} or {keys[0][0]: []}
    texts = [(prompt, completion) for prompt, completions in groups.items() for completion in completions]

    rows, scoring = _lay_out(groups, scoring)
    min_tokens = _MIN_TOKENS_ON_CPU if device.type == "cpu" else _MIN_TOKENS_ELSEWHERE
    passes = by_length(rows, min_tokens) if scoring.several_passes else [rows]
    sums: dict[int, Tensor] = {}
    for own in passes:
        inputs = (scoring.shared.inputs if scoring.shared else padded_inputs)(own, pad_token_id, device)
        token_logps = _token_logps(model, inputs, Places.of(own, device), scoring)  # (M,)
        lengths = [len(completion) for row in own for completion in row.completions]
        numbers = [text for row in own for text in row.texts]
        sums |= {text: part.sum() for text, part in zip(numbers, token_logps.split(lengths), strict=True)}
    # The last sum is 0, and part of the graph: every process needs a backward pass, even if its texts are absent.
    values = torch.stack([*(sums[text] for text in range(len(texts))), token_logps[:0].sum()])  # (U + 1,)
    places = {text: number for number, text in enumerate(texts)}
    indices = torch.tensor([places.get(key, len(texts)) for key in keys], device=values.device)  # (N,)
    return values[indices], torch.tensor([len(completion) for completion in completion_ids], device=device)


def _lay_out(groups: Groups, scoring: Scoring) -> tuple[list[Row], Scoring]:
    """Return the rows of a batch, and the scoring that applies to them."""
    if scoring.shared is not None and any(len(completions) > 1 for completions in groups.values()):
        longest = max(len(prompt) + max(map(len, completions)) for prompt, completions in groups.items())
        # Rows beyond the length that `choose_scoring` has compared could be computed differently.
        if scoring.shared.max_length is None or longest <= scoring.shared.max_length:
            return scoring.shared.rows(groups), scoring
    return padded_rows(groups), replace(scoring, shared=None)


def _token_logps(model: nn.Module, inputs: dict[str, Any], places: Places, scoring: Scoring) -> Tensor:
    """Return the log-probability of each token of the completions, `(M,)`."""
    logps: Tensor
    if scoring.fused:
        logps = model(**inputs, scored=(places.rows, places.columns, places.targets)).log_probs
        return logps
    logits = model(**inputs, use_cache=False).logits  # (R, L, V)
    chosen = logits[places.rows.to(logits.device), places.columns.to(logits.device)]  # (M, V)
    if not len(chosen):
        logps = logits.sum(dim=(1, 2))[:0]  # (0,), part of the graph
        return logps
    parts = zip(chosen.split(_PLAIN_ROWS), places.targets.to(logits.device).split(_PLAIN_ROWS), strict=True)
    return torch.cat([checkpoint(_reduce_logits, part, targets, use_reentrant=False) for part, targets in parts])


def _reduce_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probabilities of targets `(R,)` from their logits `(R, V)`."""
    logps: Tensor = selective_log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
    return logps
