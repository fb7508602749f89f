"""Small tokenizers of the usual kinds, trained on the spot, and chat templates of the usual kinds."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Once upon a time there was a little girl. She went to the park and she saw a big dog.",
    "The little boy said: Hello! How are you? The tag closes the list, and 3 + 4 = 7.",
    "Human: Where is the cat? Assistant: It sits on the mat, under the table. Answer: yes\n\nNo, thanks.",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]


def byte_level(add_prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def metaspace_bpe(prepend_scheme="always"):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.train_from_iterator(
        [*TEXTS, *map(chr, range(33, 127)), "\n"],
        trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, show_progress=False),
    )
    return tokenizer


def legacy_llama():
    """Build a tokenizer with the normalizer of LLaMA, which prepends a space to each piece of text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training alone
    tokenizer.train_from_iterator(
        [*TEXTS, *map(chr, range(33, 127)), "\n"],
        trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, show_progress=False),
    )
    tokenizer.pre_tokenizer = None
    return tokenizer


def unigram(prepend_scheme="always"):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.train_from_iterator(
        [*TEXTS, *map(chr, range(33, 127)), "\n"],
        trainers.UnigramTrainer(vocab_size=250, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    return tokenizer


TOKENIZERS = {
    "byte-level BPE": byte_level,
    "byte-level BPE with a prefix space": lambda: byte_level(add_prefix_space=True),
    "metaspace BPE": metaspace_bpe,
    "metaspace BPE, first piece only": lambda: metaspace_bpe("first"),
    "LLaMA's normalizer": legacy_llama,
    "Unigram": unigram,
    "Unigram, first piece only": lambda: unigram("first"),
}
POST_PROCESSORS = {"nothing": "$A", "BOS": "<s> $A", "EOS": "$A </s>", "BOS and EOS": "<s> $A </s>"}


@cache
def _definition(kind):
    return TOKENIZERS[kind]().to_str()


def make(kind, adds="nothing", chat_template=None, **special):
    """Build a tokenizer of a kind, whose post-processor adds tokens to each text."""
    backend = Tokenizer.from_str(_definition(kind))
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=POST_PROCESSORS[adds], special_tokens=ids)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **tokens)


def _turns(user, assistant, generation, system=None, start=""):
    system = system or "{{ raise_exception('System role not supported') }}"
    return (
        start + "{% for m in messages %}{% if m['role'] == 'system' %}" + system
        + "{% elif m['role'] == 'user' %}" + user
        + "{% else %}" + assistant + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + generation + "{% endif %}"
    )  # fmt: skip


def _chatml(content="m['content']", generation="<|im_start|>assistant\n", end="<|im_end|>\n"):
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ " + content + " }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}" + generation + "{% endif %}"
    )


_VISIBLE = "(m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'])"
TEMPLATES = {
    "ChatML": _chatml(),
    "ChatML of parts": _chatml("m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join"),
    "ChatML with a system message": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('No system') }}"
    "{% endif %}" + _chatml(),
    "ChatML that strips": _chatml("m['content'].strip()"),
    "ChatML that strips thinking": _chatml(_VISIBLE),
    "ChatML that opens with thinking": _chatml(generation="<|im_start|>assistant\n<think>\n"),
    "Llama-2": _turns(
        "{{ bos_token }}[INST] {{ m['content'].strip() }} [/INST]",
        " {{ m['content'].strip() }} {{ eos_token }}",
        "",
    ),
    "Llama-2 that strips nothing": _turns(
        "{{ bos_token }}[INST] {{ m['content'] }} [/INST]", " {{ m['content'] }} {{ eos_token }}", ""
    ),
    "Mistral": _turns("[INST]{{ m['content'] }}[/INST]", "{{ m['content'] }}{{ eos_token }}", "", start="<s>"),
    "Zephyr": _turns(
        "<|user|>\n{{ m['content'] }}</s>\n", "<|assistant|>\n{{ m['content'] }}</s>\n", "<|assistant|>\n",
        system="<|system|>\n{{ m['content'] }}</s>\n",
    ),
    "Vicuna": _turns("USER: {{ m['content'] }} ", "ASSISTANT: {{ m['content'] }}</s>", "ASSISTANT:",
                     system="{{ m['content'] }} "),
}  # fmt: skip
