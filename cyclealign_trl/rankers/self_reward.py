"""A ranker without any black box: a language model's own opinion of completions (DLMA, arXiv 2402.11907)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..contrastive import ContrastivePrompts
from ..errors import RankerError
from ..self_reward import SelfReward
from ..types import RankingFailure, RankingRequest
from .base import Outcome, outcome_of


class SelfRewardRanker:
    """Ranks completions by a causal language model's contrastive log-likelihood ratio, DLMA's self-reward.

    A completion's score is its summed log-probability when the model is asked for a good reply, less that when it is
    asked for a bad one. It sees neither demonstrations nor metadata. Completions of equal score share a rank.

    The model may be the policy itself. By name, it is a copy that stays as it is while the policy learns, as in the
    paper. Given as the object that is being trained, it ranks with the weights of the moment: without dropout only,
    and not where training splits the weights among processes.

    A request whose prompt is too long is a `RankingFailure("too_long")`, one with a score that is not finite a
    `RankingFailure("no_score")`. Calls of `rank` from several threads take turns. It has no `fingerprint`, so its
    answers are not cached: asking again costs nothing but time.

    Args:
        model: Name or path of a causal language model, or a loaded one, which is moved to `device`.
        tokenizer: The model's tokenizer. `None` loads the one of the model's name.
        contrastive: What a good and a bad reply are: `"harmless"`, `"helpful"`, or `ContrastivePrompts` of your own
            (in YAML, a mapping of its arguments).
        batch_size: Texts in one forward pass. A completion makes two.
        max_prompt_length: Longest contrastive prompt in tokens; `None` for no limit.
        max_completion_length: Longest completion in tokens. A longer one is scored up to there.
        chat_template_kwargs: Keyword arguments for the chat template of conversational prompts.
        device: Where the model runs. `None` means this process's accelerator, or the CPU where there is none. A model
            loaded with a `device_map` stays where that put it.
        model_init_kwargs: Keyword arguments for loading the model by name (`dtype`, `revision`, ...).

    Raises:
        ValueError: If an argument is out of its range or contradicts another.

    Example:
        ```python
        ranker = SelfRewardRanker("Qwen/Qwen3-0.6B", contrastive="helpful")
        ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        contrastive: ContrastivePrompts | Mapping[str, str] | str = "harmless",
        batch_size: int = 16,
        max_prompt_length: int | None = 512,
        max_completion_length: int = 512,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("max_prompt_length", max_prompt_length),
            ("max_completion_length", max_completion_length),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1; got {value}.")
        self._self_reward = SelfReward.load(
            model,
            tokenizer,
            contrastive,
            batch_size=batch_size,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            chat_template_kwargs=chat_template_kwargs,
            device=device,
            model_init_kwargs=model_init_kwargs,
        )
        self._model = self._self_reward.model
        self._name = self._model.name_or_path or type(self._model).__name__
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self._name!r}, contrastive={self._self_reward.contrastive})"

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Ranks each request; see `Ranker.rank`.

        Raises:
            RankerError: If the model is being trained with dropout.
        """
        if self._model.training and any(map(_drops_out, self._model.modules())):
            raise RankerError(
                f"{self._name} is being trained with dropout, under which its own scores are noise. Train it without, "
                "or pass the model's name, which loads a copy that stays as it is."
            )
        with self._lock:
            fitting = [request for request in requests if self._self_reward.fits(request.prompt)]
            logps = self._self_reward.logps(
                [request.prompt for request in fitting for _ in request.completions],
                [completion for request in fitting for completion in request.completions],
            )
        scores = iter((logps[:, 0] - logps[:, 1]).tolist())
        outcomes = {id(request): outcome_of([next(scores) for _ in request.completions]) for request in fitting}
        limit = self._self_reward.encoder.max_prompt_length
        too_long = RankingFailure("too_long", f"with what it asks for, the prompt has more than {limit} tokens")
        return [outcomes.get(id(request), too_long) for request in requests]


def _drops_out(module: torch.nn.Module) -> bool:
    # Attention has no module of its own for it.
    return bool(module.p if isinstance(module, torch.nn.Dropout) else getattr(module, "attention_dropout", 0))
