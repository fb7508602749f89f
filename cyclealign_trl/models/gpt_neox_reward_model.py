"""The architecture of Open-Assistant's reward models on Pythia, which transformers does not have.

`AutoModelForSequenceClassification` loads checkpoints with the model type `gpt_neox_reward_model` once this module is
imported, without code from their repositories. The CycleAlign paper evaluates with one of them,
`OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1`.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, GPTNeoXConfig, GPTNeoXModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXPreTrainedModel

OPEN_ASSISTANT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|prompter|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>"
    "{% else %}{{ raise_exception('the layout has user and assistant turns, no ' + message['role']) }}{% endif %}"
    "{{ message['content'] }}<|endoftext|>"
    "{% endfor %}"
)
"""Chat template of the Open-Assistant reward models (`OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1`, ...)."""


@strict
class GPTNeoXRewardModelConfig(GPTNeoXConfig):
    """Configuration of `GPTNeoXRewardModel`.

    Args:
        pooling: Hidden state that is scored: `"last"`, of the last token, or `"mean"`, over all tokens.
    """

    model_type = "gpt_neox_reward_model"

    pooling: str | None = "last"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_labels = 1

    def validate_architecture(self) -> None:
        """Check the fields; transformers calls this at construction."""
        super().validate_architecture()
        if self.pooling not in ("last", "mean", None):
            raise ValueError(f"pooling must be 'last' or 'mean', got {self.pooling!r}.")


class GPTNeoXRewardModel(GPTNeoXPreTrainedModel):
    """GPT-NeoX with a linear head, which scores a text by its last hidden state or by the mean of all."""

    config_class = GPTNeoXRewardModelConfig
    config: GPTNeoXRewardModelConfig
    # Buffers that earlier versions of transformers saved
    _keys_to_ignore_on_load_unexpected = (r"attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$")

    def __init__(self, config: GPTNeoXRewardModelConfig) -> None:
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """Score texts.

        Args:
            input_ids: `(B, L)`.
            attention_mask: `(B, L)`, 0 where a text is padded, on either side.
            kwargs: Further arguments of `GPTNeoXModel`.

        Returns:
            `logits`, `(B, 1)`.
        """
        hidden = self.gpt_neox(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state  # (B, L, H)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.config.pooling == "mean":
            weights = mask.unsqueeze(-1).to(hidden.dtype)  # (B, L, 1)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        else:
            positions = torch.arange(mask.shape[1], device=mask.device)  # (L,)
            last = (positions * mask).argmax(dim=1)  # (B,)
            pooled = hidden[torch.arange(len(last), device=last.device), last]
        return SequenceClassifierOutput(logits=self.out_proj(pooled))


AutoConfig.register(GPTNeoXRewardModelConfig.model_type, GPTNeoXRewardModelConfig, exist_ok=True)
AutoModelForSequenceClassification.register(GPTNeoXRewardModelConfig, GPTNeoXRewardModel, exist_ok=True)
