"""How many rankings a second, and how close that comes to the ideal, against an endpoint that takes a fixed time each.

    python benchmarks/ranker_concurrency.py --latency 0.5 --concurrency 16 64 256 1000

The endpoint runs in a process of its own. Building the ranker is not counted, setting up its connections is. The
ideal is `concurrency / latency`. Beside it, such calls with a new `openai` client for each of them, as many at once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from openai import AsyncOpenAI, OpenAIError

from cyclealign_trl.rankers.llm import LLMRanker
from cyclealign_trl.rankers.parsing import parse_ranking
from cyclealign_trl.rankers.prompts import build_messages, labels
from cyclealign_trl.types import RankingRequest, RankingResult

SERVER = Path(__file__).parents[1] / "tests" / "judge_server.py"
COMPLETIONS = ("merit 1: one.", "merit 3: three.", "merit 2: two.")
ORDER = (1, 2, 0)


def ours(base_url: str, requests: list[RankingRequest], concurrency: int) -> tuple[float, float, int]:
    """Seconds that the rankings take, the first connections included, those of the CPU, and how many failed."""
    ranker = LLMRanker("judge", base_url, api_key="none", max_concurrency=concurrency, max_retries=0, improve=False)
    try:
        start, cpu_start = time.perf_counter(), time.process_time()
        outcomes = ranker.rank(requests)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    finally:
        ranker.close()
    failed = sum(not isinstance(outcome, RankingResult) or outcome.order != ORDER for outcome in outcomes)
    return seconds, cpu_seconds, failed


def naive(base_url: str, requests: list[RankingRequest], concurrency: int) -> tuple[float, int]:
    """The same with a client per call."""
    slots = asyncio.Semaphore(concurrency)

    async def rank(request: RankingRequest) -> bool:
        async with slots, AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
            messages = build_messages(request.prompt, request.completions, improve=False)
            try:
                reply = await client.chat.completions.create(model="judge", messages=messages)  # type: ignore[arg-type]
            except OpenAIError:
                return False
            return parse_ranking(reply.choices[0].message.content or "", labels(3)).order == ORDER

    async def rank_all() -> list[bool]:
        return await asyncio.gather(*map(rank, requests))

    start = time.perf_counter()
    outcomes = asyncio.run(rank_all())
    return time.perf_counter() - start, outcomes.count(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count concurrent rankings per second at a slow loopback endpoint.")
    parser.add_argument(
        "--latency", type=float, default=0.5, help="seconds the endpoint takes per ranking (default: %(default)s)"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[16, 64, 256, 1000],
        help="calls in flight (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=8, help="rankings per call in flight (default: %(default)s)")
    arguments = parser.parse_args()
    command = [sys.executable, str(SERVER), "--latency", str(arguments.latency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    base_url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
    load = os.getloadavg()[0]
    print(f"{arguments.latency:g} s per call, {os.cpu_count()} cores, load {load:.1f} before; rankings/s (failed)")
    print("concurrency  ideal  LLMRanker       CPU ms each  a client per call  ratio")
    try:
        for concurrency in arguments.concurrency:
            num = arguments.rounds * concurrency
            requests = [RankingRequest(f"{index}: a question?", COMPLETIONS) for index in range(num)]
            seconds, cpu_seconds, failed = ours(base_url, requests, concurrency)
            few = requests[: max(concurrency, 256)]  # all of them would take minutes
            their_seconds, their_failed = naive(base_url, few, concurrency)
            ideal = concurrency / arguments.latency
            rate, their_rate = num / seconds, len(few) / their_seconds
            print(
                f"{concurrency:11d}  {ideal:5.0f}  {rate:6.0f} ({failed:4d})   {1000 * cpu_seconds / num:11.2f}"
                f"  {their_rate:6.0f} ({their_failed:4d})     {rate / their_rate:5.1f}",
                flush=True,
            )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
