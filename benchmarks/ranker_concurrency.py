"""How close concurrent rankings come to the ideal: N rankings against an endpoint that takes a fixed time for each.

    python benchmarks/ranker_concurrency.py --num 64 --delay 1.0

The endpoint runs in a process of its own. Building the ranker is not counted, setting up its connections is. The
ideal is `ceil(num / concurrency) * delay`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

from cyclealign_trl.demo.endpoint import LoopbackEndpoint, Reply
from cyclealign_trl.rankers.llm import LLMRanker
from cyclealign_trl.types import RankingRequest, RankingResult

CONCURRENCIES = (64, 32, 16)


def serve(delay: float, pipe: Connection) -> None:
    """Serves until the other end of the pipe says something, or goes away."""

    def respond(_: dict[str, Any]) -> Reply:
        return Reply('{"ranking": ["B", "A", "C"], "improved_response": "Better."}', delay=delay)

    with LoopbackEndpoint(respond) as endpoint:
        pipe.send(endpoint.base_url)
        pipe.poll(None)


def measure(base_url: str, num: int, concurrency: int) -> float:
    """Seconds that `num` rankings take, the first connections included."""
    requests = [RankingRequest(f"Question {index}?", ("One.", "Two.", "Three.")) for index in range(num)]
    ranker = LLMRanker("loopback", base_url, api_key="none", max_concurrency=concurrency, max_retries=0)
    try:
        start = time.perf_counter()
        outcomes = ranker.rank(requests)
        seconds = time.perf_counter() - start
    finally:
        ranker.close()
    failures = [outcome for outcome in outcomes if not isinstance(outcome, RankingResult)]
    if failures:
        raise SystemExit(f"{len(failures)} of {num} rankings failed, the first with {failures[0]}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Time concurrent rankings against a slow loopback endpoint.")
    parser.add_argument("--num", type=int, default=64, help="rankings per measurement (default: %(default)s)")
    parser.add_argument(
        "--delay", type=float, default=1.0, help="seconds the endpoint takes per ranking (default: %(default)s)"
    )
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(arguments.delay, theirs), daemon=True)
    server.start()
    base_url = ours.recv()
    print(f"{arguments.num} rankings, {arguments.delay:g} s each, best of three")
    print("concurrency  seconds  ideal  ratio")
    for concurrency in CONCURRENCIES:
        seconds = min(measure(base_url, arguments.num, concurrency) for _ in range(3))
        ideal = math.ceil(arguments.num / concurrency) * arguments.delay
        print(f"{concurrency:11d}  {seconds:7.3f}  {ideal:5.1f}  {seconds / ideal:5.2f}", flush=True)
    ours.send(None)
    server.join()


if __name__ == "__main__":
    main()
