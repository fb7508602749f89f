"""Self-reward of DLMA (arXiv 2402.11907): score completions with a language model's own log-probabilities.

A completion is scored under two contrastive prompts, one that asks for a good completion and one that asks for a bad
one. Its score is the difference of the two log-probabilities. `SelfReward` computes the log-probabilities, and
`SelfRewardRanker` ranks by them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import RankerError
from ..models.batches import longest_first
from ..models.choose_scoring import choose_scoring
from ..models.loading import check_positions, load_causal_lm, max_positions, place_model, sync_special_tokens
from ..models.logps import PLAIN, add_scoring, sequence_logps
from ..models.renderer import Renderer
from ..types import Prompt, RankingFailure, RankingRequest
from .base import Outcome, check_positive, rank_by_scores
from .contrastive_prompts import ContrastivePrompts

_Text = tuple[tuple[int, ...], tuple[int, ...]]  # token ids of a contrastive prompt and of a completion


class SelfReward:
    """Compute log-probabilities of completions under a positive and a negative prompt.

    Args:
        model: Name or path of a causal language model, or a loaded one, which is moved to `device`.
        tokenizer: Tokenizer of the model. `None` loads it by the model's name.
        contrastive: `"harmless"`, `"helpful"`, or custom `ContrastivePrompts`.
        batch_size: Number of texts in one forward pass.
        max_prompt_length: Longest contrastive prompt in tokens. `None` means what the model's positions leave. See
            `fits`.
        max_completion_length: Longest completion in tokens. Only this many tokens of a longer one are scored.
        chat_template_kwargs: Keyword arguments for the chat template of conversational prompts.
        device: Device of the model. `None` means this process's accelerator, or the CPU without one.
        model_init_kwargs: Keyword arguments for loading the model by name.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        contrastive: ContrastivePrompts | Mapping[str, str] | str,
        *,
        batch_size: int,
        max_prompt_length: int | None,
        max_completion_length: int,
        chat_template_kwargs: Mapping[str, Any] | None,
        device: str | torch.device | None,
        model_init_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.model, tokenizer = load_causal_lm(model, tokenizer, model_init_kwargs)
        self.name = self.model.name_or_path or type(self.model).__name__
        place_model(self.model, self.name, device)
        self.contrastive = ContrastivePrompts.of(contrastive)
        positions = max_positions(self.model)
        if max_prompt_length is None and positions is not None:
            check_positions(self.model, max_completion_length=max_completion_length)
            max_prompt_length = max(1, positions - max_completion_length)
        self.renderer = Renderer(
            tokenizer,
            sync_special_tokens(self.model, tokenizer, chat_template_kwargs),
            max_prompt_length,
            max_completion_length,
            chat_template_kwargs or {},
        )
        self._batch_size = batch_size
        add_scoring(self.model)
        # Under ZeRO-3, the fused head expects the weights of every model to be sharded, and this model's are not.
        self._scoring = PLAIN
        if not is_deepspeed_zero3_enabled():
            self._scoring = choose_scoring(
                self.model, max_prompt_length=max_prompt_length, max_completion_length=max_completion_length
            )

    def fits(self, prompt: Prompt, tools: Any = None) -> bool:
        """Return whether both contrastive prompts are short enough.

        A longer prompt would be truncated on the left, and could lose its contrastive description.
        """
        return not any(self.renderer.prompt(version, tools)[1] for version in self.contrastive.apply(prompt))

    def logps(
        self, prompts: Sequence[Prompt], completions: Sequence[str], tools: Sequence[Any] | None = None
    ) -> Tensor:
        """Compute the summed log-probabilities of N completions.

        Args:
            prompts: Prompt of each completion.
            completions: Completions to score.
            tools: Tools of each prompt, for the chat template.

        Returns:
            Log-probabilities under the positive and under the negative prompt, `(N, 2)` in float32 on the CPU. The
            self-reward is the first minus the second.
        """
        tools = [None] * len(prompts) if tools is None else tools
        texts = [
            (
                tuple(self.renderer.prompt(version, own)[0]),
                tuple(self.renderer.completion(version, completion, own)[0]),
            )
            for prompt, completion, own in zip(prompts, completions, tools, strict=True)
            for version in self.contrastive.apply(prompt)
        ]
        scored: dict[_Text, float] = {}
        for batch in self._batches(texts):
            with torch.no_grad():
                sums, _ = sequence_logps(
                    self.model,
                    *zip(*batch, strict=True),
                    pad_token_id=self.renderer.tokenizer.pad_token_id,
                    device=self.model.device,
                    scoring=self._scoring,
                )
            scored.update(zip(batch, sums.tolist(), strict=True))
        return torch.tensor([scored[text] for text in texts]).view(-1, 2)

    def _batches(self, texts: Sequence[_Text]) -> Iterator[list[_Text]]:
        """Yield batches of distinct texts, those of one prompt together, so that the prompt is computed once."""
        by_prompt: dict[tuple[int, ...], list[_Text]] = {}
        for text in dict.fromkeys(texts):
            by_prompt.setdefault(text[0], []).append(text)
        size = self._batch_size
        groups = [group[start : start + size] for group in by_prompt.values() for start in range(0, len(group), size)]
        lengths = [max(len(prompt) + len(completion) for prompt, completion in group) for group in groups]
        groups_per_batch = max(1, size // max(map(len, groups), default=1))
        for batch in longest_first(lengths, groups_per_batch):
            yield [text for number in batch for text in groups[number]]


class SelfRewardRanker:
    """Rank completions by the self-reward of a causal language model, as in DLMA.

    The score of a completion is its summed log-probability under the positive prompt minus the one under the negative
    prompt. Demonstrations and metadata are ignored. Completions with equal scores share a rank.

    The model can be the policy itself. If it is given by name, the ranker loads a copy that does not change while the
    policy learns, as in the paper. If it is the object that is being trained, the ranker uses the current weights.
    This requires training without dropout, and without sharding the weights.

    A request becomes `RankingFailure("too_long")` if its prompt is too long, and `RankingFailure("no_score")` if a
    score is not finite. Calls of `rank` from several threads run one after another. The ranker has no `fingerprint`,
    so its rankings are not cached: ranking again is free, and the weights behind a name can change.

    Args:
        model: Name or path of a causal language model, or a loaded one, which is moved to `device`.
        tokenizer: Tokenizer of the model. `None` loads it by the model's name.
        contrastive: Descriptions of good and bad completions: `"harmless"`, `"helpful"`, or custom
            `ContrastivePrompts` (in YAML, a mapping of their arguments).
        batch_size: Number of texts in one forward pass. Each completion counts as two texts.
        max_prompt_length: Longest contrastive prompt in tokens. `None` means what the model's positions leave.
        max_completion_length: Longest completion in tokens. Only this many tokens of a longer one are scored.
        chat_template_kwargs: Keyword arguments for the chat template of conversational prompts.
        device: Device of the model. `None` means this process's accelerator, or the CPU without one. A model loaded
            with a `device_map` is not moved.
        model_init_kwargs: Keyword arguments for loading the model by name (`dtype`, `revision`, ...).

    Raises:
        ValueError: If an argument is out of range, or if arguments contradict each other.

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
        check_positive(
            batch_size=batch_size, max_prompt_length=max_prompt_length, max_completion_length=max_completion_length
        )
        self._self_reward = SelfReward(
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
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.name!r}, contrastive={self._self_reward.contrastive})"

    @property
    def name(self) -> str:
        """Name of the model."""
        return self._self_reward.name

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Rank the completions of each request. See `Ranker.rank`.

        Raises:
            RankerError: If the model is being trained with dropout.
        """
        model = self._self_reward.model
        if model.training and any(map(_uses_dropout, model.modules())):
            raise RankerError(
                f"{self.name} is being trained with dropout, which makes its self-reward random. Train without "
                "dropout, or pass the model's name to load a copy."
            )
        with self._lock:
            fits = [self._self_reward.fits(request.prompt, request.metadata.get("tools")) for request in requests]
            fitting = [request for request, fitted in zip(requests, fits, strict=True) if fitted]
            logps = self._self_reward.logps(
                [request.prompt for request in fitting for _ in request.completions],
                [completion for request in fitting for completion in request.completions],
                [request.metadata.get("tools") for request in fitting for _ in request.completions],
            )
        scores = iter((logps[:, 0] - logps[:, 1]).tolist())
        limit = self._self_reward.renderer.max_prompt_length
        too_long = RankingFailure("too_long", f"a contrastive prompt has more than max_prompt_length={limit} tokens")
        return [
            rank_by_scores([next(scores) for _ in request.completions]) if fitted else too_long
            for request, fitted in zip(requests, fits, strict=True)
        ]


def _uses_dropout(module: torch.nn.Module) -> bool:
    # Attention applies its dropout without a `Dropout` module.
    return bool(module.p if isinstance(module, torch.nn.Dropout) else getattr(module, "attention_dropout", 0))
