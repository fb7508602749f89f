"""Scores of completions equal the model's plain forward pass, for every kind of output head and layer."""

import logging

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cyclealign_trl.models import choose_scoring as module
from cyclealign_trl.models.choose_scoring import choose_scoring
from cyclealign_trl.models.logps import add_scoring, sequence_logps
from cyclealign_trl.models.renderer import Renderer
from tests.conftest import make_tokenizer

SHARED = [
    "apertus", "arcee", "biogpt", "bitnet", "codegen", "cohere", "cohere2", "ctrl", "deepseek_v2", "deepseek_v3",
    "diffllama", "doge", "ernie4_5", "exaone4", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium",
    "hunyuan_v1_dense", "jetmoe", "llama", "ministral", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3",
    "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
    "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm",
]  # fmt: skip
"""Architectures with a plain head whose layers depend on attention mask and positions alone."""

OWN_ROWS = {
    "bloom": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8}, "jamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "mamba": {}, "minimax": {}, "mpt": {}, "openai-gpt": {},
    "qwen3_5_text": {}, "recurrent_gemma": {}, "rwkv": {},
}  # fmt: skip
"""Architectures with a recurrent state, a convolution, a bias by distance, or a window over the row."""

PLAIN_HEAD = {
    "bert": True, "big_bird": True, "electra": True, "llama4_text": True, "megatron-bert": True,
    "modernbert-decoder": True, "rembert": True, "roberta": False, "roformer": False,
}  # fmt: skip
"""Architectures that transform hidden states before the head or return other outputs. True if prompts are shared."""

CASES = [
    *((name, {}, True, True) for name in SHARED),
    *((name, changes, True, False) for name, changes in OWN_ROWS.items()),
    *((name, {}, False, shared) for name, shared in PLAIN_HEAD.items()),
]

SETTINGS = {
    "vocab_size": 99, "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 48, "ffn_dim": 48,
    "n_inner": 48, "max_position_embeddings": 64, "n_positions": 64, "rotary_dim": 8, "is_decoder": True,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "state_size": 8, "mamba_d_state": 8, "mamba_expand": 2, "time_step_rank": 4, "lru_width": 32,
    "sliding_window": 16, "attention_window_size": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip

PROMPTS = ["Say hi:", [{"role": "user", "content": "Hi"}], "Tell me a longer story, with a friend:"]
COMPLETIONS = [[" hello", " hi, you", " yo"], ["Hello", "Good day"], [" one", " two of them", " three"]]


def tiny_model(model_type, scale=1.0, **changes):
    config_class = CONFIG_MAPPING[model_type]
    settings = {name: value for name, value in SETTINGS.items() if hasattr(config_class(), name)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**(settings | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def plain_logps(model, prompt_ids, completion_ids):
    """Return the sums of log-probabilities, row by row, without padding."""
    sums = []
    with torch.no_grad():
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
            token_logps = logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
            sums.append(token_logps.gather(1, torch.tensor(completion).unsqueeze(1)).sum())
    return torch.stack(sums)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(("model_type", "changes", "fused", "shared"), CASES, ids=[case[0] for case in CASES])
def test_scores_equal_the_plain_forward_pass(model_type, changes, fused, shared, scale, caplog):
    model = tiny_model(model_type, scale, **changes)
    renderer = Renderer(make_tokenizer(), (1,), 40, 16)
    texts = [(prompt, text) for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True) for text in group]
    prompt_ids = [renderer.prompt(prompt)[0] for prompt, _ in texts]
    completion_ids = [renderer.completion(*pair)[0] for pair in texts]
    expected = plain_logps(model, prompt_ids, completion_ids)

    add_scoring(model)
    with caplog.at_level(logging.INFO):
        scoring = choose_scoring(model, num_completions=3, max_prompt_length=40, max_completion_length=16)
    assert (scoring.fused, scoring.shared is not None) == (fused, shared)
    records = [record for record in caplog.records if record.name == module.__name__]
    assert [record.levelname for record in records] == ["WARNING"] * (not fused) + ["INFO"]
    assert bool(scoring.reason) is not (fused and shared)
    with torch.no_grad():
        sums, _ = sequence_logps(
            model, prompt_ids, completion_ids, pad_token_id=0, device=torch.device("cpu"), scoring=scoring
        )
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)


def test_the_check_leaves_weights_and_mode_as_they_are():
    model = tiny_model("gemma2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_scoring(model)
    assert choose_scoring(model).fused
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("positions", "lengths"), [(64, {}), (64, {"max_prompt_length": 40}), (20, {})])
def test_texts_of_unknown_length_fit_into_the_positions(positions, lengths):
    model = tiny_model("gpt2", n_positions=positions)
    add_scoring(model)
    assert choose_scoring(model, **lengths).shared is not None


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("window", [64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_over_the_row_is_found_if_only_the_longest_texts_exceed_it(window, dtype):
    settings = {"attention_types": [[["global", "local"], 1]], "window_size": window, "max_position_embeddings": 512}
    model = tiny_model("gpt_neo", **settings).to(dtype)
    add_scoring(model)
    lengths = {"max_prompt_length": window * 9 // 10, "max_completion_length": window * 4 // 10}
    assert choose_scoring(model, num_completions=4, **lengths).shared is None


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral", *OWN_ROWS])
def test_low_precision_decides_alike(name):
    model = tiny_model(name, **OWN_ROWS.get(name, {})).to(torch.bfloat16)
    add_scoring(model)
    scoring = choose_scoring(model, num_completions=3, max_prompt_length=40, max_completion_length=16)
    assert (scoring.shared is not None) is (name not in OWN_ROWS)
