"""The sampling loop: prompts prefilled once, rows that leave, the distribution of its draws."""

import pytest
import torch
from transformers import GenerationConfig

from cyclealign_trl.models import decoding
from cyclealign_trl.models.decoding import can_decode, most_likely_tokens, sample_tokens
from cyclealign_trl.models.transformers_backend import generate
from tests.conftest import make_model, make_tokenizer
from tests.models.test_architectures import OWN_ROWS, SHARED, tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33], [40]]
EOS = (1, 40, 41, 42)


def make_config(**changes):
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": list(EOS), "pad_token_id": 0}
    return GenerationConfig(**(settings | {"use_cache": True} | changes))


def run(model, config, prompts=PROMPTS, **arguments):
    """Return completions without padding."""
    completions = generate(model, prompts, config, torch.device("cpu"), **arguments)
    ends = [next((place + 1 for place, token in enumerate(ids) if token in EOS), len(ids)) for ids in completions]
    return [ids[:end] for ids, end in zip(completions, ends, strict=True)]


def count_tokens(model):
    """Return a list that every forward pass adds its number of rows and columns to."""
    shapes = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*SHARED, "bloom"])
def test_greedy_decoding_equals_generate(name, monkeypatch):
    model = tiny_model(name, 4.0)
    config = make_config()
    assert can_decode(model, config)
    completions = run(model, config)
    monkeypatch.setattr(decoding, "_EXACT", {model: False})
    assert completions == run(model, config)


@pytest.mark.parametrize("name", ["mamba", "lfm2"])
def test_architectures_with_another_cache_use_generate(name):
    model = tiny_model(name, **OWN_ROWS[name])
    assert not can_decode(model, make_config())
    assert len(run(model, make_config(do_sample=True, num_return_sequences=2))) == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"guidance_scale": 1.5},
        {"return_dict_in_generate": True},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_other_kinds_of_decoding_use_generate(changes):
    assert not can_decode(make_model(), make_config(**changes))


def test_a_loop_that_computes_something_else_is_not_used(monkeypatch):
    model = make_model()
    monkeypatch.setattr(decoding._ReservedLayer, "batch_select_indices", lambda self, indices: self._buffers.reverse())
    assert not can_decode(model, make_config())


def test_prompts_are_prefilled_once_and_ended_rows_leave():
    model = make_model()
    config = make_config(do_sample=True, num_return_sequences=8, top_k=0, eos_token_id=list(range(1, 50)))
    can_decode(model, config)
    shapes = count_tokens(model)
    generate(model, PROMPTS, config, torch.device("cpu"))
    assert shapes[0] == (4, 7)
    assert shapes[1][0] < 32  # about half of the rows end with their first token
    assert [rows for rows, _ in shapes[1:]] == sorted((rows for rows, _ in shapes[1:]), reverse=True)
    assert all(columns == 1 for _, columns in shapes[1:])


@pytest.mark.parametrize("repeats", [1, 5])
def test_seeds_reproduce_samples(repeats):
    model = make_model()
    config = make_config(do_sample=True, num_return_sequences=repeats, temperature=0.9, top_p=0.95)
    samples = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        samples.append(run(model, config))
    assert samples[0] == samples[1] != samples[2]


def test_the_check_uses_no_random_numbers():
    model = make_model()
    state = torch.get_rng_state()
    assert can_decode(model, make_config())
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_have_the_distribution_of_the_model():
    model = make_model()
    config = make_config(do_sample=True, num_return_sequences=4000, max_new_tokens=2, top_k=0, eos_token_id=[98])
    torch.manual_seed(0)
    with torch.no_grad():
        first = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
        second = torch.stack([
            model(torch.tensor([[*PROMPTS[0], token]])).logits[0, -1].softmax(-1) for token in range(99)
        ])  # fmt: skip
    completions = generate(model, [PROMPTS[0]] * 5, config, torch.device("cpu"))
    tokens = torch.tensor(completions)  # (20000, 2)
    counts = torch.bincount(tokens[:, 0], minlength=99) / len(tokens)
    assert (counts - first).abs().max() < 4 * (0.25 / len(tokens)) ** 0.5
    pairs = (first.unsqueeze(1) * second)[:98]  # (98, 99), the end of sequence has no second token
    counts = torch.bincount(tokens[:, 0] * 99 + tokens[:, 1], minlength=99 * 99).view(99, 99)[:98] / len(tokens)
    assert (counts - pairs).abs().max() < 4 * (0.25 / len(tokens)) ** 0.5


def test_draws_follow_the_scores_and_never_select_an_excluded_token():
    torch.manual_seed(0)
    scores = torch.randn(1, 50) * 2
    scores[0, [0, 7, 49]] = float("-inf")
    draws = sample_tokens(scores.expand(100_000, 50))
    counts = torch.bincount(draws, minlength=50) / len(draws)
    assert (counts - scores[0].softmax(-1)).abs().max() < 4 * (0.25 / len(draws)) ** 0.5
    assert counts[[0, 7, 49]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("point", [0.0, 1.0])
def test_the_ends_of_the_distribution_are_not_excluded_tokens(point, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **settings: torch.full(shape, point, **settings))
    scores = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    assert sample_tokens(scores).tolist() == [1 if point == 0 else 2]
    assert most_likely_tokens(scores).tolist() == [2]


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 6}, {"suppress_tokens": [5, 6]}],
    ids=str,
)
def test_processors_see_the_rows_that_are_left(settings, monkeypatch):
    model = make_model()
    completions = run(model, make_config(**settings))
    monkeypatch.setattr(decoding, "_EXACT", {model: False})
    assert completions == run(model, make_config(**settings))


def test_stop_strings_end_rows(monkeypatch):
    model, tokenizer = make_model(), make_tokenizer()
    (free,) = run(model, make_config(eos_token_id=[98]), PROMPTS[:1])
    text = tokenizer.decode(free[4:6])
    config = make_config(eos_token_id=[98], stop_strings=[text])
    completions = run(model, config, tokenizer=tokenizer)
    assert completions[0][:6] == free[:6]
    assert set(completions[0][6:]) <= {0}
    monkeypatch.setattr(decoding, "_EXACT", {model: False})
    assert completions == run(model, config, tokenizer=tokenizer)
    assert config.stop_strings == [text]


def test_an_adapter_is_applied(monkeypatch):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    plain = run(make_model(), make_config())
    model = peft.get_peft_model(make_model(), lora)
    completions = run(model, make_config())
    assert completions != plain
    monkeypatch.setattr(decoding, "_EXACT", {model.get_base_model(): False})
    assert completions == run(model, make_config())
