"""Decide how a model is scored, by comparison with its plain forward pass. No list of architectures decides on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
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
    small logits of a new model. Then texts as long as the longest that will be scored decide on the layout, so that
    they include every window that matters. Longer rows than compared are never used.

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
            prompt_length, completion_length = _longest(causal_lm, max_prompt_length, max_completion_length)
            ids = _sample_ids(causal_lm, prompt_length + num_completions * completion_length)
            prompt, ids = ids[:prompt_length], ids[prompt_length:]
            completions = [ids[start : start + completion_length] for start in range(0, len(ids), completion_length)]
            scoring = _choose_layout(model, causal_lm, scoring, prompt, completions)
            scoring = replace(scoring, several_passes=not _is_split(model, causal_lm))
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
    model: nn.Module, causal_lm: PreTrainedModel, padded: Scoring, prompt: list[int], completions: list[list[int]]
) -> Scoring:
    """Return the scoring with shared rows, or the padded one if they differ."""
    head = causal_lm.get_output_embeddings()
    # A shorter prompt in the same batch needs padding.
    prompts = [*[prompt] * len(completions), prompt[:2], prompt[:2]]
    texts = [*completions, completions[0][:1], completions[-1][:2]]
    try:
        rows = SharedRows.of(causal_lm.config)
        longest = max(row.length for row in rows.rows({tuple(prompt): completions}))
        shared = replace(padded, shared=replace(rows, max_length=longest))
        with _scaled_head(head, _LARGE if padded.fused else 1.0):
            # The last completion is the furthest from the prompt, so its own row is enough for the comparison.
            together = _scores(model, head, shared, prompts, texts)[-3:]
            expected = _scores(model, head, padded, prompts[-3:], texts[-3:])
            alone = _scores(model, head, padded, prompts[-3:-2], texts[-3:-2])
        difference = _difference(together, expected, head, noise=(expected[0] - alone[0]).abs().item())
        if difference is None and not _is_split(model, causal_lm):  # a backward pass would gather, too
            short = [text[:4] for text in completions[-3:]]
            difference = _dependence(model, causal_lm, shared, padded, prompt[:6], short)
    except Exception as error:  # an architecture that does not accept the mask or the positions
        difference = _first_line(error)
    return shared if difference is None else replace(padded, reason=f"shared prompts: {difference}")


def _dependence(
    model: nn.Module,
    causal_lm: PreTrainedModel,
    shared: Scoring,
    padded: Scoring,
    prompt: list[int],
    completions: list[list[int]],
) -> str | None:
    """Return how a completion depends on other tokens in shared rows than in its own, `None` if it does not.

    The layers of an untrained model can have less effect on its scores than rounding. The gradient by the embedding of
    a token shows any dependence on it: it is exactly 0 where the mask removes the token.
    """
    own = completions[-1]
    together = _embedding_gradients(model, causal_lm, shared, prompt, completions)  # (L, H)
    alone = _embedding_gradients(model, causal_lm, padded, prompt, [own])  # (P + C, H)
    before, siblings, after = together.split([len(prompt), len(together) - len(alone), len(own)])
    if siblings.any():
        return "completions of a prompt depend on one another"
    precise = alone.dtype in (torch.float32, torch.float64)
    sizes = alone.norm(dim=1)
    errors = (torch.cat([before, after]) - alone).norm(dim=1)
    if (errors <= (1e-2 if precise else 0.5) * sizes + 1e-3 * sizes.max()).all():
        return None
    return "completions depend on their prompt in another way"


def _embedding_gradients(
    model: nn.Module, causal_lm: PreTrainedModel, scoring: Scoring, prompt: list[int], completions: list[list[int]]
) -> Tensor:
    """Return the gradient of the last completion's log-probability by the embeddings of its row, `(L, H)`."""
    embeddings: list[Tensor] = []

    def record(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # some models scale it in place

    handle = causal_lm.get_input_embeddings().register_forward_hook(record)
    try:
        with torch.enable_grad():
            head = causal_lm.get_output_embeddings()
            scores = _scores(model, head, scoring, [prompt] * len(completions), completions)
            (gradients,) = torch.autograd.grad(scores[-1], embeddings)
    finally:
        handle.remove()
    row: Tensor
    (row,) = gradients  # one row, for few and short completions
    return row


def _longest(
    model: PreTrainedModel, max_prompt_length: int | None, max_completion_length: int | None
) -> tuple[int, int]:
    """Return the lengths of the longest prompt and completion to compare with."""
    positions = max_positions(model) or 2 * _UNKNOWN_LENGTH
    completion_length = min(max_completion_length or _UNKNOWN_LENGTH // 4, positions // 2)
    prompt_length = min(max_prompt_length or _UNKNOWN_LENGTH, positions - completion_length)
    return prompt_length, completion_length


def _sample_ids(model: PreTrainedModel, length: int) -> list[int]:
    """Return token ids without a short period."""
    vocabulary = model.config.get_text_config().vocab_size
    return [(3 + 7 * index + index * index // 5) % vocabulary for index in range(length)]


def _scores(
    model: nn.Module, head: nn.Linear, scoring: Scoring, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> Tensor:
    pad_token_id = prompts[0][0]
    sums, lengths = sequence_logps(
        model, prompts, completions, pad_token_id=pad_token_id, device=head.weight.device, scoring=scoring
    )
    return sums / lengths


def _difference(scores: Tensor, expected: Tensor, head: nn.Linear, noise: float = 0.0) -> str | None:
    """Return how much scores differ, `None` if it is what rounding explains.

    An untrained model attends to all tokens nearly alike, so that what it attends to changes its scores very little.

    Args:
        scores: Scores, `(N,)`.
        expected: What they have to be, `(N,)`.
        head: The output head, for its type.
        noise: Difference of a score with itself, computed in another batch.
    """
    precise = head.weight.dtype in (torch.float32, torch.float64)
    tolerance = (1e-5 if precise else 2e-2) * expected.abs().clamp(min=1) + 10 * noise
    differences = (scores - expected).abs()
    if (differences <= tolerance).all():
        return None
    return f"a difference of {differences.max().item():.3g} nats per token"


def _is_split(model: nn.Module, causal_lm: PreTrainedModel) -> bool:
    """Return whether FSDP or ZeRO-3 splits the model, so that every forward pass gathers weights."""
    wrapped = model is not causal_lm and not is_peft_model(model)
    return wrapped or any(isinstance(each, DTensor) or hasattr(each, "ds_id") for each in model.parameters())


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
def _scaled_head(head: nn.Linear, scale: float) -> Iterator[None]:
    """Multiply the weight of the output head by a power of 2, which can be undone exactly."""
    with torch.no_grad():
        head.weight.mul_(scale)
        try:
            yield
        finally:
            head.weight.mul_(1 / scale)
