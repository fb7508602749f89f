"""Ranker over a reward model that runs in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RankerError
from ..models.reward_scorer import RewardScorer
from ..types import RankingFailure, RankingRequest
from .base import Outcome, rank_by_scores


class RewardModelRanker:
    """Rank completions by the scores of a reward model, a sequence classifier with one output.

    For a conversational prompt, the model scores the conversation with the completion, formatted by the chat template.
    For a plain-text prompt, it scores the concatenation of prompt and completion. A text that is too long is truncated
    on the left. The chat template gets the tools of a row, `metadata["tools"]`. Demonstrations and other metadata are
    ignored.

    A higher score is better. Completions with equal scores share a rank (0, 1, 1, 2), and `order` lists them by index.
    A request becomes `RankingFailure("no_score")` if a score is not finite, and `RankingFailure("invalid_prompt")` if
    the chat template rejects its messages. Calls of `rank` from several threads run one after another.

    The ranker has no `fingerprint`, so its rankings are not cached: ranking again is free, and the weights behind a
    name can change.

    Args:
        model: Name or path of the model, or a loaded model. A loaded model is modified: it is moved to `device`, set
            to evaluation mode and, if it has no padding token, given the one of the tokenizer.
        tokenizer: Tokenizer of the model. `None` loads it by the model's name.
        chat_template: Jinja template for conversations, as a file or a text, or the name or folder of a model that has
            one. `None` uses the template of the tokenizer.
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
        self.scorer = RewardScorer(
            model,
            tokenizer,
            chat_template=chat_template,
            batch_size=batch_size,
            max_length=max_length,
            device=device,
            model_init_kwargs=model_init_kwargs,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.name!r}, device={str(self.scorer.model.device)!r})"

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.scorer.name

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Rank the completions of each request. See `Ranker.rank`.

        Raises:
            RankerError: If a prompt is conversational and the tokenizer has no chat template.
        """
        encoded = [self._encode(request) for request in requests]
        texts = [ids for entry in encoded if not isinstance(entry, RankingFailure) for ids in entry]
        scores = iter(self.scorer.score_ids(texts))
        return [
            entry if isinstance(entry, RankingFailure) else rank_by_scores([next(scores) for _ in entry])
            for entry in encoded
        ]

    def _encode(self, request: RankingRequest) -> list[list[int]] | RankingFailure:
        """Return the token ids of the text to score for each completion."""
        try:
            return self.scorer.encode(request.prompt, request.completions, request.metadata.get("tools"))
        except TemplateError as error:
            return RankingFailure("invalid_prompt", f"the chat template rejects the messages: {error}")
        except ValueError as error:
            raise RankerError(str(error)) from error
