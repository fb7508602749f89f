"""A ranker without any black box: a language model's own opinion of completions (DLMA, arXiv 2402.11907)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import RankerError
from ..models.batches import longest_first
from ..models.loading import load_causal_lm, place_model, sync_special_tokens
from ..models.logps import fuse_lm_head, has_plain_lm_head, sequence_logps
from ..models.renderer import Renderer
from ..types import Prompt, RankingFailure, RankingRequest
from .base import Outcome, rank_by_scores
from .contrastive_prompts import ContrastivePrompts


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
        outcomes = {id(request): rank_by_scores([next(scores) for _ in request.completions]) for request in fitting}
        limit = self._self_reward.renderer.max_prompt_length
        too_long = RankingFailure("too_long", f"with what it asks for, the prompt has more than {limit} tokens")
        return [outcomes.get(id(request), too_long) for request in requests]


def _drops_out(module: torch.nn.Module) -> bool:
    # Attention has no module of its own for it.
    return bool(module.p if isinstance(module, torch.nn.Dropout) else getattr(module, "attention_dropout", 0))


class SelfReward:
    """Scores completions by how much likelier a model makes them when it is asked for a good reply than for a bad one.

    Args:
        model: A causal language model, where it is to run.
        tokenizer: Its tokenizer.
        contrastive: What a good and a bad reply are.
        batch_size: Texts in one forward pass.
        max_prompt_length: Longest contrastive prompt in tokens; `None` for no limit. See `fits`.
        max_completion_length: Longest completion in tokens. A longer one is scored up to there.
        chat_template_kwargs: Keyword arguments for the chat template of conversational prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        contrastive: ContrastivePrompts,
        *,
        batch_size: int = 16,
        max_prompt_length: int | None = 512,
        max_completion_length: int = 512,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.contrastive = contrastive
        self.renderer = Renderer(
            tokenizer,
            sync_special_tokens(model, tokenizer),
            max_prompt_length,
            max_completion_length,
            chat_template_kwargs or {},
        )
        self.model = model
        self._batch_size = batch_size
        fuse_lm_head(model)

    @classmethod
    def load(
        cls,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        contrastive: ContrastivePrompts | Mapping[str, str] | str = "harmless",
        *,
        device: str | torch.device | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> SelfReward:
        """Loads a model by its name, or takes a loaded one, and moves it to its device.

        Args:
            model: The model, or its name.
            tokenizer: Its tokenizer. `None` loads the one of the model's name.
            contrastive: `"harmless"`, `"helpful"`, or `ContrastivePrompts` of your own.
            device: Where the model runs. `None` means this process's accelerator, or the CPU where there is none.
            model_init_kwargs: Keyword arguments for loading the model by name.
            kwargs: Further arguments of `SelfReward`.
        """
        model, tokenizer = load_causal_lm(model, tokenizer, model_init_kwargs)
        place_model(model, model.name_or_path or type(model).__name__, device)
        return cls(model, tokenizer, ContrastivePrompts.of(contrastive), **kwargs)

    def fits(self, prompt: Prompt) -> bool:
        """Whether both contrastive prompts are short enough. Cut on the left, they might lose what they ask for."""
        return not any(self.renderer.prompt(asking)[1] for asking in self.contrastive.apply(prompt))

    def logps(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Summed log-probabilities of N completions under the positive and under the negative prompt.

        Returns:
            `(N, 2)` in float32, on the CPU. The score is the first less the second.
        """
        rows = [
            (self.renderer.prompt(asking)[0], self.renderer.completion(asking, completion)[0])
            for prompt, completion in zip(prompts, completions, strict=True)
            for asking in self.contrastive.apply(prompt)
        ]
        sums = torch.empty(len(rows))  # (N * 2,)
        # Under ZeRO-3 the fused head takes every model to be split, which this one is not.
        fused = has_plain_lm_head(self.model) and not is_deepspeed_zero3_enabled()
        for batch in longest_first([sum(map(len, row)) for row in rows], self._batch_size):
            with torch.no_grad():
                batch_sums, _ = sequence_logps(
                    self.model,
                    *zip(*(rows[index] for index in batch), strict=True),
                    pad_token_id=self.renderer.tokenizer.pad_token_id,
                    device=self.model.device,
                    fused=fused,
                )
            sums[batch] = batch_sums.cpu()
        return sums.view(-1, 2)
