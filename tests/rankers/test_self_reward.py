"""`SelfRewardRanker`: scores, batches, threads, the policy in training, invalid arguments."""

import threading

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cyclealign_trl import (
    ContrastivePrompts,
    Ranker,
    RankerError,
    RankingFailure,
    RankingRequest,
    RankingResult,
    SelfRewardRanker,
)
from tests.conftest import CHAT_TEMPLATE, make_model, make_tokenizer
from tests.cycle.stubs import make_trainer
from tests.dlma.test_contrastive_pairs import KIND, plain_logp

PROMPT = "Human: Hi\n\nAssistant:"
REQUEST = RankingRequest(PROMPT, (" hello there", " go", " well, hi", " go"))


def make_ranker(model=None, **changes):
    return SelfRewardRanker(model or make_model(), make_tokenizer(), **{"contrastive": KIND, **changes})


def test_ranks_by_the_difference_of_log_probabilities():
    scores = []
    for completion in REQUEST.completions:
        good, bad = (plain_logp(contrastive_prompt, completion) for contrastive_prompt in KIND.apply(PROMPT))
        scores.append(good - bad)
    ranker = make_ranker(batch_size=3)
    assert isinstance(ranker, Ranker)
    (result,) = ranker.rank([REQUEST])
    assert list(result.order) == sorted(range(4), key=lambda index: (-round(scores[index], 4), index))
    assert result.ranks[1] == result.ranks[3]
    swapped = ContrastivePrompts(KIND.negative, KIND.positive)
    (other,) = make_ranker(contrastive=swapped).rank([REQUEST])
    assert [2 - rank for rank in other.ranks] == list(result.ranks)


def test_rankings_do_not_depend_on_the_batch():
    conversation = RankingRequest([{"role": "user", "content": "Hi"}], ("a b", "c", "a longer reply"))
    alone = [make_ranker(batch_size=1).rank([request])[0] for request in (REQUEST, conversation)]
    assert make_ranker(batch_size=16).rank([REQUEST, conversation]) == alone
    assert make_ranker().rank([]) == []


def test_a_prompt_that_is_too_long_fails_only_its_request():
    long = RankingRequest("x" * 200 + "\n\nAssistant:", ("a", "b"))
    first, second, third = make_ranker(max_prompt_length=60).rank([REQUEST, long, REQUEST])
    assert second == RankingFailure("too_long", "a contrastive prompt has more than max_prompt_length=60 tokens")
    assert first == third == make_ranker().rank([REQUEST])[0]


def test_calls_from_several_threads_give_the_same_rankings():
    ranker = make_ranker()
    (expected,) = ranker.rank([REQUEST])
    results = []
    threads = [threading.Thread(target=lambda: results.extend(ranker.rank([REQUEST] * 3))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 24


def test_the_cycle_can_use_the_policy_as_its_ranker(tmp_path):
    policy = make_model()
    trainer = make_trainer(tmp_path / "live", make_ranker(policy), model=policy, stub_generation=True)
    trainer.train()
    frozen = make_trainer(tmp_path / "frozen", make_ranker(), model=make_model(), stub_generation=True)
    frozen.train()
    history = [[log["ranking_loss"] for log in run.state.log_history if "loss" in log] for run in (trainer, frozen)]
    assert len(history[0]) == 8
    assert history[0][0] == pytest.approx(history[1][0])  # equal weights before the first step
    assert history[0] != history[1]
    # The ranker uses the current weights, also after training.
    assert trainer.ranker.rank([REQUEST]) == make_ranker(policy).rank([REQUEST])


@pytest.mark.parametrize("where", ["module", "attention"])
def test_a_model_that_trains_with_dropout_raises(where):
    model = make_model(attention_dropout=0.1 if where == "attention" else 0.0)
    if where == "module":
        model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, torch.nn.Dropout(0.1))
    ranker = make_ranker(model)
    assert ranker.rank([REQUEST])
    model.train()
    with pytest.raises(RankerError, match="trained with dropout"):
        ranker.rank([REQUEST])


def test_loads_a_model_by_name_and_prompts_by_name_or_mapping(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    ranker = SelfRewardRanker(str(tmp_path), contrastive={"positive": "a kind reply", "negative": "a rude reply"})
    assert ranker.rank([REQUEST]) == make_ranker().rank([REQUEST])
    assert ranker.name == str(tmp_path)
    assert "a kind reply" in repr(ranker)
    assert SelfRewardRanker(str(tmp_path), contrastive="helpful").rank([REQUEST])


@pytest.mark.parametrize("name", ["batch_size", "max_prompt_length", "max_completion_length"])
def test_invalid_arguments_raise(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        make_ranker(**{name: 0})


def test_a_prompt_beyond_the_models_positions_is_a_failure():
    config = GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    ranker = SelfRewardRanker(
        GPT2LMHeadModel(config), make_tokenizer(), contrastive={"positive": "kind", "negative": "rude"},
        max_prompt_length=None, max_completion_length=16,
    )  # fmt: skip
    short, long = ranker.rank([RankingRequest("Q" * size, ("a", "b")) for size in (30, 60)])
    assert isinstance(short, RankingResult)
    assert long.reason == "too_long"
    with pytest.raises(ValueError, match="max_completion_length is 65 tokens, but GPT2LMHeadModel has 64 positions"):
        SelfRewardRanker(GPT2LMHeadModel(config), make_tokenizer(), max_prompt_length=None, max_completion_length=65)


@pytest.mark.parametrize("tools", [None, [], [{"type": "function", "function": {"name": "add"}}]])
def test_tools_reach_the_template(tools):
    tokenizer, seen = make_tokenizer(), []
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool['function']['name'] }}{% endfor %}" + CHAT_TEMPLATE
    ranker = SelfRewardRanker(make_model(), tokenizer)
    encode = ranker._self_reward.renderer._encoder.encode
    ranker._self_reward.renderer._encoder.encode = lambda text: seen.append(text) or encode(text)
    ranker.rank([RankingRequest([{"role": "user", "content": "Q"}], ("a", "b"), metadata={"tools": tools})])
    assert all(text.startswith("add<user>") for text in seen if "<user>" in text) == bool(tools)
