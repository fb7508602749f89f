"""`LLMRanker` over HTTP on loopback: failures, retries and fatal errors."""

import email.utils
import logging
import random
import threading
import time

import pytest

from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.errors import RankerError
from cyclealign_trl.rankers.base import StreamingRanker
from cyclealign_trl.rankers.llm import LLMRanker
from cyclealign_trl.types import RankingFailure, RankingRequest, RankingResult
from tests.rankers.llm_stubs import COMPLETIONS, KEY, REQUEST, RIGHT, error, judge

pytestmark = pytest.mark.usefixtures("llm_environment")


# Failures


FAILURES = {
    "garbage": (Reply("As an AI, I like them all."), "unparsable"),
    "empty": (Reply(""), "unparsable"),
    "unknown label": (Reply('{"ranking": ["A", "B", "C", "X"]}'), "invalid_ranking"),
    "repeated label": (Reply('{"ranking": ["A", "B", "C", "A"]}'), "invalid_ranking"),
    "missing label": (Reply('{"ranking": ["A", "B", "C"]}'), "invalid_ranking"),
    "truncated object": (Reply('{"ranking": ["A", "B", "C", "D"]'), "unparsable"),
    "stopped by length": (Reply('{"ranking": ["A", "B", "C", "D"]}', finish_reason="length"), "truncated"),
    "refusal": (Reply(refusal="I will not."), "refusal"),
    "filtered reply": (Reply(finish_reason="content_filter"), "refusal"),
    "filtered prompt": (error(400, code="content_filter"), "refusal"),
    "too long": (error(400, code="context_length_exceeded"), "too_long"),
    "too long in words": (error(400, "This model's maximum context length is 512 tokens."), "too_long"),
    "too large": (error(413), "too_long"),
    "HTTP 500": (error(500), "server_error"),
    "HTTP 503 without JSON": (Reply(status=503, body="<html>busy</html>"), "server_error"),
    "HTTP 429": (error(429), "rate_limited"),
    "no quota": (error(429, code="insufficient_quota"), "quota_exhausted"),
    "HTTP 402": (error(402), "quota_exhausted"),
    "HTTP 408": (error(408), "timeout"),
    "reset": (Reply(reset=True), "connection"),
    "hang": (Reply(delay=30.0), "timeout"),
    "200 without JSON": (Reply(body="<html>hello</html>"), "invalid_response"),
    "200 with an error": (Reply(body='{"error": {"message": "upstream"}}'), "invalid_response"),
    "200 without choices": (Reply(body='{"choices": []}'), "invalid_response"),
    "200 with null": (Reply(body="null"), "invalid_response"),
    "200 with parts": (Reply(body='{"choices": [{"message": {"content": [1]}}]}'), "invalid_response"),
    "200 with nesting": (Reply(body="[" * 100_000), "invalid_response"),
}


FINAL = ("too_long", "quota_exhausted")


@pytest.mark.parametrize(("reply", "reason"), FAILURES.values(), ids=FAILURES)
def test_a_failure_affects_only_its_request(serve, reply, reason):
    ranker, _ = serve(
        lambda body: reply if "failing" in str(body) else judge(body),
        max_retries=1,
        timeout=0.3 if reply.delay else 60.0,
    )
    failing, fine = ranker.rank([RankingRequest("failing", COMPLETIONS), REQUEST])
    assert isinstance(failing, RankingFailure)
    assert failing.reason == reason
    assert failing.usage.attempts == (1 if reason in FINAL or reply.status == 400 else 2)
    assert fine.order == RIGHT


def test_a_refused_connection_is_a_failure():
    with LoopbackEndpoint(judge) as endpoint:
        url = endpoint.base_url
    ranker = LLMRanker("a-model", url, max_retries=1)
    [outcome] = ranker.rank([REQUEST])
    ranker.close()
    assert outcome.reason == "connection"
    assert outcome.usage.attempts == 2


@pytest.mark.parametrize(("reply", "reason"), FAILURES.values(), ids=FAILURES)
def test_retries_temporary_failures_and_bad_replies(serve, reply, reason):
    replies = []

    def respond(body):
        replies.append(body)
        return reply if len(replies) == 1 else judge(body)

    ranker, endpoint = serve(respond, timeout=0.3 if reply.delay else 60.0)
    [outcome] = ranker.rank([REQUEST])
    if reason in FINAL or reply.status == 400:
        assert outcome.reason == reason
        return
    assert outcome.order == RIGHT
    assert outcome.usage.attempts == 2
    first, second = endpoint.requests
    if reason in ("unparsable", "invalid_ranking", "truncated", "refusal"):
        # At temperature 0, an identical call would return the same reply.
        assert (first["seed"], second["seed"]) == (0, 1)
        before, after = first["messages"][1]["content"], second["messages"][1]["content"]
        assert after.startswith(before)
        assert "Your previous reply was" in after.removeprefix(before)
    else:
        assert first == second


def test_a_retry_tells_the_judge_what_was_wrong(serve):
    ranker, endpoint = serve(
        lambda body: judge(body) if "none of the labels" in str(body) else Reply('{"ranking": ["X"]}')
    )
    assert ranker.rank([REQUEST])[0].order == RIGHT
    assert 'it ranks "X", which is none of the labels A, B, C, D' in endpoint.requests[1]["messages"][1]["content"]


def test_reports_the_failure_of_the_last_attempt(serve):
    ranker, endpoint = serve([error(500), Reply("?"), error(429, "slow down")], max_retries=2)
    [outcome] = ranker.rank([REQUEST])
    assert outcome.reason == "rate_limited"
    assert "slow down" in outcome.detail
    assert [body["seed"] for body in endpoint.requests] == [0, 0, 1]


def test_sums_usage_over_all_attempts(serve):
    def usage(prompt_tokens, completion_tokens, **more):
        return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, **more}

    replies = [
        Reply("?", usage=usage(10, 1, cost=0.5)),
        error(500),
        Reply('{"ranking": ["A", "B", "C", "D"]}', usage=usage(20, 2, cost=0.25)),
    ]
    ranker, _ = serve(replies)
    [outcome] = ranker.rank([REQUEST])
    assert isinstance(outcome, RankingResult)
    assert (outcome.usage.prompt_tokens, outcome.usage.completion_tokens) == (30, 3)
    assert outcome.usage.cost == 0.75
    assert outcome.usage.attempts == 3


def test_accepts_replies_without_usage(serve):
    ranker, _ = serve([Reply('{"ranking": ["A", "B", "C", "D"]}', usage={})])
    usage = ranker.rank([REQUEST])[0].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cost) == (0, 0, None)


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "0.4"},
        {"retry-after-ms": "400", "Retry-After": "50"},
        {"Retry-After": lambda: email.utils.formatdate(time.time() + 1.5, usegmt=True)},
    ],
    ids=["seconds", "milliseconds", "date"],
)
@pytest.mark.parametrize("status", [429, 503])
def test_waits_for_retry_after(serve, headers, status):
    headers = {name: value() if callable(value) else value for name, value in headers.items()}
    replies = []

    def respond(body):
        replies.append(time.monotonic())
        return Reply(status=status, headers=headers) if len(replies) == 1 else judge(body)

    ranker, _ = serve(respond, timeout=5.0)
    assert ranker.rank([REQUEST])[0].order == RIGHT
    assert replies[1] - replies[0] >= 0.39


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "inf", "Mon, 99 Foo 2026"])
def test_ignores_an_invalid_retry_after(serve, value):
    replies = iter([Reply(status=429, headers={"Retry-After": value})])
    ranker, _ = serve(lambda body: next(replies, None) or judge(body))
    assert ranker.rank([REQUEST])[0].order == RIGHT


@pytest.mark.timeout(60)
def test_does_not_wait_for_a_retry_after_beyond_the_timeout(serve):
    ranker, endpoint = serve([Reply(status=429, headers={"Retry-After": "3600"})], timeout=2.0)
    assert ranker.rank([REQUEST])[0].reason == "rate_limited"
    assert len(endpoint.requests) == 1


def test_backoff_does_not_change_the_global_random_state(serve):

    state = random.getstate()
    ranker, _ = serve([error(500), Reply('{"ranking": ["A", "B", "C", "D"]}')])
    ranker.rank([REQUEST])
    assert random.getstate() == state


# Fatal errors


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        (401, "OPENAI_API_KEY"),
        (403, "may call this model"),
        (404, "base_url"),
        (400, "refuses"),
        (418, "A retry cannot help"),
    ],
)
def test_fatal_statuses_raise_without_the_key(serve, status, fix, caplog):
    caplog.set_level(logging.INFO)
    message = f"The header was 'Bearer {KEY}'. " + "x" * 430 + KEY
    ranker, endpoint = serve(lambda body: error(status, message))
    with pytest.raises(RankerError, match=fix) as caught:
        ranker.rank([REQUEST])
    text = str(caught.value)
    assert "a-model" in text
    assert endpoint.base_url in text
    assert "[API key]" in text
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    for public in (text, repr(ranker), ranker.fingerprint, caplog.text):
        assert "sk-very" not in public


def test_failures_do_not_contain_the_key(serve):
    ranker, _ = serve(lambda body: error(500, KEY), max_retries=0)
    [outcome] = ranker.rank([REQUEST])
    assert "[API key]" in outcome.detail
    assert KEY not in outcome.detail


def test_the_key_is_sent(serve):
    ranker, _ = serve(judge, required_key=KEY)
    assert ranker.rank([REQUEST])[0].order == RIGHT
    stranger, _ = serve(judge, required_key=KEY, api_key="sk-wrong")
    with pytest.raises(RankerError, match="401"):
        stranger.rank([REQUEST])


@pytest.mark.timeout(60)
def test_a_fatal_error_cancels_open_calls(serve):
    ranker, _ = serve(lambda body: error(401) if "failing" in str(body) else Reply(delay=600.0), timeout=900.0)
    with pytest.raises(RankerError):
        ranker.rank([REQUEST, RankingRequest("failing", COMPLETIONS)])


def test_the_stream_yields_outcomes_that_arrived_before_a_fatal_error(serve):
    first_arrived = threading.Event()

    def respond(body):
        if "failing" in str(body):
            first_arrived.wait(10)
            return error(401)
        return judge(body)

    ranker, _ = serve(respond)
    assert isinstance(ranker, StreamingRanker)
    stream = ranker.stream([RankingRequest("failing", COMPLETIONS), REQUEST])
    position, outcome = next(stream)
    assert (position, outcome.order) == (1, RIGHT)
    first_arrived.set()
    with pytest.raises(RankerError):
        next(stream)


def test_closing_the_stream_cancels_open_calls(serve):
    both = threading.Barrier(2, timeout=5)

    def respond(body):
        if "together" in str(body):
            both.wait()
        return judge(body) if REQUEST.prompt not in str(body) else Reply(delay=30.0)

    ranker, _ = serve(respond, max_concurrency=2)
    stream = ranker.stream([REQUEST, RankingRequest("quick", COMPLETIONS)])
    assert next(stream)[0] == 1
    stream.close()
    # Both slots are free again.
    outcomes = ranker.rank([RankingRequest(f"together {index}", COMPLETIONS) for index in range(2)])
    assert [outcome.order for outcome in outcomes] == [RIGHT, RIGHT]
