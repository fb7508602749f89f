"""An endpoint that fails in every way, and a process that is killed: no ranking is wrong, lost or paid for twice."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from cyclealign_trl.chat import client
from cyclealign_trl.rankers.cache import CachedRanker
from cyclealign_trl.rankers.llm import LLMRanker
from cyclealign_trl.types import RankingFailure, RankingRequest
from tests.judge_server import FAULTS, fault_of, running

REASONS = {
    "429": "rate_limited",
    "429 with Retry-After": "rate_limited",
    "500": "server_error",
    "502": "server_error",
    "reset": "connection",
    "slow body": "timeout",
    "broken JSON": "invalid_response",
    "wrong shape": "invalid_response",
    "no choices": "invalid_response",
    "refusal": "refusal",
    "length": "truncated",
    "wrong content type": "invalid_response",
    "redirect": "redirect",
}
ATTEMPTS = 4


def make_requests(num):
    """Requests whose completions say what they are worth, and the order that is right for each."""
    requests, orders = [], []
    for number in range(num):
        merits = random.Random(number).sample(range(100), 4)
        requests.append(RankingRequest(f"{number}: why?", tuple(f"merit {merit}: text" for merit in merits)))
        orders.append(tuple(sorted(range(4), key=lambda index, merits=merits: -merits[index])))
    return requests, orders


def memory():
    """Megabytes that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def check(num, ratio, **options):
    """Ranks at an endpoint that fails for a share of the prompts, and checks every outcome; returns what was seen."""
    requests, orders = make_requests(num)
    outcomes, held = [None] * num, []
    with (
        running(fault_ratio=ratio) as server,
        closing(LLMRanker("judge", server.base_url, api_key="sk-secret", improve=False, **options)) as ranker,
    ):
        for count, (position, outcome) in enumerate(ranker.stream(requests), start=1):
            assert outcomes[position] is None
            outcomes[position] = outcome
            if count % (num // 10) == 0:
                held.append(memory())
        stats = server.stats()
    seen = Counter()
    for number, (outcome, order) in enumerate(zip(outcomes, orders, strict=True)):
        fault, times = fault_of(number, ratio)
        if times >= ATTEMPTS:
            assert isinstance(outcome, RankingFailure), (number, fault)
            assert outcome.reason == REASONS[fault], (number, fault, outcome)
            seen[outcome.reason] += 1
        else:
            assert getattr(outcome, "order", outcome) == order, (number, fault)
        # Each is asked for once, and once more after each fault.
        assert stats["asked"][str(number)] == min(times + 1, ATTEMPTS) == outcome.usage.attempts, (number, fault)
    assert stats["strangers"] == 0
    return seen, held, stats


def test_with_one_prompt_in_two_faulted_all_is_right_or_a_failure_of_its_kind(monkeypatch):
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)
    assert set(REASONS) == set(FAULTS)
    seen, _, _ = check(260, 0.5, timeout=3.0, max_concurrency=64)
    assert set(seen) == set(REASONS.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_rankings_one_in_five_faulted():
    seen, held, stats = check(10_000, 0.2, timeout=4.0, max_concurrency=128)
    print(f"failures {dict(seen)}; {len(stats['calls'])} calls; memory in MB {[round(mb) for mb in held]}")
    assert set(seen) == set(REASONS.values())
    assert max(held[2:]) - held[1] < 20


KILLED = """
import sys
from cyclealign_trl import CachedRanker, LLMRanker
from tests.rankers.test_faults import make_requests
address, path = sys.argv[1:]
ranker = CachedRanker(LLMRanker("judge", address, max_concurrency=16, improve=False), path)
ranker.rank(make_requests(400)[0])
"""


@pytest.mark.parametrize("latency", [0.0, 0.2])
def test_after_a_kill_no_more_is_asked_again_than_was_in_flight(tmp_path, latency):
    path = tmp_path / "rankings.sqlite"
    root = Path(__file__).parents[2]
    with running(latency=latency) as server:
        command = [sys.executable, "-c", KILLED, server.base_url, str(path)]
        process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
        while len(server.stats()["calls"]) < 100:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        requests, orders = make_requests(400)
        with (
            closing(LLMRanker("judge", server.base_url, max_concurrency=16, improve=False)) as ranker,
            closing(CachedRanker(ranker, path)) as cached,
        ):
            outcomes = cached.rank(requests)
        asked = server.stats()["asked"]
    assert [outcome.order for outcome in outcomes] == orders
    assert len(asked) == 400
    assert sum(count - 1 for count in asked.values()) <= 16
