"""The demo's white box: a word-level tokenizer and a tiny Llama, pretrained from scratch in half a minute.

The policy imitates its corpus, so it answers with a helpful, a curt, an off-topic or a rude reply as chance has it:
what a policy should look like before it is aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

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

from .corpus import Dialogue, dialogues, sentences

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
    """A tokenizer whose tokens are the words and punctuation marks of `texts`.

    A word carries the space before it (as in GPT-2), so that decoding gives back exactly the text that was encoded.
    A dialogue reads `<|user|>question<|assistant|>reply<|end|>`.
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
    seed: int = 0,
    num_steps: int = 800,
    batch_size: int = 32,
    progress: bool = True,
    corpus: Callable[[int, int], list[Dialogue]] = dialogues,
    vocabulary: Callable[[], list[str]] = sentences,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Pretrains the demo's policy: next-token prediction on `num_steps * batch_size` fresh dialogues.

    Args:
        seed: Seed of the corpus and of the weights. The global random state is left as it was.
        num_steps: Optimiser steps.
        batch_size: Dialogues per step.
        progress: Whether to show a progress bar.
        corpus: Draws a number of dialogues by a seed.
        vocabulary: Every sentence that they can be made of.

    Returns:
        The model (fp32, in evaluation mode, on the CPU) and its tokenizer.
    """
    drawn = corpus(num_steps * batch_size, seed)
    # Each sentence twice, as its first word differs at the start of a text and within it.
    tokenizer = build_tokenizer(f"{sentence} {sentence}" for sentence in vocabulary())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama_config(tokenizer))
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_LEARNING_RATE, total_steps=num_steps, pct_start=0.1
    )
    model.train()
    with tqdm(range(num_steps), desc="Pretraining the policy", disable=not progress, leave=False) as steps:
        for step in steps:
            batch = _encode(tokenizer, drawn[step * batch_size : (step + 1) * batch_size])
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                steps.set_postfix(loss=f"{loss.item():.2f}")
    return model.eval(), tokenizer


def llama_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """A Llama of a few hundred thousand weights."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.06,  # the usual 0.02 is meant for wide layers: here it costs steps
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _encode(tokenizer: PreTrainedTokenizerFast, batch: list[Dialogue]) -> dict[str, torch.Tensor]:
    """Token ids, attention mask and labels of whole dialogues, each (B, T)."""
    messages = [
        [{"role": "user", "content": dialogue.question}, {"role": "assistant", "content": dialogue.reply}]
        for dialogue in batch
    ]
    encoded = dict(tokenizer.apply_chat_template(messages, padding=True, return_dict=True, return_tensors="pt"))
    return encoded | {"labels": encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)}
