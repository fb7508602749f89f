"""Default devices, digests of weights, and models that cannot be trained."""

import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from cyclealign_trl import Aligner, RankingConfig, RankingTrainer, RewardModelRanker, SelfRewardRanker
from cyclealign_trl.models import loading
from cyclealign_trl.models.loading import default_device, digest_weights, sync_special_tokens
from cyclealign_trl.models.transformers_backend import generate
from tests.conftest import make_model, make_tokenizer


def test_each_process_uses_its_own_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert default_device() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda:3")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # each process sees only its own
    assert default_device() == torch.device("cuda:0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_a_digest_changes_only_with_the_weights():
    model, copy = make_model(), make_model()
    assert digest_weights(model) == digest_weights(copy)
    assert digest_weights(model) != digest_weights(make_model(seed=1))
    optimizer = torch.optim.AdamW(copy.parameters(), lr=1e-4)
    copy(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
    optimizer.step()
    assert digest_weights(model) != digest_weights(copy)


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))


def bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=99, d_model=16, **sizes))


def classifier():
    return LlamaForSequenceClassification(make_model().config)


NO_CAUSAL_LM = {
    "T5": (t5, "encoder-decoder"),
    "BART": (bart, "encoder-decoder"),
    "Llama without a head": (lambda: make_model().model, "no language modeling head"),
    "Llama with a score head": (classifier, "no language modeling head"),
}


@pytest.mark.parametrize(("make", "reason"), NO_CAUSAL_LM.values(), ids=NO_CAUSAL_LM)
def test_models_that_are_no_causal_language_models_are_refused(make, reason, tmp_path):
    rows = Dataset.from_list([{"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 1]}])
    args = RankingConfig(str(tmp_path), use_cpu=True, report_to="none", max_prompt_length=16, max_completion_length=16)
    with pytest.raises(ValueError, match=reason):
        RankingTrainer(make(), args, rows, processing_class=make_tokenizer())
    with pytest.raises(ValueError, match=reason):
        SelfRewardRanker(make(), make_tokenizer())


def test_router_logits_are_turned_off_with_a_warning(caplog):
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=99,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            output_router_logits=True,
            max_position_embeddings=64,
        )
    )
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        sync_special_tokens(model, make_tokenizer())
        sync_special_tokens(model, make_tokenizer())
    [record] = caplog.records
    assert "load-balancing loss is not part of the objective" in record.getMessage()
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=1)
    assert [len(ids) for ids in generate(model, [[5, 6], [7]], config, model.device)] == [4, 4]


INVALID = {
    "temperature": {"do_sample": False, "temperature": 0.9},
    "top_p": {"do_sample": False, "top_p": 0.8},
    "top_k and min_p": {"do_sample": False, "top_k": 20, "min_p": 0.1},
}


@pytest.mark.parametrize("fields", INVALID.values(), ids=INVALID)
def test_an_invalid_generation_config_is_corrected_with_a_warning(fields, caplog, tmp_path):
    model = make_model()
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=r"(?i)generation"):
        model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        sync_special_tokens(model, make_tokenizer())
    [record] = caplog.records
    assert "do_sample is set to True" in record.getMessage()
    model.save_pretrained(tmp_path)


def test_a_generation_config_that_cannot_be_corrected_is_refused():
    model = make_model()
    model.generation_config.num_return_sequences, model.generation_config.num_beams = 3, 1
    model.generation_config.do_sample = False
    model.generation_config.early_stopping = "sometimes"
    with pytest.raises(ValueError, match=r"Correct model\.generation_config"):
        sync_special_tokens(model, make_tokenizer())


def test_a_valid_model_is_accepted_silently(caplog):
    with caplog.at_level(logging.DEBUG, logger=loading.__name__):
        assert sync_special_tokens(make_model(), make_tokenizer()) == (1,)
    assert not caplog.records


def reward_model():
    config = make_model().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (SimpleNamespace(tokenizer=make_tokenizer()), "tokenizer must be a tokenizer.*pass processor.tokenizer"),
        ("org/model", r"Pass AutoTokenizer\.from_pretrained\('org/model'\)"),
        (type(make_tokenizer()), "Load one with AutoTokenizer"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda tokenizer: RewardModelRanker(reward_model(), tokenizer),
        lambda tokenizer: SelfRewardRanker(make_model(), tokenizer),
    ],
)
def test_an_object_that_is_not_a_tokenizer_raises(use, tokenizer, message):
    with pytest.raises(TypeError, match=message):
        use(tokenizer)


@pytest.mark.parametrize("use", [RewardModelRanker, SelfRewardRanker, Aligner.from_pretrained])
@pytest.mark.parametrize("name", ["./no-such-model", "/no/such/model", "outputs/x", "outputs/x/checkpoint-3"])
def test_a_missing_folder_is_named(use, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=f"There is no folder {name}"):
        use(name)


def test_errors_of_an_existing_folder_are_unchanged(tmp_path):
    with pytest.raises(ValueError, match="Unrecognized model"):
        SelfRewardRanker(str(tmp_path))
