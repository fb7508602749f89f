"""Decide how a model is scored, by comparison with its plain forward pass. No list of architectures decides on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .loading import max_positions
from .logps import PLAIN, Scoring, sequence_logps
from .text_rows import SharedRows

logger = logging.getLogger(__name__)

_UNKNOWN_LENGTH = 1024
_LARGE = 32.0  # factor of the output head
_PLAIN_HEAD = (
    "The fused output head does not compute the log-probabilities of %s (%s). They are computed from full logits "
    "instead, which takes more memory."
)


def choose_scoring(
    model: nn.Module,
    causal_lm: PreTrainedModel | None = None,
    *,
    num_completions: int = 4,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> Scoring:
    """Return the fastest way to score a model that gives the log-probabilities of its plain forward pass.

    The fused output head cannot be used if the head has an adapter, or if the architecture transforms hidden states or
    logits in a way that it does not know. Rows that share a prompt cannot be used if a layer depends on anything but
    the attention mask and the positions: a recurrent state, a window over the row, or a bias by distance.

    Short texts are scored with both heads, and with a larger head too, because a cap on logits has no effect on the
    small logits of a new model. Then a row as long as the longest that will be scored decides on the layout, so that
    it includes every window that matters: what its last completion depends on is compared token by token. Longer rows
    than compared are never used.

    Args:
        model: A model after `add_scoring`, with its adapter, or the same model as wrapped by FSDP. If the model is
            sharded, every process must call this at the same time. Under ZeRO-3, the weights are gathered for it.
        causal_lm: The model without wrappers and adapter. Defaults to `model`.
        num_completions: Completions per prompt.
        max_prompt_length: Longest prompt in tokens. `None` means unknown.
        max_completion_length: Longest completion in tokens. `None` means unknown.
    """
    causal_lm = cast("PreTrainedModel", model) if causal_lm is None else causal_lm
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _gathered(causal_lm):
            scoring = _choose_head(model, causal_lm)
            lengths = max_prompt_length or _UNKNOWN_LENGTH, max_completion_length or _UNKNOWN_LENGTH // 4
            scoring = _choose_layout(model, causal_lm, scoring, *lengths, num_completions)
            # Forward passes are collective under DDP too, which sends the buffers of the first process to the others.
            alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
            scoring = replace(scoring, several_passes=alone)
    finally:
        model.train(was_training)
    logger.info("%s is scored with %s.", type(causal_lm).__name__, scoring)
    return scoring


def _choose_head(model: nn.Module, causal_lm: PreTrainedModel) -> Scoring:
    head = causal_lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        return replace(PLAIN, reason=f"the output head is a {type(head).__name__}")
    ids = _sample_ids(causal_lm, 13)
    texts = [ids[:3], ids[7:9]], [ids[3:7], ids[9:]]
    fused = Scoring(fused=True)
    try:
        for scale in (1.0, _LARGE):
            with _scaled_head(head, scale):
                scores, expected = (_scores(model, head, scoring, *texts) for scoring in (fused, PLAIN))
            difference = _difference(scores, expected, head)
            if difference is not None:
                break
    except Exception as error:  # an architecture whose outputs the fused head cannot read
        difference = _first_line(error)
    if difference is None:
        return fused
    logger.warning(_PLAIN_HEAD, type(causal_lm).__name__, difference)
    return replace(PLAIN, reason=f"fused head: {difference}")


def _choose_layout(
    model: nn.Module,
    causal_lm: PreTrainedModel,
    padded: Scoring,
    prompt_length: int,
    completion_length: int,
    num_completions: int,
) -> Scoring:
    """Return the scoring with shared rows, or the padded one if they differ."""
    head, is_split = causal_lm.get_output_embeddings(), _is_split(causal_lm)
    try:
        # A model that counts positions by itself would look up a position that it does not have.
        rows = replace(SharedRows.of(causal_lm.config), max_length=max_positions(causal_lm))
        prompt, completions = _longest_row(causal_lm, rows, prompt_length, completion_length, num_completions)
        length = len(prompt) + sum(map(len, completions))
        shared = replace(padded, shared=replace(rows, max_length=length))
        short = [text[:3] for text in completions[:3]]
        texts = [prompt[:6]] * len(short) + [prompt[:2]] * 2, [*short, short[0][:1], short[0][:2]]  # needs padding
        if is_split:  # a backward pass would gather, too
            texts = texts[0] + [prompt] * len(completions), texts[1] + completions
        with _scaled_head(head, _LARGE if padded.fused else 1.0):
            scores, expected = (_scores(model, head, scoring, *texts) for scoring in (shared, padded))
        difference = _difference(scores, expected, head)
        if difference is None and not is_split:
            difference = _dependence(model, causal_lm, shared, padded, prompt, completions)
    except Exception as error:  # an architecture that does not accept the mask or the positions
        difference = _first_line(error)
    return shared if difference is None else replace(padded, reason=f"shared prompts: {difference}")


def _dependence(
    model: nn.Module,
    causal_lm: PreTrainedModel,
    shared: Scoring,
    padded: Scoring,
    prompt: list[int],
    completions: Sequence[Sequence[int]],
) -> str | None:
    """Return how the last completion depends on other tokens in a shared row than in its own, `None` if it does not.

    The layers of an untrained model can have less effect on its scores than rounding. The gradient by the embedding of
    a token shows any dependence on it, relative to that of the other model: it is exactly 0 where the mask removes it.
    """
    own = completions[-1]
    together = _embedding_gradients(model, causal_lm, shared, prompt, completions)  # (L, H)
    alone = _embedding_gradients(model, causal_lm, padded, prompt, [own])  # (P + C, H)
    before, siblings, after = together.split([len(prompt), len(together) - len(alone), len(own)])
    if siblings.any():
        return "completions of a prompt depend on one another"
    relative, absolute = (1e-3, 1e-5) if _is_precise(alone) else (0.5, 1e-3)
    sizes = alone.norm(dim=1)
    errors = (torch.cat([before, after]) - alone).norm(dim=1)
    if (errors <= relative * sizes + absolute * sizes.max()).all():
        return None
    return "completions depend on their prompt in another way"


def _embedding_gradients(
    model: nn.Module,
    causal_lm: PreTrainedModel,
    scoring: Scoring,
    prompt: list[int],
    completions: Sequence[Sequence[int]],
) -> Tensor:
    """Return the gradient of the last completion's log-probability by the embeddings of its row, `(L, H)`."""
    embeddings: list[Tensor] = []

    def record(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # some models scale it in place

    handle = causal_lm.get_input_embeddings().register_forward_hook(record)
    try:
        with torch.enable_grad(), _frozen(model):
            head = causal_lm.get_output_embeddings()
            scores = _scores(model, head, scoring, [prompt] * len(completions), completions)
            (gradients,) = torch.autograd.grad(scores[-1], embeddings)
    finally:
        handle.remove()
    row: Tensor
    (row,) = gradients
    return row


def _longest_row(
    model: PreTrainedModel, rows: SharedRows, prompt_length: int, completion_length: int, num_completions: int
) -> tuple[list[int], list[list[int]]]:
    """Return the prompt and the completions, at least two, of a row as long as the longest that will be scored."""
    if rows.max_length is not None:
        prompt_length = min(prompt_length, rows.max_length // 2)
    room = min(rows.efficient_length(prompt_length) - prompt_length, num_completions * completion_length)
    completion_length = max(1, min(completion_length, room // 2))
    ids = _sample_ids(model, prompt_length + room // completion_length * completion_length)
    starts = range(prompt_length, len(ids), completion_length)
    return ids[:prompt_length], [ids[start : start + completion_length] for start in starts]


def _sample_ids(model: PreTrainedModel, length: int) -> list[int]:
    """Return token ids without a short period."""
    vocabulary = model.config.get_text_config().vocab_size
    return [(3 + 7 * index + index * index // 5) % vocabulary for index in range(length)]


def _scores(
    model: nn.Module,
    head: nn.Linear,
    scoring: Scoring,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> Tensor:
    pad_token_id = prompts[0][0]
    sums, lengths = sequence_logps(
        model, prompts, completions, pad_token_id=pad_token_id, device=head.weight.device, scoring=scoring
    )
    return sums / lengths


def _difference(scores: Tensor, expected: Tensor, head: nn.Linear) -> str | None:
    """Return how much scores `(N,)` differ from what they have to be, `None` if it is what rounding explains."""
    tolerance = (1e-5 if _is_precise(head.weight) else 2e-2) * expected.abs().clamp(min=1)
    differences = (scores - expected).abs()
    if (differences <= tolerance).all():
        return None
    return f"a difference of {differences.max().item():.3g} nats per token"


def _is_precise(tensor: Tensor) -> bool:
    """Return whether products are computed in float32 or wider, without TF32."""
    exact = tensor.device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"
    return tensor.dtype == torch.float64 or (tensor.dtype == torch.float32 and exact)


def _is_split(causal_lm: PreTrainedModel) -> bool:
    """Return whether FSDP or ZeRO-3 splits the model, so that every forward pass gathers weights."""
    return any(isinstance(each, DTensor) or hasattr(each, "ds_id") for each in causal_lm.parameters())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Gather the weights of a model that ZeRO-3 has sharded on every process."""
    parameters = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of weights, which would take time and memory for nothing."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _scaled_head(head: nn.Linear, scale: float) -> Iterator[None]:
    """Multiply the weight of the output head by a power of 2, which can be undone exactly."""
    with torch.no_grad():
        head.weight.mul_(scale)
        try:
            yield
        finally:
            head.weight.mul_(1 / scale)
