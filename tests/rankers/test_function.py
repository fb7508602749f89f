"""TRL reward functions as a ranker."""

import asyncio
import functools
import math
import threading

import pytest

from cyclealign_trl.errors import RankerError
from cyclealign_trl.rankers.function import FunctionRanker
from cyclealign_trl.types import RankingFailure, RankingRequest, RankingResult

REQUEST = RankingRequest("Why?", ("aa", "a", "aaaa", "aaa"))
CHAT = RankingRequest([{"role": "user", "content": "Why?"}], ("b", "bb"))


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def test_a_higher_score_is_better():
    assert FunctionRanker(length).rank([REQUEST]) == [RankingResult((2, 3, 0, 1), ranks=(2, 3, 0, 1))]
    assert FunctionRanker([length], weights=[-1.0]).rank([REQUEST])[0].order == (1, 0, 3, 2)


def test_equal_scores_share_a_rank_and_the_order_lists_them_by_index():
    [result] = FunctionRanker(lambda completions, **_: [1, 2, 1, 0]).rank([REQUEST])
    assert result.ranks == (1, 0, 1, 2)
    assert result.order == (1, 0, 2, 3)


def test_functions_are_called_as_trl_calls_them():
    calls = []

    def record(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [0.0] * len(completions)

    requests = [
        RankingRequest("One?", ("a", "b"), metadata={"answer": 1, "prompt": "shadow", "completion": "shadow"}),
        RankingRequest(CHAT.prompt, ("c",), metadata={"answer": 2, "only_here": [3]}),
    ]
    FunctionRanker(record).rank(requests)
    assert calls == [
        (
            ["One?", "One?", CHAT.prompt],
            ["a", "b", [{"role": "assistant", "content": "c"}]],
            {"answer": [1, 1, 2], "only_here": [None, None, [3]]},
        )
    ]


def test_the_outcomes_of_several_requests_stay_apart():
    ranker = FunctionRanker(lambda completions, **_: [len(str(completion)) for completion in completions])
    assert [outcome.order for outcome in ranker.rank([CHAT, REQUEST])] == [(1, 0), (2, 3, 0, 1)]
    assert ranker.rank([]) == []


def test_the_sum_is_weighted_over_the_functions_that_apply():
    half = lambda completions, **_: [None, 5.0, None, None]  # noqa: E731
    assert FunctionRanker([length, half]).rank([REQUEST])[0].order == (1, 2, 3, 0)
    assert FunctionRanker([length, half], weights=[1.0, 0.1]).rank([REQUEST])[0].order == (2, 3, 0, 1)


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_no_score_is_a_failure_of_its_request_alone(score):
    ranker = FunctionRanker(lambda completions, **_: [score] + [1.0] * (len(completions) - 1))
    failure, result = ranker.rank([REQUEST, CHAT])
    assert isinstance(failure, RankingFailure)
    assert failure.reason == "no_score"
    assert "completion 0" in failure.detail
    assert result.ranks == (0, 0)


def test_async_functions_run_together():
    number_started = 0
    all_started = asyncio.Event()

    async def slow(completions, **_):
        nonlocal number_started
        number_started += 1
        if number_started == 3:
            all_started.set()
        await asyncio.wait_for(all_started.wait(), timeout=10)  # for ever, if they ran one after the other
        return length(completions)

    class Slow:
        async def __call__(self, completions, **_):
            return await slow(completions)

    ranker = FunctionRanker([slow, Slow(), functools.partial(slow), length])
    assert ranker.rank([REQUEST])[0].order == (2, 3, 0, 1)


def test_calls_from_several_threads_take_turns():
    inside = []

    async def alone(completions, **_):
        inside.append(1)
        assert len(inside) == 1
        await asyncio.sleep(0.02)
        inside.pop()
        return length(completions)

    ranker = FunctionRanker(alone)
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.extend(ranker.rank([REQUEST]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.order for outcome in outcomes] == [(2, 3, 0, 1)] * 4


def test_another_number_of_scores_raises_with_both():
    def short(completions, **_):
        return [1.0]

    with pytest.raises(RankerError, match="short returned 1 scores for 4 completions"):
        FunctionRanker(short).rank([REQUEST])


def test_what_a_function_raises_is_raised():
    def broken(**_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        FunctionRanker(broken).rank([REQUEST])


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="at least 1"):
        FunctionRanker([])
    with pytest.raises(ValueError, match="got 2 for 1"):
        FunctionRanker([length], weights=[1.0, 2.0])


def test_it_promises_no_fingerprint():
    assert not hasattr(FunctionRanker(length), "fingerprint")
    assert repr(FunctionRanker(length)) == "FunctionRanker(length)"
