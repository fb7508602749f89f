"""Decode several completions per prompt: each prompt is prefilled once, and rows that have ended leave the batch.

`model.generate` prepares logits processors, stopping criteria and the cache, and then calls `decode` instead of its
own loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode

from .batches import pad

_RUNNING = 0.75
"""Share of running rows from which the others leave the batch. The cache is copied each time."""

Draw = Callable[[Tensor], Tensor]
"""Returns one token per row `(R,)` from the scores of the next token `(R, V)`."""


def sample_tokens(scores: Tensor) -> Tensor:
    """Draw one token per row from the softmax of its scores, by the inverse of the distribution function.

    This takes one random number per row, while `torch.multinomial` takes one per entry of the vocabulary.

    Args:
        scores: Logits `(R, V)`, -inf for excluded tokens.

    Returns:
        Token ids `(R,)`.
    """
    mass = scores.softmax(dim=-1).cumsum(dim=-1)  # (R, V)
    total = mass[:, -1:]
    points = torch.rand(total.shape, dtype=total.dtype, device=total.device) * total
    # Rounded up to the total, a point would select the last token even if it is excluded.
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, points, right=True).squeeze(1)


def most_likely_tokens(scores: Tensor) -> Tensor:
    """Return the token with the largest score of each row, `(R,)`."""
    return scores.argmax(dim=-1)


def can_decode(model: PreTrainedModel, config: GenerationConfig) -> bool:
    """Return whether `decode` implements what a configuration asks for, and computes what a model's forward pass does.

    Architectures whose cache holds more than keys and values, such as a recurrent state, cannot repeat it. The first
    call for a model compares logits after a few given tokens with those of a forward pass without a cache.
    """
    supported = (
        config.get_generation_mode() in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)
        and config.use_cache is not False
        and config.cache_implementation in (None, "dynamic")
        and not config.return_dict_in_generate
        and not config.token_healing
        and config.prefill_chunk_size is None
        and config.guidance_scale in (None, 1)  # scores a second batch, with a cache of its own
    )
    if supported and model not in _EXACT:
        _EXACT[model] = _is_exact(model)
    return supported and _EXACT[model]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    draw: Draw | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Sample K completions for each of B prompts, as `custom_generate` of `model.generate`.

    Args:
        model: The model.
        input_ids: Prompts, padded on the left, each K times in a row, `(B * K, W)`.
        logits_processor: Processors of the scores.
        stopping_criteria: Criteria that end a row.
        generation_config: Configuration with K as `num_return_sequences`, and a pad token.
        synced_gpus: Whether every process has to run the same number of forward passes.
        draw: How to draw tokens. Defaults to sampling, or without `do_sample` to the most likely tokens.
        **model_kwargs: Further inputs of the model, among them an empty cache.

    Returns:
        Prompts and completions, padded on the right, `(B * K, W + T)`.
    """
    draw = draw or (sample_tokens if generation_config.do_sample else most_likely_tokens)
    repeats = generation_config.num_return_sequences or 1
    prompt_length, pad_token_id = input_ids.shape[1], generation_config.pad_token_id
    sequences = input_ids.new_full((len(input_ids), stopping_criteria.max_length), pad_token_id)  # (B * K, W + T)
    sequences[:, :prompt_length] = input_ids

    prompt_kwargs = _select(model_kwargs, slice(None, None, repeats), len(input_ids))
    prompts = model.prepare_inputs_for_generation(input_ids[::repeats], is_first_iteration=True, **prompt_kwargs)
    outputs = model(**prompts, return_dict=True)
    _repeat(outputs.past_key_values, repeats, room=sequences.shape[1] - prompt_length)
    logits = outputs.logits[:, -1].float().repeat_interleave(repeats, dim=0)  # (R, V)

    rows = torch.arange(len(input_ids), device=input_ids.device)  # (R,), of the batch in the output
    running = torch.ones_like(rows, dtype=torch.bool)  # (R,)
    own = input_ids  # (R, L)
    while True:
        if running.any():
            tokens = draw(logits_processor(own, logits)).masked_fill(~running, pad_token_id)
            sequences[rows, own.shape[1]] = tokens
            own = torch.cat([own, tokens.unsqueeze(1)], dim=1)
            running = running & ~stopping_criteria(own, None)
        if not model._has_unfinished_sequences(not running.any(), synced_gpus, device=input_ids.device):
            return sequences[:, : own.shape[1]]
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        if 0 < running.sum() <= _RUNNING * len(rows):
            kept = running.nonzero().squeeze(1)
            model_kwargs = _select(model_kwargs, kept, len(rows))
            outputs.past_key_values.batch_select_indices(kept)
            rows, own, running = rows[kept], own[kept], running[kept]
        inputs = model.prepare_inputs_for_generation(own, next_sequence_length=1, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        logits = outputs.logits[:, -1].float()


class _ReservedLayer(DynamicLayer):
    """Layer of a cache with room for further tokens, so that a decoding step copies only its own.

    Args:
        layer: Layer with the prompts' keys and values, `(B, heads, W, size)`.
        repeats: Number of rows of each prompt.
        room: Number of further tokens.
    """

    def __init__(self, layer: DynamicLayer, repeats: int, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._length = layer.keys.shape[-2]
        self._buffers = [_reserved(states, repeats, room) for states in (layer.keys, layer.values)]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self._length = self._length, self._length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._length] = states
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._show()


def _reserved(states: Tensor, repeats: int, room: int) -> Tensor:
    batch, heads, length, size = states.shape
    buffer = states.new_empty(batch, repeats, heads, length + room, size)
    buffer[..., :length, :] = states.unsqueeze(1)
    return buffer.flatten(0, 1)


def _repeat(cache: DynamicCache, repeats: int, room: int) -> None:
    """Repeat each row of a cache."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = _ReservedLayer(layer, repeats, room)
        else:
            layer.batch_repeat_interleave(repeats)


def _select(model_kwargs: dict[str, Any], rows: Tensor | slice, batch_size: int) -> dict[str, Any]:
    """Select rows of all tensors that have one per text."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (batch_size,) else value
        for name, value in model_kwargs.items()
    }


_EXACT: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Results of `_is_exact` by model."""


def _is_exact(model: PreTrainedModel) -> bool:
    """Return whether given tokens get the logits of a forward pass without cache, before and after a row leaves."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = [index % vocabulary for index in range(3, 20)]
    prompts, eos_token_id, pad_token_id = [ids[:5], ids[5:8]], ids[15], ids[16]
    completions = [[ids[8], ids[9], ids[10]], [eos_token_id], [ids[11], ids[12], ids[13]], [ids[14], ids[8], ids[9]]]
    texts = [[*prompts[row // 2], *completion] for row, completion in enumerate(completions)]
    seen: list[Tensor] = []

    def draw(scores: Tensor) -> Tensor:
        seen.append(scores)
        given = [completion[len(seen) - 1] for completion in completions if len(completion) >= len(seen)]
        return torch.tensor(given, device=scores.device)

    input_ids, attention_mask = pad(prompts, pad_token_id, model.device, side="left")
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=2,
        max_new_tokens=3,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    try:
        model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            custom_generate=partial(decode, draw=draw),
        )
        for step, scores in enumerate(seen):
            rows = [
                text[: len(prompts[row // 2]) + step] for row, text in enumerate(texts) if step < len(completions[row])
            ]
            for row, actual in zip(rows, scores, strict=True):
                expected = (
                    model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -1].float()
                )
                tolerance = 1e-5 if model.dtype in (torch.float32, torch.float64) else 2e-2
                if not (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1):
                    return False
    except Exception:  # an architecture with another kind of cache
        return False
    return len(seen) == 3
