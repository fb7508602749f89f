"""Estimates of runs, compared with the calls and tokens of the run itself over HTTP."""

import json
import random
import re
from contextlib import closing

import pytest
import torch

from cyclealign_trl import CachedRanker, DemonstrationPool, FunctionRanker, LLMRanker, Usage
from cyclealign_trl.cycle.run_estimate import Sample, assume_completions, estimate_run, sample_completions
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.cycle.stubs import config, make_trainer, prompts

TEXTS = ("first text", "second text, longer", "third")


def judge(body):
    """Rank at random, and write an improved completion that is a third longer than the longest of three."""
    query = body["messages"][-1]["content"].rpartition("### Instruction")[2]
    shown = dict(re.findall(r"# Completion ([A-Z]+)\n<data-\w+>\n(.*?)\n</", query, re.DOTALL))
    ranking = list(shown)
    random.Random(query).shuffle(ranking)
    improved = "x" * (4 * max(map(len, shown.values())) // 3)
    return Reply(json.dumps({"ranking": ranking, "improved_response": improved}))


RUNS = {
    "several windows": {},
    "demonstrations of the whole run": {"demonstration_scope": "run", "num_train_epochs": 2},
    "max_steps within a window": {"max_steps": 5, "num_interactions": 3},
    "gradient accumulation and two passes": {"gradient_accumulation_steps": 2, "num_interactions": 3, "num_passes": 2},
    "evaluated every 3 steps": {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "max_eval_samples": 3,
        "eval_on_start": True,
    },
    "evaluated every epoch": {"eval_strategy": "epoch", "num_train_epochs": 2, "demonstration_scope": "run"},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_run_uses_what_was_estimated(tmp_path, settings):
    settings = dict(settings)
    prices = {"input": 1.0, "output": 2.0}
    with (
        LoopbackEndpoint(judge) as endpoint,
        closing(
            LLMRanker("judge", endpoint.base_url, num_passes=settings.pop("num_passes", 1), prices=prices)
        ) as ranker,
    ):
        evaluation = {"eval_dataset": prompts(5)} if "eval_strategy" in settings else {}
        trainer = make_trainer(tmp_path, ranker, prompts(9), **settings, **evaluation)
        state = torch.get_rng_state()
        samples = sample_completions(trainer, 9)
        assert torch.equal(torch.get_rng_state(), state)
        num_evaluated = len(trainer.eval_dataset) if evaluation else 0
        estimate = estimate_run(trainer.args, ranker, samples, 9, num_evaluated)
        assert endpoint.requests == []
        trainer.train()
        assert trainer.state.global_step == estimate.num_steps
        used = ranker.budget.committed
        calls = len(endpoint.requests)
    expected = estimate.expected
    assert calls == expected.attempts
    assert expected.prompt_tokens + expected.completion_tokens == pytest.approx(used.tokens, rel=0.05)
    assert expected.cost == pytest.approx(used.cost, rel=0.05)
    for name in ("prompt_tokens", "completion_tokens", "cost"):
        assert getattr(estimate.low, name) <= getattr(expected, name) <= getattr(estimate.high, name)


def estimate(folder, ranker, samples=None, num_prompts=8, num_processes=1, **changes):
    samples = samples or [Sample(row["prompt"], TEXTS, tuple(text * 9 for text in TEXTS)) for row in prompts(8)]
    demonstrations = changes.pop("demonstrations", None)
    return estimate_run(
        config(folder, **changes),
        ranker,
        samples,
        num_prompts,
        demonstrations=demonstrations,
        num_processes=num_processes,
    )


@pytest.fixture
def ranker():
    with closing(LLMRanker("judge", "http://127.0.0.1:1/v1")) as ranker:
        yield ranker


def test_prompts_with_equal_completions_need_no_ranking(tmp_path, ranker):
    equal = Sample("Question 0:", ("same",) * 3, ("same",) * 3)
    different = Sample("Question 1:", TEXTS, TEXTS)
    assert estimate(tmp_path, ranker, [equal, different]).expected.attempts == 8  # 4 windows x 1 ranked prompt x 2


def test_more_processes_rank_more_prompts_per_step(tmp_path, ranker):
    one, two = (estimate(tmp_path, ranker, num_processes=number, max_steps=4) for number in (1, 2))
    assert (one.num_steps, two.num_steps) == (4, 4)
    assert (one.expected.attempts, two.expected.attempts) == (4 * 2, 4 * 4)


def test_a_ranker_without_an_estimate_counts_one_call_per_ranking(tmp_path):
    expected = estimate(tmp_path, FunctionRanker(len)).expected
    assert expected == Usage(attempts=16)


def test_a_cached_ranker_estimates_like_its_ranker(tmp_path, ranker):
    with closing(CachedRanker(ranker, tmp_path / "rankings.sqlite")) as cached:
        assert estimate(tmp_path, cached) == estimate(tmp_path, ranker)


def test_stop_on_agreement_saves_rankings_if_they_agree(tmp_path, ranker):
    stopping = estimate(tmp_path, ranker, stop_on_agreement=True)
    assert stopping.low.attempts == 16
    assert stopping.high.attempts == 8


def test_an_estimate_uses_the_given_pool_and_does_not_change_it(tmp_path, ranker):
    without_static = DemonstrationPool(static=(), capacity=2, scope="run")
    estimated = estimate(tmp_path, ranker, demonstrations=without_static)
    assert len(without_static) == 0
    assert estimated.low.prompt_tokens < estimate(tmp_path, ranker).low.prompt_tokens


def test_requests_beyond_the_context_window_are_not_sent(tmp_path):
    with closing(LLMRanker("judge", "http://127.0.0.1:1/v1", context_window=1100)) as small:
        assert estimate(tmp_path, small).expected == Usage(attempts=0)


def test_assumed_completions_have_the_maximum_length(tmp_path, ranker):
    args = config(tmp_path, max_completion_length=100)
    samples = assume_completions(args, prompts(8))
    assert len(samples) == 8
    assert all(len(text) == 400 for sample in samples for text in sample.completions)
    assert all(len(set(sample.completions)) == 3 for sample in samples)
    assert estimate(tmp_path, ranker, samples).expected.completion_tokens > 16 * 100


def test_missing_samples_and_too_few_prompts_raise(tmp_path, ranker):
    with pytest.raises(ValueError, match="An estimate needs at least 1 sample, got 0"):
        estimate_run(config(tmp_path), ranker, [], 8)
    with pytest.raises(
        ValueError, match="The training set has 1 prompts, but one optimiser step needs 2 different ones"
    ):
        estimate(tmp_path, ranker, num_prompts=1)
