"""Answers that arrive, late or never."""

import threading
import time

import pytest

from cyclealign_trl import CachedRanker, LLMRanker, RankerError, RankingFailure, RankingRequest, RankingResult
from cyclealign_trl.cycle.pending_rankings import PendingRankings
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply

REPLY = Reply('{"ranking": ["A", "B"]}')


def requests(*names):
    return [RankingRequest(name, ("a", "b")) for name in names]


def soon(seconds=0.5):
    return time.monotonic() + seconds


class Slow:
    """Answers one by one, and hangs at the prompt `hang`."""

    def __init__(self):
        self.released = threading.Event()

    def stream(self, requests):
        for position, request in enumerate(requests):
            if request.prompt == "hang":
                self.released.wait(20)
            yield position, RankingResult((0, 1))

    def rank(self, requests):
        return [outcome for _, outcome in self.stream(requests)]


def test_answers_stand_in_the_order_of_the_requests():
    with LoopbackEndpoint(lambda body: Reply(REPLY.content, delay=0.2 * ("slow" in str(body)))) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url, shuffle=False)
        pending = PendingRankings(ranker, [*requests("slow"), RankingRequest("fast", ("a", "b", "c"))])
        first, second = pending.wait(soon(20))
        ranker.close()
    assert first.order == (0, 1)
    assert second.reason == "invalid_ranking"
    assert PendingRankings(ranker, []).wait(soon()) == []


def test_what_has_arrived_counts_and_the_rest_is_late():
    ranker = Slow()
    outcomes = PendingRankings(ranker, requests("x", "hang", "y")).wait(soon())
    ranker.released.set()
    assert outcomes[0] == RankingResult((0, 1))
    assert [outcome.reason for outcome in outcomes[1:]] == ["deadline"] * 2


def test_of_a_ranker_that_does_not_stream_nothing_has_arrived():
    class AllAtOnce:
        def __init__(self):
            self.inner = Slow()

        def rank(self, requests):
            return [outcome for _, outcome in self.inner.stream(requests)]

    ranker = AllAtOnce()
    outcomes = PendingRankings(ranker, requests("x", "hang")).wait(soon())
    ranker.inner.released.set()
    assert [outcome.reason for outcome in outcomes] == ["deadline"] * 2


def test_late_calls_are_cancelled_and_leave_the_endpoint_to_others(tmp_path):
    with LoopbackEndpoint(lambda body: Reply(REPLY.content, delay=60.0 * ("hang" in str(body)))) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url, max_concurrency=4)
        cached = CachedRanker(ranker, tmp_path / "rankings.sqlite")
        parts = [PendingRankings(cached, requests("x", f"hang {part}", f"hang again {part}")) for part in range(2)]
        deadline = soon(2)
        outcomes = [outcome for part in parts for outcome in part.wait(deadline)]
        # All four calls at once are free again.
        after = PendingRankings(cached, requests(*"abcd")).wait(soon(20))
        cached.close()
        ranker.close()
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == [None, "deadline", "deadline"] * 2
    assert all(isinstance(outcome, RankingResult) for outcome in after)


def test_what_the_ranker_raises_is_raised():
    class Broken(Slow):
        def stream(self, requests):
            raise RankerError("no key")
            yield

    with pytest.raises(RankerError, match="no key"):
        PendingRankings(Broken(), requests("x")).wait(soon())


def test_a_ranker_that_answers_too_few_is_no_ranker():
    class Mute:
        def rank(self, requests):
            return [RankingFailure("timeout")]

    with pytest.raises(RankerError, match="Mute was given 2 requests and answered 1"):
        PendingRankings(Mute(), requests("x", "y")).wait(soon())
