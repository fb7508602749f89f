"""Policy of the demo: a tiny Llama with a word-level tokenizer, pretrained from scratch in half a minute.

The policy imitates its corpus, so before alignment its completions are helpful, curt, off-topic or rude at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .corpus import Dialogue, dialogues, vocabulary

_LEARNING_RATE = 5e-3
_PAD, _UNK, _END, _USER, _ASSISTANT = "<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words and punctuation marks of `texts`.

    A token includes the space before its word (as in GPT-2), so that decoding restores the encoded text exactly. The
    chat template renders a dialogue as `<|user|>question<|assistant|>completion<|end|>`.
    """
    special_tokens = [_PAD, _UNK, _END, _USER, _ASSISTANT]
    tokenizer = Tokenizer(WordLevel(unk_token=_UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, WordLevelTrainer(special_tokens=special_tokens, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNK,
        eos_token=_END,
        extra_special_tokens=[_USER, _ASSISTANT],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def pretrain_policy(
    seed: int = 0, num_steps: int = 800, batch_size: int = 32, progress: bool = True
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Pretrain the policy of the demo on `num_steps * batch_size` dialogues of the corpus.

    Args:
        seed: Seed of the corpus and of the weights.
        num_steps: Number of optimiser steps.
        batch_size: Number of dialogues per step.
        progress: Whether to show a progress bar.

    Returns:
        The model (fp32, in evaluation mode, on the CPU) and its tokenizer.
    """
    tokenizer = build_tokenizer(vocabulary())
    corpus = dialogues(num_steps * batch_size, seed)
    return pretrain(tokenizer, corpus, seed, batch_size, progress), tokenizer


def pretrain(
    tokenizer: PreTrainedTokenizerFast,
    corpus: Sequence[Dialogue],
    seed: int,
    batch_size: int,
    progress: bool = True,
) -> LlamaForCausalLM:
    """Train a tiny Llama from scratch on dialogues, once over the corpus, without changing the global random state.

    Args:
        tokenizer: Tokenizer from `build_tokenizer`.
        corpus: Dialogues. An incomplete last batch is not used.
        seed: Seed of the weights.
        batch_size: Number of dialogues per step.
        progress: Whether to show a progress bar.
    """
    model = init_llama(tokenizer, seed)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    num_steps = len(corpus) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_LEARNING_RATE, total_steps=num_steps, pct_start=0.1
    )
    model.train()
    with tqdm(range(num_steps), desc="Pretraining the policy", disable=not progress, leave=False) as steps:
        for step in steps:
            batch = _encode(tokenizer, corpus[step * batch_size : (step + 1) * batch_size])
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                steps.set_postfix(loss=f"{loss.item():.2f}")
    return model.eval()


def init_llama(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """Create a Llama with a few hundred thousand random weights, without changing the global random state."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.06,  # the default of 0.02 suits wider layers; with it, this model needs more steps
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _encode(tokenizer: PreTrainedTokenizerFast, batch: Sequence[Dialogue]) -> dict[str, torch.Tensor]:
    """Return token ids, attention mask and labels of whole dialogues, each `(B, T)`."""
    messages = [
        [{"role": "user", "content": dialogue.question}, {"role": "assistant", "content": dialogue.completion}]
        for dialogue in batch
    ]
    encoded = dict(tokenizer.apply_chat_template(messages, padding=True, return_dict=True, return_tensors="pt"))
    return encoded | {"labels": encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)}
