"""Scores of a reward model that runs in this process."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .._warnings import OnceLogger
from ..types import Prompt, with_completion
from .batches import longest_first, pad
from .chat_templates import read_chat_template
from .gpt_neox_reward_model import OPEN_ASSISTANT_CHAT_TEMPLATE, GPTNeoXRewardModel
from .loading import check_positions, check_vocabulary, load_model, load_tokenizer, max_positions, place_model
from .renderer import parse_tools
from .special_text import TextEncoder

logger = logging.getLogger(__name__)


class RewardScorer:
    """Score completions with a reward model, a sequence classifier with one output. A higher score is better.

    For a conversational prompt, the model scores the conversation with the completion, formatted by the chat template.
    For a plain-text prompt, it scores the concatenation of prompt and completion. A text that is too long is truncated
    on the left.

    Args:
        model: Name or path of the model, or a loaded model. A loaded model is modified: it is moved to `device`, set
            to evaluation mode and, if it has no padding token, given the one of the tokenizer.
        tokenizer: Tokenizer of the model. `None` loads it by the model's name.
        chat_template: Jinja template for conversations, as a file or a text, or the name or folder of a model that has
            one. `None` uses the template of the tokenizer, or the one of the Open-Assistant models for their
            architecture.
        batch_size: Number of texts in one forward pass.
        max_length: Longest text in tokens. `None` means the limit of model and tokenizer.
        device: Device of the model. `None` means this process's accelerator, or the CPU without one. A model loaded
            with a `device_map` is not moved.
        model_init_kwargs: Keyword arguments for loading the model by name (`dtype`, `revision`, ...).

    Raises:
        ValueError: If the model does not have exactly one output, if an argument is out of range, or if arguments
            contradict each other.

    Example:
        ```python
        scorer = RewardScorer("org/reward-model", model_init_kwargs={"dtype": "bfloat16"})
        scorer.score(["Name a fruit."], ["An apple."])
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
        for argument, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"`{argument}` must be at least 1, got {value}.")
        init_kwargs = dict(model_init_kwargs or {})
        name = model if isinstance(model, str) else model.name_or_path
        model = load_model(AutoModelForSequenceClassification, model, init_kwargs)
        self.name = name or type(model).__name__
        self.model = _prepare_model(model, self.name, device)
        self.tokenizer = load_tokenizer(tokenizer, name, init_kwargs)
        if chat_template is None and self.tokenizer.chat_template is None and isinstance(model, GPTNeoXRewardModel):
            chat_template = OPEN_ASSISTANT_CHAT_TEMPLATE
        if chat_template is not None:
            self.tokenizer.chat_template = read_chat_template(chat_template)
        self._encoder = TextEncoder(self.tokenizer)
        self.max_length = _resolve_max_length(max_length, model, self.tokenizer)
        check_vocabulary(model, self.tokenizer)
        self._pad_token_id = _sync_pad_token(model, self.tokenizer)
        self.batch_size = batch_size
        self._once = OnceLogger(logger)
        self._lock = threading.Lock()
        if self._pad_token_id is None and batch_size > 1:
            self.batch_size = 1
            self._once.warning(
                "padding",
                "Neither %s nor its tokenizer has a padding token, so texts are scored one at a time instead of %d. "
                "Set `tokenizer.pad_token` to a token that no text ends with.",
                self.name,
                batch_size,
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.name!r}, device={str(self.model.device)!r})"

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Return the score of one completion of each of N prompts. A score can be NaN or infinite.

        Raises:
            ValueError: If there are not as many completions as prompts, or a prompt is conversational and the
                tokenizer has no chat template.
            jinja2.TemplateError: If the chat template rejects the messages of a prompt.
        """
        texts = [self.encode(prompt, [completion])[0] for prompt, completion in zip(prompts, completions, strict=True)]
        return self.score_ids(texts)

    def encode(self, prompt: Prompt, completions: Sequence[str], tools: Any = None) -> list[list[int]]:
        """Return the token ids of the text to score for each completion of a prompt. Raises as `score` does.

        Args:
            prompt: The prompt.
            completions: Its completions.
            tools: Tools for the chat template, as a list of functions' schemas or as JSON text.
        """
        with self._lock:
            texts = [self._render(prompt, completion, tools) for completion in completions]
            # A chat template adds the special tokens itself.
            return [self._tokenize(text, add_special_tokens=isinstance(prompt, str)) for text in texts]

    def score_ids(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Score texts, given as token ids. Texts of similar length share a batch."""
        scores = [math.nan] * len(texts)
        for batch in longest_first([len(text) for text in texts], self.batch_size):
            with self._lock:
                batch_scores = self._forward([texts[index] for index in batch])
            for index, score in zip(batch, batch_scores, strict=True):
                scores[index] = score
        return scores

    def _render(self, prompt: Prompt, completion: str, tools: Any) -> str:
        if isinstance(prompt, str):
            if self.tokenizer.chat_template is not None:
                self._once.warning(
                    "plain",
                    "%s has a chat template, so it was trained on conversations and scores plain-text prompts less "
                    "reliably. Use conversational prompts: lists of messages with role and content.",
                    self.name,
                )
            return prompt + self._encoder.mark(completion)
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The prompts are conversational, but the tokenizer of {self.name} has no chat template. Pass the "
                "one that the model was trained with as `chat_template`, or use plain-text prompts."
            )
        messages = self._encoder.mark_messages(with_completion(prompt, completion))
        return str(self.tokenizer.apply_chat_template(messages, tools=parse_tools(tools), tokenize=False))

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._encoder.encode(text)
        opening, closing = (self._encoder.opening, self._encoder.closing) if add_special_tokens else ([], [])
        length, room = len(opening) + len(ids) + len(closing), self.max_length - len(opening) - len(closing)
        if length > self.max_length:
            self._once.warning(
                "too_long",
                "A text has %d tokens, but %s is limited to %d. Texts that are too long lose their beginning. Use "
                "shorter prompts or completions, or increase `max_length` if the model supports it.",
                length,
                self.name,
                self.max_length,
            )
            ids = ids[-room:]  # special tokens at the start stay, because some models pool them
        return [*opening, *ids, *closing]

    def _forward(self, batch: Sequence[Sequence[int]]) -> list[float]:
        device = self.model.device
        # Without a padding token every batch has one row, so the id is not used.
        input_ids, attention_mask = pad(batch, self._pad_token_id or 0, device)  # both (B, L)
        # Some kernels launch on the current CUDA device, which worker threads do not inherit.
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with current, torch.inference_mode():
            output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        scores: list[float] = output.logits.float().squeeze(-1).tolist()  # (B,)
        return scores


def check_num_labels(config: PreTrainedConfig, name: str) -> None:
    """Raise `ValueError` if a model does not have one output.

    Args:
        config: Configuration of the model.
        name: Name of the model, for the message.
    """
    if config.num_labels != 1:
        raise ValueError(
            f"A reward model has 1 output, but {name} has num_labels={config.num_labels}. Use a model that was "
            "trained as a reward model, with num_labels=1. (The default for a model without a trained head is 2.)"
        )


def _prepare_model(model: PreTrainedModel, name: str, device: str | torch.device | None) -> PreTrainedModel:
    """Check the model, move it to its device and set it to evaluation mode."""
    check_num_labels(model.config, name)
    place_model(model, name, device)
    # Texts are scored in a single forward pass, so a cache of keys and values would only take memory.
    model.config.get_text_config().use_cache = False
    return model.eval()


def _resolve_max_length(max_length: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    if max_length is None:
        limit = int(tokenizer.model_max_length)  # 1e30 if the tokenizer has no limit
        positions = max_positions(model)
        return limit if positions is None else min(limit, positions)
    check_positions(model, max_length=max_length)
    return max_length


def _sync_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the padding token, after setting it in the model, which finds the end of a text by it."""
    config = model.config.get_text_config()
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if config.pad_token_id is not None and config.pad_token_id < 0:
        config.pad_token_id = None  # some configs write "none" as -1
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    pad_token_id: int | None = config.pad_token_id
    if pad_token_id is not None and embeddings is not None and pad_token_id >= embeddings:
        raise ValueError(
            f"The padding token of {type(model).__name__} has id {pad_token_id}, but the model has embeddings for ids "
            f"below {embeddings}. Set config.pad_token_id and tokenizer.pad_token to a token of the model."
        )
    return pad_token_id
