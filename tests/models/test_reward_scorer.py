"""Reward scores, and Open-Assistant's architecture against the definition of GPT-NeoX, written out."""

import json
import logging
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import gelu, layer_norm, linear

from cyclealign_trl import RewardScorer
from tests.conftest import make_tokenizer
from tests.rankers.test_reward_model import make_plain_tokenizer, make_reward_model, score_alone

LAYERS, HEADS, WIDTH, VOCABULARY = 2, 4, 32, 104
USER = {"role": "user", "content": "Hi"}
PROMPTS = [[USER], [USER, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Why?"}]]
COMPLETIONS = ["Yo", "Because <|assistant|> is not markup here."]


def make_weights():
    """Return weights as the published checkpoints name them, with the buffers that old versions saved."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {"gpt_neox.embed_in.weight": random(VOCABULARY, WIDTH)}
    for index in range(LAYERS):
        layer = f"gpt_neox.layers.{index}."
        for name, shape in (
            ("attention.query_key_value", (3 * WIDTH, WIDTH)),
            ("attention.dense", (WIDTH, WIDTH)),
            ("mlp.dense_h_to_4h", (4 * WIDTH, WIDTH)),
            ("mlp.dense_4h_to_h", (WIDTH, 4 * WIDTH)),
        ):
            weights[f"{layer}{name}.weight"], weights[f"{layer}{name}.bias"] = random(*shape), random(shape[0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{name}.weight"], weights[f"{layer}{name}.bias"] = 1 + random(WIDTH), random(WIDTH)
        weights[f"{layer}attention.bias"] = torch.ones(1, 1, 64, 64).tril()
        weights[f"{layer}attention.masked_bias"] = torch.tensor(-1e9)
        weights[f"{layer}attention.rotary_emb.inv_freq"] = torch.ones(1)
    weights["gpt_neox.final_layer_norm.weight"] = 1 + random(WIDTH)
    weights["gpt_neox.final_layer_norm.bias"] = random(WIDTH)
    weights["out_proj.weight"], weights["out_proj.bias"] = random(1, WIDTH), random(1)
    return weights


def make_open_assistant_tokenizer():
    """Build a tokenizer with the markup of Open-Assistant as special tokens."""
    tokenizer = make_plain_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|prompter|>", "<|assistant|>", "<|endoftext|>"]})
    return tokenizer


@pytest.fixture(params=["last", "mean"])
def checkpoint(request, tmp_path):
    """Folder in the layout of `OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1`, and its pooling."""
    config = {
        "architectures": ["GPTNeoXRewardModel"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": 4 * WIDTH,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 128,
        "model_type": "gpt_neox_reward_model",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pooling": request.param,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.28.0.dev0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": VOCABULARY,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(make_weights(), tmp_path / "model.safetensors", {"format": "pt"})
    make_open_assistant_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path), request.param


def rotated(x, rotary=2):
    """Rotate the first dimensions of queries or keys `(heads, L, 8)` by their positions."""
    positions = torch.arange(x.shape[1], dtype=torch.float64)
    frequencies = 10000.0 ** -(torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    first, rest = x[..., :rotary], x[..., rotary:]
    half = torch.cat([-first[..., rotary // 2 :], first[..., : rotary // 2]], -1)
    return torch.cat([first * angles.cos() + half * angles.sin(), rest], -1)


def score_by_definition(ids, pooling):
    """Score one text in float64 with the parallel residual of GPT-NeoX."""
    weights = {name: value.double() for name, value in make_weights().items()}

    def apply(function, name, x, *arguments):
        return function(x, *arguments, weights[f"{name}.weight"], weights[f"{name}.bias"])

    hidden, width = weights["gpt_neox.embed_in.weight"][ids], WIDTH // HEADS
    for index in range(LAYERS):
        layer = f"gpt_neox.layers.{index}."
        normal = apply(layer_norm, f"{layer}input_layernorm", hidden, (WIDTH,))
        merged = apply(linear, f"{layer}attention.query_key_value", normal).view(len(ids), HEADS, 3, width)
        query, key, value = (merged[:, :, part].transpose(0, 1) for part in range(3))
        logits = rotated(query) @ rotated(key).transpose(1, 2) / math.sqrt(width)
        logits = logits.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -math.inf)
        attended = (logits.softmax(-1) @ value).transpose(0, 1).reshape(len(ids), WIDTH)
        second = apply(layer_norm, f"{layer}post_attention_layernorm", hidden, (WIDTH,))
        expanded = gelu(apply(linear, f"{layer}mlp.dense_h_to_4h", second))
        hidden = (
            hidden
            + apply(linear, f"{layer}attention.dense", attended)
            + apply(linear, f"{layer}mlp.dense_4h_to_h", expanded)
        )
    hidden = apply(layer_norm, "gpt_neox.final_layer_norm", hidden, (WIDTH,))
    return apply(linear, "out_proj", hidden[-1] if pooling == "last" else hidden.mean(0)).item()


def test_open_assistant_checkpoints_are_scored_as_defined(checkpoint, caplog):
    path, pooling = checkpoint
    tokenizer = make_open_assistant_tokenizer()
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<|prompter|>", "<|assistant|>", "<|endoftext|>"])

    def turn(start, text):
        return [start, *(tokenizer.get_vocab()[letter] for letter in text), end]

    texts = [
        turn(user, "Hi") + turn(assistant, COMPLETIONS[0]),
        turn(user, "Hi") + turn(assistant, "Hello.") + turn(user, "Why?") + turn(assistant, COMPLETIONS[1]),
    ]
    with caplog.at_level(logging.WARNING):
        scorer = RewardScorer(path, device="cpu")
        scores = scorer.score(PROMPTS, COMPLETIONS)
    assert scores == pytest.approx([score_by_definition(ids, pooling) for ids in texts], abs=2e-4)
    assert abs(scores[0] - scores[1]) > 0.05
    assert [record for record in caplog.records if "cyclealign" in record.name] == []
    alone = [
        RewardScorer(path, device="cpu", batch_size=1).score([p], [c])[0]
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert scores == pytest.approx(alone, abs=1e-4)


def test_a_head_that_does_not_exist_raises(checkpoint, tmp_path):
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pooling": "max"}))
    with pytest.raises(Exception, match="pooling must be 'last' or 'mean', got 'max'"):
        RewardScorer(str(tmp_path), device="cpu")


def test_scores_are_those_of_the_model_in_any_batch():
    prompts, completions = ["Why? ", "Who? ", "Q"], ["Because.", "A friend of a friend of mine", "!"]
    expected = [
        score_alone(make_reward_model(), prompt + text) for prompt, text in zip(prompts, completions, strict=True)
    ]
    for batch_size in (1, 2, 16):
        scorer = RewardScorer(make_reward_model(), make_plain_tokenizer(), batch_size=batch_size, device="cpu")
        assert scorer.score(prompts, completions) == pytest.approx(expected, abs=1e-4)
    assert scorer.score([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        scorer.score(prompts, completions[:2])
    with pytest.raises(ValueError, match="no chat template"):
        scorer.score([[USER]], ["Yo"])
    assert repr(scorer) == "RewardScorer(model='LlamaForSequenceClassification', device='cpu')"
    assert RewardScorer(make_reward_model(), make_tokenizer(), device="cpu").score([[USER]], ["Yo"]) == pytest.approx(
        [score_alone(make_reward_model(), "<user>Hi</s>\n<assistant>Yo</s>\n")], abs=1e-4
    )
