"""DLMA's self-reward (arXiv 2402.11907): what a model itself holds to be good, read off its own probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from .contrastive import ContrastivePrompts
from .pretrained import load_causal_lm, place, settle_special_tokens
from .trainer.collator import TextEncoder
from .trainer.logps import fuse_lm_head, has_plain_lm_head, sequence_logps
from .types import Prompt


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
        self.encoder = TextEncoder(
            tokenizer,
            settle_special_tokens(model, tokenizer),
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
        place(model, model.name_or_path or type(model).__name__, device)
        return cls(model, tokenizer, ContrastivePrompts.of(contrastive), **kwargs)

    def fits(self, prompt: Prompt) -> bool:
        """Whether both contrastive prompts are short enough. Cut on the left, they might lose what they ask for."""
        return not any(self.encoder.prompt(asking)[1] for asking in self.contrastive.apply(prompt))

    def logps(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """Summed log-probabilities of N completions under the positive and under the negative prompt.

        Returns:
            `(N, 2)` in float32, on the CPU. The score is the first less the second.
        """
        rows = [
            (self.encoder.prompt(asking)[0], self.encoder.completion(asking, completion)[0])
            for prompt, completion in zip(prompts, completions, strict=True)
            for asking in self.contrastive.apply(prompt)
        ]
        sums = torch.empty(len(rows))  # (N * 2,)
        # Texts of like length share a batch; the longest come first, so that memory runs out at once or never.
        by_length = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])), reverse=True)
        # Under ZeRO-3 the fused head takes every model to be split, which this one is not.
        fused = has_plain_lm_head(self.model) and not is_deepspeed_zero3_enabled()
        for start in range(0, len(rows), self._batch_size):
            batch = by_length[start : start + self._batch_size]
            with torch.no_grad():
                batch_sums, _ = sequence_logps(
                    self.model,
                    *zip(*(rows[index] for index in batch), strict=True),
                    pad_token_id=self.encoder.tokenizer.pad_token_id,
                    device=self.model.device,
                    fused=fused,
                )
            sums[batch] = batch_sums.cpu()
        return sums.view(-1, 2)
