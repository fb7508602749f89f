"""Build what is measured: models of random weights, groups of ranked token ids, tokenizers and prompts.

Nothing is downloaded. Random weights take the same time and memory as trained ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .measuring import NotMeasured

PAD, EOS, UNKNOWN, FIRST_WORD = 0, 1, 2, 3
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Qwen3 model. The output head is tied to the embeddings if `tied` is set."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = True

    @property
    def body_weights(self) -> int:
        """Weights of the linear layers, without embeddings and output head."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


MODELS = {
    "tiny": ModelShape(512, 64, 128, 2, 4, 2, 16),
    "8k": ModelShape(8192, 256, 768, 4, 4, 2, 64),
    "32k": ModelShape(32_000, 256, 768, 4, 4, 2, 64),
    "151k": ModelShape(151_936, 256, 768, 4, 4, 2, 64),
    "Qwen3-0.6B": ModelShape(151_936, 1024, 3072, 28, 16, 8, 128),
    "Qwen3-1.7B": ModelShape(151_936, 2048, 6144, 28, 16, 8, 128),
    "Qwen3-8B": ModelShape(151_936, 4096, 12_288, 36, 32, 8, 128, tied=False),
}
"""Shapes by name. The first four are for CPUs, the others have the sizes of published models."""


def build_model(name: str, device: str) -> Any:  # transformers.Qwen3ForCausalLM
    """Return a model of random weights: float32 on the CPU, bfloat16 on a GPU."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    shape = MODELS[name]
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model


def lora_config() -> Any:  # peft.LoraConfig
    """Return LoRA of rank 16 on all linear layers of the body. The output head stays frozen.

    Raises:
        NotMeasured: If peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise NotMeasured("peft is not installed") from error
    return LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=LORA_MODULES)


def add_lora(model: Any) -> None:
    """Put LoRA layers into a model and freeze all other weights, without a wrapper around the model."""
    config = lora_config()
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt with K responses, best first.

    Args:
        prompt: Token ids `(P,)`.
        responses: Token ids of each response `(C,)`.
    """

    prompt: Tensor
    responses: Sequence[Tensor]

    @property
    def n(self) -> int:
        """Number of responses, K."""
        return len(self.responses)

    @property
    def rewards(self) -> Tensor:
        """Rewards `(K,)` that fall by 1 from each response to the next."""
        return torch.arange(self.n, 0, -1, dtype=torch.float32, device=self.prompt.device)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each response `(K,)`."""
        return torch.tensor([len(response) for response in self.responses], device=self.prompt.device)

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids, attention mask, and which tokens are of a response, all `(K, L)`, padded on the right."""
        rows = [torch.cat([self.prompt, response]) for response in self.responses]
        ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
        positions = torch.arange(ids.shape[1], device=ids.device)
        present = positions < (len(self.prompt) + self.lengths)[:, None]
        return ids, present.long(), present & (positions >= len(self.prompt))


def build_group(vocabulary: int, prompt: int, responses: Sequence[int], device: str) -> Group:
    """Return a group of random token ids with the given numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randint(FIRST_WORD, vocabulary, (length,), generator=generator).to(device)
        for length in (prompt, *responses)
    ]
    return Group(parts[0], parts[1:])


def build_tokenizer(vocabulary: int) -> Any:  # transformers.PreTrainedTokenizerFast
    """Return a tokenizer whose token `i` is the word `wi`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token=f"w{UNKNOWN}"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=f"w{PAD}",
        eos_token=f"w{EOS}",
        unk_token=f"w{UNKNOWN}",
        padding_side="left",
    )


def build_prompts(count: int, length: int) -> list[str]:
    """Return different prompts of `length` tokens."""
    return [" ".join(f"w{FIRST_WORD + (row * 7 + index) % 500}" for index in range(length)) for row in range(count)]
