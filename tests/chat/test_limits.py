"""Rate limits and adaptive concurrency: alone, then over HTTP from several processes."""

import asyncio
import heapq
import os
import random
import subprocess
import sys
from itertools import pairwise

import pytest

from cyclealign_trl.chat import limits
from cyclealign_trl.chat.limits import AdaptiveConcurrency, Permit, RateLimiter, resolve_num_processes
from cyclealign_trl.chat.responses import read_duration
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.rankers.llm import LLMRanker
from cyclealign_trl.types import RankingRequest, Usage
from tests.judge_server import most_within, running


def simulate(limiter, num_calls, latency, transit, tokens=1, expected=1, seed=0):
    """Make calls as fast as the limiter admits them. Return the arrival time and tokens of each, and the end time.

    A call arrives within `transit` seconds and is answered `latency` seconds later.
    """
    rng = random.Random(seed)
    now, arrivals, in_flight = 0.0, [], []
    for number in range(num_calls):
        while isinstance(permit := limiter.try_admit(expected, now), float):
            assert permit > 0
            # Continue at the next answer or at the next try, whichever comes first.
            if in_flight and in_flight[0][0] <= now + permit:
                now, _, ended = heapq.heappop(in_flight)
                limiter.record(ended, now, Usage(tokens), {})
            else:
                now += permit
        arrived = now + rng.uniform(0, transit)
        arrivals.append((arrived, tokens))
        heapq.heappush(in_flight, (arrived + latency, number, permit))
    return arrivals, now


@pytest.mark.parametrize(("latency", "transit"), [(0.0, 0.0), (0.5, 1.0), (10.0, 2.5)])
def test_no_minute_at_the_endpoint_has_more_requests_than_the_limit(latency, transit):
    arrivals, seconds = simulate(RateLimiter(600, None, 1), 6000, latency, transit)
    most, _ = most_within(60.0, arrivals)
    assert 0.97 * 600 <= most <= 600
    # Ten minutes' worth of requests: the first minute's are sent at once, and the others take at most 10 % longer.
    assert seconds <= 9 * 60 * 1.1


def test_no_minute_has_more_tokens_than_the_limit_and_unused_tokens_are_available_again():
    limiter = RateLimiter(None, 100_000, 1)
    # Each call is expected to use 1500 tokens and uses 300.
    arrivals, seconds = simulate(limiter, 3000, 0.5, 0.5, tokens=300, expected=1500)
    _, most = most_within(60.0, arrivals)
    assert 0.95 * 100_000 <= most <= 100_000
    assert seconds <= 9 * 60 * 1.1


def test_processes_share_a_limit():
    one, eight = RateLimiter(600, None, 1), RateLimiter(600, None, 8)
    assert [sum(isinstance(limiter.try_admit(1, 0.0), Permit) for _ in range(601)) for limiter in (one, eight)] == [
        600,
        75,
    ]
    # Half a request per minute is one request in two minutes.
    scarce = RateLimiter(4, None, 8)
    arrivals, _ = simulate(scarce, 3, 0.0, 0.0)
    assert [after - before for (before, _), (after, _) in pairwise(arrivals)] == pytest.approx([122.4, 122.4])


def test_a_call_larger_than_the_limit_is_sent_alone():
    limiter = RateLimiter(None, 1000, 1)
    permit = limiter.try_admit(5000, 0.0)
    assert isinstance(permit, Permit)
    assert limiter.try_admit(1, 1.0) > 0
    limiter.record(permit, 2.0, Usage(400, 500), {})
    assert isinstance(limiter.try_admit(100, 2.0), Permit)
    assert limiter.try_admit(1, 2.0) > 0


def test_the_number_of_processes_defaults_to_world_size(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert resolve_num_processes(None) == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (resolve_num_processes(None), resolve_num_processes(2)) == (8, 2)
    with pytest.raises(ValueError, match=r"num_processes.*got 0"):
        resolve_num_processes(0)


# Limits in the endpoint's headers


def limit_headers(resource, remaining, reset, limit=100):
    names = {"remaining": remaining, "reset": reset, "limit": limit}
    return {f"x-ratelimit-{name}-{resource}": str(value) for name, value in names.items()}


@pytest.mark.parametrize("resource", ["requests", "tokens"])
def test_a_used_up_quota_delays_calls_until_its_reset(resource):
    limiter = RateLimiter(None, None, 1)
    limiter.record(limiter.try_admit(10, 0.0), 1.0, None, limit_headers(resource, 0, "6m0s"))
    assert limiter.try_admit(10, 1.0) == 360.0
    assert limiter.try_admit(10, 360.0) == 1.0
    assert isinstance(limiter.try_admit(10, 361.0), Permit)


def test_calls_sent_after_the_reporting_one_count():
    limiter = RateLimiter(None, None, 1)
    first, *_ = [limiter.try_admit(1, 0.0) for _ in range(4)]
    limiter.record(first, 1.0, None, limit_headers("requests", 5, "30s"))  # three other calls are in flight
    assert [isinstance(limiter.try_admit(1, 1.0), Permit) for _ in range(3)] == [True, True, False]


def test_the_headers_of_an_older_call_are_ignored():
    limiter = RateLimiter(None, None, 1)
    older, newer = limiter.try_admit(1, 0.0), limiter.try_admit(1, 0.0)
    limiter.record(newer, 1.0, None, limit_headers("requests", 50, "1s"))
    limiter.record(older, 1.0, None, limit_headers("requests", 0, "30s"))
    assert isinstance(limiter.try_admit(1, 1.0), Permit)


def test_a_reset_restores_exactly_the_limit():
    limiter = RateLimiter(None, None, 1)
    limiter.record(limiter.try_admit(1, 0.0), 0.0, None, limit_headers("requests", 0, "1s", limit=3))
    assert [isinstance(limiter.try_admit(1, 1.0), Permit) for _ in range(4)] == [True, True, True, False]
    assert isinstance(limiter.try_admit(1, 2.0), Permit)


def test_a_reset_after_many_hours_does_not_delay_calls():
    limiter = RateLimiter(None, None, 1)
    limiter.record(limiter.try_admit(1, 0.0), 0.0, None, limit_headers("requests", 0, "23h59m"))
    assert isinstance(limiter.try_admit(1, 0.0), Permit)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360.0),
        ("120ms", 0.12),
        ("1h2m3.5s", 3723.5),
        ("2m59.56s", 179.56),
        ("1d", 86400.0),
        ("7.66", 7.66),
        ("0", 0.0),
        ("", None),
        (None, None),
        ("soon", None),
        ("-5s", None),
        ("5s and a bit", None),
        ("2026-01-01T00:00:00Z", None),
    ],
)
def test_durations_are_parsed(text, seconds):
    assert read_duration(text) == (None if seconds is None else pytest.approx(seconds))


# Adaptive concurrency


def test_the_concurrency_halves_once_per_round_trip_and_recovers_slowly():
    async def run():
        concurrency = AdaptiveConcurrency(100)
        limits_seen = []
        for _ in range(3):
            numbers = [await concurrency.__aenter__() for _ in range(concurrency.limit)]
            for number in numbers:
                concurrency.decrease(number)
                await concurrency.__aexit__()
            limits_seen.append(concurrency.limit)
        for _ in range(10):  # round trips
            for _ in range(concurrency.limit):
                concurrency.increase()
            limits_seen.append(concurrency.limit)
        for _ in range(10_000):
            concurrency.increase()
        return [*limits_seen, concurrency.limit]

    limits_seen = asyncio.run(run())
    assert limits_seen[:3] == [50, 25, 12]
    assert all(0 <= after - before <= 1 for before, after in pairwise(limits_seen[2:-1]))
    assert limits_seen[-2] >= 20
    assert limits_seen[-1] == 100


def test_the_limit_holds_while_it_changes_and_cancelled_calls_free_their_slots():
    async def run():
        concurrency = AdaptiveConcurrency(8)
        in_flight, most = 0, []

        async def call(index):
            nonlocal in_flight
            async with concurrency as number:
                in_flight += 1
                most.append(in_flight)
                try:
                    await asyncio.sleep(0.001)
                finally:
                    in_flight -= 1
            if index == 20:
                concurrency.decrease(number)

        calls = [asyncio.create_task(call(index)) for index in range(60)]
        await asyncio.sleep(0)
        for index in (3, 30, 31, 59):
            calls[index].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return most, concurrency

    most, concurrency = asyncio.run(run())
    assert len(most) >= 56
    assert max(most) == 8
    assert max(most[-20:]) == 4 == concurrency.limit
    assert concurrency._in_flight == 0


# Over HTTP


def test_http_429_lowers_the_concurrency():
    received = []

    def respond(body):
        received.append(body)
        return Reply(status=429) if len(received) <= 8 else Reply('{"ranking": ["A", "B"]}', delay=0.05)

    with LoopbackEndpoint(respond) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url, max_concurrency=8)
        outcomes = ranker.rank([RankingRequest(f"Question {index}?", ("a", "b")) for index in range(16)])
        limit = ranker._client._meter.concurrency.limit
        ranker.close()
    assert [type(outcome).__name__ for outcome in outcomes] == ["RankingResult"] * 16
    assert 4 <= limit < 8


def test_headers_delay_the_next_call():
    headers = {**limit_headers("requests", 0, "700ms"), **limit_headers("tokens", 9000, "1s", limit=10_000)}
    replies = iter([Reply('{"ranking": ["A", "B"]}', headers=headers)])
    with LoopbackEndpoint(lambda body: next(replies, None) or Reply('{"ranking": ["A", "B"]}')) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url)
        ranker.rank([RankingRequest("One?", ("a", "b"))])
        seconds = asyncio.run(timed(lambda: ranker.rank([RankingRequest("Two?", ("a", "b"))])))
        ranker.close()
    assert seconds >= 0.6


async def timed(function):
    loop = asyncio.get_running_loop()
    started = loop.time()
    await asyncio.to_thread(function)
    return loop.time() - started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rpm": 0}, "rpm.*got 0"),
        ({"tpm": 4000, "num_processes": 8}, "each of 8 processes.*max_tokens.*=1024.*got 4000"),
        ({"num_processes": 0}, "num_processes.*got 0"),
    ],
)
def test_invalid_limits_raise(options, message):
    with pytest.raises(ValueError, match=message):
        LLMRanker("judge", "http://127.0.0.1:1/v1", **options)


PROCESS = """
import sys
from cyclealign_trl.chat import limits
from cyclealign_trl import LLMRanker, RankingRequest, RankingResult
address, minute, limit, value, count = sys.argv[1:]
limits._MINUTE = float(minute)
ranker = LLMRanker("judge", address, max_tokens=64, max_concurrency=64, **{limit: float(value)})
requests = [RankingRequest(f"{index}: why?", ("merit 1: a", "merit 2: b")) for index in range(int(count))]
outcomes = ranker.rank(requests)
ranker.close()
assert all(isinstance(outcome, RankingResult) for outcome in outcomes), outcomes
"""


def run_processes(num, address, minute, limit, value, count):
    command = [sys.executable, "-c", PROCESS, address, str(minute), limit, str(value), str(count)]
    environment = {**os.environ, "WORLD_SIZE": str(num)}
    processes = [subprocess.Popen(command, env=environment) for _ in range(num)]
    assert [process.wait() for process in processes] == [0] * num


@pytest.mark.parametrize(("limit", "value"), [("rpm", 40), ("tpm", 16_000)])
def test_all_processes_together_keep_to_the_limit(limit, value):
    with running(latency=0.1, transit=0.4) as server:
        run_processes(4, server.base_url, 2.0, limit, value, count=25)
        most_calls, most_tokens = most_within(2.0, server.stats()["calls"])
    most = {"rpm": most_calls, "tpm": most_tokens}[limit]
    assert 0.5 * value <= most <= value


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "value", "count"), [("rpm", 600, 180), ("tpm", 240_000, 180)])
def test_eight_processes_keep_to_a_limit_per_real_minute(limit, value, count):
    assert limits._MINUTE == 60.0
    with running(latency=0.5, transit=0.5) as server:
        run_processes(8, server.base_url, 60.0, limit, value, count)
        most_calls, most_tokens = most_within(60.0, server.stats()["calls"])
    most = {"rpm": most_calls, "tpm": most_tokens}[limit]
    print(f"{limit}={value}: at most {most} in any 60 s")
    assert 0.9 * value <= most <= value
