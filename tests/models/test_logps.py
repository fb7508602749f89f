"""Log-probabilities of completions in every layout and with every head, against a direct computation."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cyclealign_trl.models import logps as module
from cyclealign_trl.models.choose_scoring import choose_scoring
from cyclealign_trl.models.logps import PLAIN, Scoring, add_scoring, sequence_logps
from cyclealign_trl.models.text_rows import SharedRows
from tests.conftest import make_model

PROMPTS = [[40, 41, 42], [40, 41, 42], [40, 41, 42], [50], [60, 61], [40, 41, 42], [70, 71, 72, 73]]
COMPLETIONS = [[43, 44, 1], [45], [43, 44, 1], [51, 52, 53, 54, 1], [62], [46, 47], []]
"""Completions of one prompt side by side and apart, equal texts, and an absent one."""

HEADS = {"fused": True, "plain": False}
LAYOUTS = ["padded", "shared"]
WAYS = list(itertools.product(HEADS, LAYOUTS))


def make_scoring(model, head="fused", layout="shared"):
    return Scoring(HEADS[head], SharedRows.of(model.config) if layout == "shared" else None)


def make_exact_model(**changes):
    """Build a GPT-2 in float64. Unlike a Llama, it computes no part of itself in float32."""
    torch.manual_seed(0)
    settings = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    config = GPT2Config(**settings, bos_token_id=None, eos_token_id=1, pad_token_id=0, **changes)
    return GPT2LMHeadModel(config).double().eval()


def logps(model, scoring, prompts=PROMPTS, completions=COMPLETIONS):
    device = torch.device("cpu")
    return sequence_logps(model, prompts, completions, pad_token_id=0, device=device, scoring=scoring)


def plain_logp(model, prompt, completion):
    logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(dim=-1)
    terms = [logits[len(prompt) - 1 + position, token] for position, token in enumerate(completion)]
    return sum(terms, logits.new_zeros(()))


def gradients(model, sums):
    model.zero_grad()
    (sums.square() * torch.arange(1, len(sums) + 1)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_equal_gradients(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("trained", ["all", "tied", "all but the head", "the head alone"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("head", "layout"), WAYS)
def test_sums_and_gradients_match_a_direct_computation(head, layout, attention, trained):
    model = make_exact_model(attn_implementation=attention, tie_word_embeddings=trained == "tied")
    if trained == "all but the head":
        model.lm_head.requires_grad_(False)
    elif trained == "the head alone":
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    expected = torch.stack([plain_logp(model, *texts) for texts in zip(PROMPTS, COMPLETIONS, strict=True)])
    expected_gradients = gradients(model, expected)
    add_scoring(model)
    sums, lengths = logps(model, make_scoring(model, head, layout))
    torch.testing.assert_close(sums, expected, rtol=1e-8, atol=1e-10)
    assert lengths.tolist() == [3, 1, 3, 5, 1, 2, 0]
    assert_equal_gradients(gradients(model, sums), expected_gradients, 1e-8)


@pytest.mark.parametrize(("head", "layout"), WAYS)
def test_activation_checkpointing_changes_nothing(head, layout):
    model = make_model().train()
    add_scoring(model)
    expected, _ = logps(model, make_scoring(model, head, layout))
    expected_gradients = gradients(model, expected)
    model.activation_checkpointing_enable()
    sums, _ = logps(model, make_scoring(model, head, layout))
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(gradients(model, sums), expected_gradients, 1e-4)


def test_each_prompt_and_each_text_is_computed_once():
    model = make_model()
    add_scoring(model)
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    logps(model, make_scoring(model), PROMPTS[:6], COMPLETIONS[:6])
    (inputs,) = seen
    rows = sorted(row[row != 0].tolist() for row in inputs["input_ids"])
    assert rows == [[40, 41, 42, 43, 44, 1, 45, 46, 47], [50, 51, 52, 53, 54, 1], [60, 61, 62]]
    seen.clear()
    logps(model, make_scoring(model, layout="padded"), PROMPTS[:6], COMPLETIONS[:6])
    assert seen[0]["input_ids"].shape == (5, 6)


@pytest.mark.parametrize(("head", "layout"), WAYS)
def test_absent_completions_cost_one_token_and_have_no_gradient(head, layout):
    model = make_model()
    add_scoring(model)
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    sums, lengths = logps(model, make_scoring(model, head, layout), PROMPTS[:2], [[], []])
    sums.sum().backward()
    assert (sums.tolist(), lengths.tolist()) == ([0, 0], [0, 0])
    assert seen[0]["input_ids"].shape == (1, 1)
    used = [parameter for name, parameter in model.named_parameters() if "lm_head" not in name]
    assert all((parameter.grad == 0).all() for parameter in used)


def test_a_long_row_is_split():
    model = make_model().double()
    add_scoring(model)
    rows = SharedRows.of(model.config)
    prompt = [5, 6, 7, 8]
    completions = [[start + place for place in range(40)] for start in range(10, 50, 5)]
    length = max(row.length for row in rows.rows({tuple(prompt): completions}))
    assert len(prompt) + 40 <= length < len(prompt) + 40 * len(completions)
    scoring = make_scoring(model)
    expected = torch.stack([plain_logp(model, prompt, completion) for completion in completions])
    torch.testing.assert_close(logps(model, scoring, [prompt] * 8, completions)[0], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("head", "layout"), WAYS)
def test_several_passes_change_nothing(head, layout, monkeypatch):
    model = make_model()
    add_scoring(model)
    scoring = make_scoring(model, head, layout)
    expected, _ = logps(model, scoring)
    expected_gradients = gradients(model, expected)
    monkeypatch.setattr(module, "_MIN_TOKENS_ON_CPU", 8)
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    sums, _ = logps(model, replace(scoring, several_passes=True))
    assert len(seen) > 1
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(gradients(model, sums), expected_gradients, 1e-4)


def test_texts_longer_than_compared_have_rows_of_their_own():
    model = make_model()
    add_scoring(model)
    scoring = choose_scoring(model, num_completions=2, max_prompt_length=8, max_completion_length=4)
    assert scoring.shared.max_length == 16
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    for prompt_length, row_length in [(8, 16), (10, 14), (14, 18)]:
        prompts, completions = [list(range(3, 3 + prompt_length))] * 2, [[50, 51, 52, 53], [54, 55, 56, 57]]
        logps(model, scoring, prompts, completions)
        assert seen.pop()["input_ids"].shape[1] == row_length


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_adapters_are_applied(modules):
    peft = pytest.importorskip("peft")
    model = make_model()
    add_scoring(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=modules, init_lora_weights=False))
    scoring = choose_scoring(wrapped, wrapped.get_base_model(), max_prompt_length=8, max_completion_length=6)
    assert scoring.fused is ("lm_head" not in modules)
    assert scoring.shared is not None
    expected = torch.stack([plain_logp(wrapped, *texts) for texts in zip(PROMPTS, COMPLETIONS, strict=True)])
    sums, _ = logps(wrapped, scoring)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(gradients(wrapped, sums), gradients(wrapped, expected), 1e-4)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_are_counted(kind):
    peft = pytest.importorskip("peft")
    model = make_model()
    add_scoring(model)
    wrapped = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    scoring = choose_scoring(wrapped, wrapped.get_base_model(), max_prompt_length=8, max_completion_length=6)
    prompts, completions = PROMPTS[:6], COMPLETIONS[:6]
    tokens = 3 if kind == "PromptTuningConfig" else 0
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = wrapped(torch.tensor([prompt + completion])).logits[0, tokens:].log_softmax(dim=-1)
        expected.append(sum(logits[len(prompt) - 1 + place, token] for place, token in enumerate(completion)))
    torch.testing.assert_close(logps(wrapped, scoring, prompts, completions)[0], torch.stack(expected))


def test_a_copy_of_a_model_uses_its_own_weights():
    model = make_model()
    add_scoring(model)
    copied = copy.deepcopy(model)
    add_scoring(copied)  # has no effect
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    plain = make_model()
    plain.load_state_dict(copied.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(copied(ids).logits, plain(ids).logits)
    assert torch.equal(copied.generate(ids, max_new_tokens=4), plain.generate(ids, max_new_tokens=4))
    scored = logps(copied, make_scoring(copied), [[5]], [[6, 7]])
    torch.testing.assert_close(scored, logps(plain, PLAIN, [[5]], [[6, 7]]))
    assert not torch.equal(copied(ids).logits, model(ids).logits)
