"""A ranker made of a reward model: any sequence classifier with one output, in this process."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .._warnings import OnceLogger
from ..errors import RankerError
from ..models.batches import longest_first, pad
from ..models.loading import check_positions, load_model, load_tokenizer, max_positions, place_model
from ..types import Prompt, RankingFailure, RankingRequest, with_completion
from .base import Outcome, rank_by_scores

logger = logging.getLogger(__name__)

OPEN_ASSISTANT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|prompter|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>"
    "{% else %}{{ raise_exception('the layout has user and assistant turns, no ' + message['role']) }}{% endif %}"
    "{{ message['content'] }}<|endoftext|>"
    "{% endfor %}"
)
"""How the Open-Assistant reward models (`OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1`, ...) read a conversation."""


class RewardModelRanker:
    """Ranks completions by the score of a reward model: any sequence classifier with one output.

    Completions of a conversational prompt are shown to it as the chat template writes the whole conversation, those
    of a plain text prompt as prompt and completion in one text. A text that is too long loses its beginning. It sees
    neither demonstrations nor metadata.

    A higher score is better. Completions of equal score share a rank (0, 1, 1, 2), and `order` lists them by index.
    A request with a score that is not finite is a `RankingFailure("no_score")`; one whose messages the chat template
    refuses, a `RankingFailure("invalid_prompt")`. Calls of `rank` from several threads take turns.

    It has no `fingerprint`, so its answers are not cached: scoring costs nothing, and a name does not say whether the
    weights behind it have changed.

    Args:
        model: Name or path of the model, or a loaded model. A loaded one becomes the ranker's own: it is moved to
            `device`, put into evaluation mode and, where it lacks one, given the tokenizer's padding token.
        tokenizer: The model's tokenizer. `None` loads the one of the model's name.
        chat_template: Jinja template for conversations. `None` means the tokenizer's own.
        batch_size: Texts scored at once.
        max_length: Tokens of a text that the model reads. `None` means as many as model and tokenizer allow.
        device: Where the model runs. `None` means this process's accelerator, or the CPU where there is none. A model
            loaded with a `device_map` stays where that put it.
        model_init_kwargs: Keyword arguments for loading the model by name (`dtype`, `revision`, ...).

    Raises:
        ValueError: If the model has another number of outputs than one, or an argument is out of its range or
            contradicts another.

    Example:
        ```python
        ranker = RewardModelRanker("org/reward-model", model_init_kwargs={"dtype": "bfloat16"})
        ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        chat_template: str | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1 text; got {batch_size}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be at least 1 token, or None for the model's own; got {max_length}.")
        init_kwargs = dict(model_init_kwargs or {})
        name = model if isinstance(model, str) else model.name_or_path
        model = load_model(AutoModelForSequenceClassification, model, init_kwargs)
        self._name = name or type(model).__name__
        self._model = _ready(model, self._name, device)
        self._tokenizer = load_tokenizer(tokenizer, name, init_kwargs)
        self._tokenizer.truncation_side = "left"
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._max_length = _max_length(max_length, model, self._tokenizer)
        self._pad_token_id = _pad_token_id(model, self._tokenizer)
        self._batch_size = batch_size
        self._once = OnceLogger(logger)
        self._lock = threading.Lock()
        if self._pad_token_id is None and batch_size > 1:
            self._batch_size = 1
            self._once.warning(
                "padding",
                f"Neither {self._name} nor its tokenizer has a padding token, so texts are scored one at a time "
                f"instead of {batch_size}. Set `tokenizer.pad_token` to a token that no text ends in.",
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self._name!r}, device={str(self._model.device)!r})"

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Ranks each request; see `Ranker.rank`.

        Raises:
            RankerError: If a prompt is conversational and there is no chat template.
        """
        with self._lock:
            encoded = [self._encode(request) for request in requests]
            texts = [ids for entry in encoded if not isinstance(entry, RankingFailure) for ids in entry]
            scores = iter(self._scores(texts))
        return [
            entry if isinstance(entry, RankingFailure) else rank_by_scores([next(scores) for _ in entry])
            for entry in encoded
        ]

    def _encode(self, request: RankingRequest) -> list[list[int]] | RankingFailure:
        """Token ids of the text of each completion."""
        try:
            texts = [self._render(request.prompt, completion) for completion in request.completions]
        except TemplateError as error:
            return RankingFailure("invalid_prompt", f"the chat template refuses the messages: {error}")
        # A chat template writes its own special tokens.
        return [self._tokenize(text, add_special_tokens=isinstance(request.prompt, str)) for text in texts]

    def _render(self, prompt: Prompt, completion: str) -> str:
        if isinstance(prompt, str):
            if self._tokenizer.chat_template is not None:
                self._once.warning(
                    "plain",
                    f"{self._name} has a chat template, so it was trained on conversations, but is asked about plain "
                    "text, which it judges worse. Use conversational prompts: lists of role and content.",
                )
            return prompt + completion
        if self._tokenizer.chat_template is None:
            raise RankerError(
                f"The prompts are conversational, but the tokenizer of {self._name} has no chat template. Pass the "
                "one that the model was trained with as `chat_template`, or use plain text prompts."
            )
        return str(self._tokenizer.apply_chat_template(with_completion(prompt, completion), tokenize=False))

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        # Not verbose: the tokenizer would warn of a length that is dealt with here.
        ids = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        if len(ids) > self._max_length:
            self._once.warning(
                "too_long",
                f"A text has {len(ids)} tokens, but {self._name} reads {self._max_length}: of this one, and of others "
                "like it, the beginning is left out. Use shorter prompts or completions, or a larger `max_length` if "
                "the model can read more.",
            )
            # Once more rather than a slice: special tokens in front, which some models pool, have to stay.
            ids = self._tokenizer(
                text, add_special_tokens=add_special_tokens, truncation=True, max_length=self._max_length
            )["input_ids"]
        return list(ids)

    def _scores(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """The score of each text, given as token ids."""
        scores = [math.nan] * len(texts)
        for batch in longest_first([len(text) for text in texts], self._batch_size):
            for index, score in zip(batch, self._forward([texts[index] for index in batch]), strict=True):
                scores[index] = score
        return scores

    def _forward(self, batch: Sequence[Sequence[int]]) -> list[float]:
        device = self._model.device
        # Without a pad token, every batch has one row, and any id will do.
        input_ids, attention_mask = pad(batch, self._pad_token_id or 0, device)  # both (B, L)
        # Worker threads do not inherit the current device, which some kernels launch on.
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with current, torch.inference_mode():
            output = self._model(input_ids=input_ids, attention_mask=attention_mask)
        scores: list[float] = output.logits.float().squeeze(-1).tolist()  # (B,)
        return scores


def _ready(model: PreTrainedModel, name: str, device: str | torch.device | None) -> PreTrainedModel:
    """The model on its device, ready to score."""
    if model.config.num_labels != 1:
        raise ValueError(
            f"A reward model has 1 output, but {name} has num_labels={model.config.num_labels} (2 is what a model "
            "gets that never had such outputs). Use a model that was trained as a reward model, with num_labels=1."
        )
    place_model(model, name, device)
    # No text is ever continued, so keys and values would be kept for nothing.
    model.config.get_text_config().use_cache = False
    return model.eval()


def _max_length(given: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    if given is None:
        limit = int(tokenizer.model_max_length)  # 1e30 where the tokenizer has no limit
        positions = max_positions(model)
        return limit if positions is None else min(limit, positions)
    check_positions(model, max_length=given)
    return given


def _pad_token_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that pads, which the model has to know too: it finds the end of a text by it."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    pad_token_id: int | None = config.pad_token_id
    return pad_token_id
