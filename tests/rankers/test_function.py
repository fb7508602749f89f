"""`FunctionRanker`: calls of the reward functions, weighted sums, failures and threads."""

import asyncio
import functools
import math
import re
import threading

import pytest
from torch.nn import Dropout

from cyclealign_trl.errors import RankerError
from cyclealign_trl.rankers.function import FunctionRanker
from cyclealign_trl.types import RankingFailure, RankingRequest, RankingResult
from tests.conftest import make_tokenizer

REQUEST = RankingRequest("Why?", ("aa", "a", "aaaa", "aaa"))
CHAT = RankingRequest([{"role": "user", "content": "Why?"}], ("b", "bb"))


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def test_ranks_higher_scores_first():
    assert FunctionRanker(length).rank([REQUEST]) == [RankingResult((2, 3, 0, 1), ranks=(2, 3, 0, 1))]
    assert FunctionRanker([length], weights=[-1.0]).rank([REQUEST])[0].order == (1, 0, 3, 2)


def test_equal_scores_share_a_rank_and_are_ordered_by_index():
    [result] = FunctionRanker(lambda completions, **_: [1, 2, 1, 0]).rank([REQUEST])
    assert result.ranks == (1, 0, 1, 2)
    assert result.order == (1, 0, 2, 3)


def test_calls_functions_with_the_arguments_of_trl():
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


def test_ranks_several_requests_in_one_call():
    ranker = FunctionRanker(lambda completions, **_: [len(str(completion)) for completion in completions])
    assert [outcome.order for outcome in ranker.rank([CHAT, REQUEST])] == [(1, 0), (2, 3, 0, 1)]
    assert ranker.rank([]) == []


def test_sums_weighted_scores_and_skips_none():
    half = lambda completions, **_: [None, 5.0, None, None]  # noqa: E731
    assert FunctionRanker([length, half]).rank([REQUEST])[0].order == (1, 2, 3, 0)
    assert FunctionRanker([length, half], weights=[1.0, 0.1]).rank([REQUEST])[0].order == (2, 3, 0, 1)


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_missing_or_infinite_score_fails_only_its_request(score):
    ranker = FunctionRanker(lambda completions, **_: [score] + [1.0] * (len(completions) - 1))
    failure, result = ranker.rank([REQUEST, CHAT])
    assert isinstance(failure, RankingFailure)
    assert failure.reason == "no_score"
    assert "completion 0" in failure.detail
    assert result.ranks == (0, 0)


def test_async_functions_run_concurrently():
    number_started = 0
    all_started = asyncio.Event()

    async def slow(completions, **_):
        nonlocal number_started
        number_started += 1
        if number_started == 3:
            all_started.set()
        await asyncio.wait_for(all_started.wait(), timeout=10)  # would time out if they ran one after another
        return length(completions)

    class Slow:
        async def __call__(self, completions, **_):
            return await slow(completions)

    ranker = FunctionRanker([slow, Slow(), functools.partial(slow), length])
    assert ranker.rank([REQUEST])[0].order == (2, 3, 0, 1)


def test_calls_from_several_threads_run_one_at_a_time():
    inside = []

    async def exclusive(completions, **_):
        inside.append(1)
        assert len(inside) == 1
        await asyncio.sleep(0.02)
        inside.pop()
        return length(completions)

    ranker = FunctionRanker(exclusive)
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.extend(ranker.rank([REQUEST]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.order for outcome in outcomes] == [(2, 3, 0, 1)] * 4


def test_a_wrong_number_of_scores_raises():
    def short(completions, **_):
        return [1.0]

    with pytest.raises(RankerError, match="short returned 1 scores for 4 completions"):
        FunctionRanker(short).rank([REQUEST])


def test_does_not_catch_exceptions_of_a_function():
    def broken(**_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        FunctionRanker(broken).rank([REQUEST])


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="at least 1"):
        FunctionRanker([])
    with pytest.raises(ValueError, match="got 2 weights for 1 functions"):
        FunctionRanker([length], weights=[1.0, 2.0])


@pytest.mark.parametrize(
    ("funcs", "message"),
    [
        ("org/rm", "got the text 'org/rm'. Pass RewardModelRanker('org/rm')"),
        ([length, "gpt-5-mini"], "LLMRanker('gpt-5-mini')"),
        (("org/rm",), "got the text 'org/rm'"),
        (FunctionRanker, "got the class FunctionRanker. Pass an instance of it."),
        ([length, dict], "got the class dict"),
        (Dropout(), "got the model Dropout. Pass RewardModelRanker(model)"),
        ([Dropout()], "got the model Dropout"),
        ([None], "got NoneType, which cannot be called"),
        (None, "got NoneType, which cannot be called"),
        (3, "got int, which cannot be called"),
        (FunctionRanker(length), "got FunctionRanker, which cannot be called"),
    ],
)
def test_an_object_that_is_not_a_function_raises_with_a_suggestion(funcs, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        FunctionRanker(funcs)


class CountsTokens:
    def __call__(self, completion_ids, prompts, **kwargs):
        assert len(completion_ids) == len(prompts)
        return [float(len(ids)) for ids in completion_ids]


async def count_tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize("func", [CountsTokens(), count_tokens, functools.partial(count_tokens, other=1)])
def test_functions_that_need_token_ids_get_them_from_the_tokenizer(func):
    for request in (REQUEST, CHAT):
        completions = request.completions
        expected = sorted(range(len(completions)), key=lambda index: -len(completions[index]))
        [result] = FunctionRanker([func], tokenizer=make_tokenizer()).rank([request])
        assert list(result.order) == expected
    with pytest.raises(RankerError, match=r"needs completion_ids.*Pass a tokenizer"):
        FunctionRanker(func).rank([REQUEST])


@pytest.mark.parametrize("func", [length, lambda completions, completion_ids=None, **_: [completion_ids] * 4])
def test_functions_that_do_not_need_token_ids_do_not_get_them(func):
    ranker = FunctionRanker(func)
    ranker.set_default_tokenizer(make_tokenizer())
    assert ranker._tokenizer is None
    ranker.rank([REQUEST])


def test_a_given_tokenizer_is_not_replaced():
    ranker = FunctionRanker(CountsTokens(), tokenizer=make_tokenizer())
    own = ranker._tokenizer
    ranker.set_default_tokenizer(make_tokenizer())
    assert ranker._tokenizer is own


def test_has_a_name_but_no_fingerprint():
    assert not hasattr(FunctionRanker(length), "fingerprint")
    assert repr(FunctionRanker(length)) == "FunctionRanker(length)"
