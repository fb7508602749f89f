"""Answers that arrive in time, late, or never."""

import threading
import time

import pytest

from cyclealign_trl import CachedRanker, LLMRanker, RankerError, RankingFailure, RankingRequest, RankingResult
from cyclealign_trl.cycle.pending_rankings import PendingRankings
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply

REPLY = Reply('{"ranking": ["A", "B"]}')


def requests(*prompts):
    return [RankingRequest(prompt, ("a", "b")) for prompt in prompts]


def after(seconds=0.5):
    """Return the deadline that is this many seconds away."""
    return time.monotonic() + seconds


class HangingRanker:
    """Answer one by one, and hang at the prompt "hang" until released."""

    def __init__(self):
        self.released = threading.Event()

    def stream(self, requests):
        for position, request in enumerate(requests):
            if request.prompt == "hang":
                self.released.wait(20)
            yield position, RankingResult((0, 1))

    def rank(self, requests):
        return [outcome for _, outcome in self.stream(requests)]


def test_answers_are_in_the_order_of_the_requests():
    with LoopbackEndpoint(lambda body: Reply(REPLY.content, delay=0.2 * ("slow" in str(body)))) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url, shuffle=False)
        pending = PendingRankings(ranker, [*requests("slow"), RankingRequest("fast", ("a", "b", "c"))])
        first, second = pending.wait(after(20))
        ranker.close()
    assert first.order == (0, 1)
    assert second.reason == "invalid_ranking"
    assert PendingRankings(ranker, []).wait(after()) == []


def test_answers_that_are_missing_at_the_deadline_are_failures():
    ranker = HangingRanker()
    outcomes = PendingRankings(ranker, requests("x", "hang", "y")).wait(after())
    ranker.released.set()
    assert outcomes[0] == RankingResult((0, 1))
    assert [outcome.reason for outcome in outcomes[1:]] == ["deadline"] * 2


def test_a_ranker_that_does_not_stream_has_no_answers_before_its_last_one():
    class WithoutStream:
        def __init__(self):
            self.inner = HangingRanker()

        def rank(self, requests):
            return [outcome for _, outcome in self.inner.stream(requests)]

    ranker = WithoutStream()
    outcomes = PendingRankings(ranker, requests("x", "hang")).wait(after())
    ranker.inner.released.set()
    assert [outcome.reason for outcome in outcomes] == ["deadline"] * 2


def test_late_calls_are_cancelled_so_that_later_ones_can_start(tmp_path):
    with LoopbackEndpoint(lambda body: Reply(REPLY.content, delay=60.0 * ("hang" in str(body)))) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url, max_concurrency=4)
        cached = CachedRanker(ranker, tmp_path / "rankings.sqlite")
        parts = [PendingRankings(cached, requests("x", f"hang {part}", f"hang again {part}")) for part in range(2)]
        deadline = after(2)
        outcomes = [outcome for part in parts for outcome in part.wait(deadline)]
        # The limit of four concurrent calls is free again.
        next_outcomes = PendingRankings(cached, requests(*"abcd")).wait(after(20))
        cached.close()
        ranker.close()
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == [None, "deadline", "deadline"] * 2
    assert all(isinstance(outcome, RankingResult) for outcome in next_outcomes)


def test_an_error_of_the_ranker_is_raised():
    class Broken(HangingRanker):
        def stream(self, requests):
            raise RankerError("no key")
            yield

    with pytest.raises(RankerError, match="no key"):
        PendingRankings(Broken(), requests("x")).wait(after())


def test_a_ranker_that_returns_too_few_answers_raises():
    class OneAnswer:
        def rank(self, requests):
            return [RankingFailure("timeout")]

    with pytest.raises(
        RankerError,
        match=r"OneAnswer was given 2 requests and returned 1 answers\. `rank` must return one per request",
    ):
        PendingRankings(OneAnswer(), requests("x", "y")).wait(after())
