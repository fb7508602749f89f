"""`LLMRanker` with a faulty endpoint and after a kill: no ranking is wrong, lost or paid for twice."""

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
    "error in a success": "server_error",
    "error in a choice": "server_error",
    "parts without text": "unparsable",
    "invalid generation": "unparsable",
    "flagged": "refusal",
    "too long": "too_long",
    "rejected": "rejected",
}
FINAL = ("flagged", "too long", "rejected")  # never retried
ATTEMPTS = 4


def make_requests(num):
    """Return requests whose completions state their merit, and the correct order of each."""
    requests, orders = [], []
    for number in range(num):
        merits = random.Random(number).sample(range(100), 4)
        requests.append(RankingRequest(f"{number}: why?", tuple(f"merit {merit}: text" for merit in merits)))
        orders.append(tuple(sorted(range(4), key=lambda index, merits=merits: -merits[index])))
    return requests, orders


def resident_memory():
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def check_outcomes(num, ratio, **options):
    """Rank with an endpoint that fails for a share of the prompts, and check every outcome.

    Returns the failures by reason, the memory in MB after each tenth of the outcomes, and the server's statistics.
    """
    requests, orders = make_requests(num)
    outcomes, memory = [None] * num, []
    with (
        running(fault_ratio=ratio) as server,
        closing(LLMRanker("judge", server.base_url, api_key="sk-secret", improve=False, **options)) as ranker,
    ):
        for count, (position, outcome) in enumerate(ranker.stream(requests), start=1):
            assert outcomes[position] is None
            outcomes[position] = outcome
            if count % (num // 10) == 0:
                memory.append(resident_memory())
        stats = server.stats()
    failures = Counter()
    for number, (outcome, order) in enumerate(zip(outcomes, orders, strict=True)):
        fault, times = fault_of(number, ratio)
        attempts = ATTEMPTS
        if fault in FINAL:
            times = attempts = 1
        if times >= attempts:
            assert isinstance(outcome, RankingFailure), (number, fault)
            assert outcome.reason == REASONS[fault], (number, fault, outcome)
            failures[outcome.reason] += 1
        else:
            assert getattr(outcome, "order", outcome) == order, (number, fault)
        if fault == "rejected" and number < options["max_concurrency"]:
            # Before the first answer, a rejection can mean that the endpoint refuses a parameter.
            assert 1 <= stats["asked"][str(number)] == outcome.usage.attempts <= 6, number
            continue
        # One call, and one more after each fault.
        assert stats["asked"][str(number)] == min(times + 1, attempts) == outcome.usage.attempts, (number, fault)
    assert stats["redirected"] == 0
    return failures, memory, stats


def test_every_outcome_is_correct_with_faults_for_half_of_the_prompts(monkeypatch):
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)
    assert set(REASONS) == set(FAULTS)
    failures, _, _ = check_outcomes(400, 0.5, timeout=3.0, max_concurrency=64)
    assert set(failures) == set(REASONS.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_rankings_are_correct_in_constant_memory():
    failures, memory, stats = check_outcomes(10_000, 0.2, timeout=4.0, max_concurrency=128)
    print(f"failures {dict(failures)}; {len(stats['calls'])} calls; memory in MB {[round(mb) for mb in memory]}")
    assert set(failures) == set(REASONS.values())
    assert max(memory[2:]) - memory[1] < 20


SCRIPT = """
import sys
from cyclealign_trl import CachedRanker, LLMRanker
from tests.rankers.test_faults import make_requests
address, path = sys.argv[1:]
ranker = CachedRanker(LLMRanker("judge", address, max_concurrency=16, improve=False), path)
ranker.rank(make_requests(400)[0])
"""


@pytest.mark.parametrize("latency", [0.0, 0.2])
def test_a_kill_loses_only_the_calls_in_flight(tmp_path, latency):
    path = tmp_path / "rankings.sqlite"
    root = Path(__file__).parents[2]
    with running(latency=latency) as server:
        command = [sys.executable, "-c", SCRIPT, server.base_url, str(path)]
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
