"""Measure concurrent rankings per second at an endpoint with a fixed latency, compared with the ideal.

    python benchmarks/ranker_concurrency.py --latency 0.5 --concurrency 16 64 256 1000

The endpoint runs in another process. The time includes opening connections, but not creating the ranker. The ideal is
`concurrency / latency`. The baseline makes the same calls at the same concurrency, each with a new `openai` client.
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


def measure_ranker(base_url: str, requests: list[RankingRequest], concurrency: int) -> tuple[float, float, int]:
    """Return seconds, CPU seconds and the number of failures of `LLMRanker`."""
    ranker = LLMRanker("judge", base_url, api_key="none", max_concurrency=concurrency, max_retries=0, improve=False)
    try:
        start, cpu_start = time.perf_counter(), time.process_time()
        outcomes = ranker.rank(requests)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    finally:
        ranker.close()
    failed = sum(not isinstance(outcome, RankingResult) or outcome.order != ORDER for outcome in outcomes)
    return seconds, cpu_seconds, failed


def measure_baseline(base_url: str, requests: list[RankingRequest], concurrency: int) -> tuple[float, int]:
    """Return seconds and the number of failures with a new client per call."""
    semaphore = asyncio.Semaphore(concurrency)

    async def rank(request: RankingRequest) -> bool:
        async with semaphore, AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
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
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.5, help="Seconds per ranking.")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 64, 256, 1000], help="Calls in flight.")
    parser.add_argument("--rounds", type=int, default=8, help="Rankings per call in flight.")
    args = parser.parse_args()
    command = [sys.executable, str(SERVER), "--latency", str(args.latency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    base_url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
    load = os.getloadavg()[0]
    print(f"{args.latency:g} s per call, {os.cpu_count()} cores, load {load:.1f} before; rankings/s (failed)")
    print("concurrency  ideal  LLMRanker       CPU ms each  a client per call  ratio")
    try:
        for concurrency in args.concurrency:
            num = args.rounds * concurrency
            requests = [RankingRequest(f"{index}: a question?", COMPLETIONS) for index in range(num)]
            seconds, cpu_seconds, failed = measure_ranker(base_url, requests, concurrency)
            sample = requests[: max(concurrency, 256)]  # all requests would take minutes
            baseline_seconds, baseline_failed = measure_baseline(base_url, sample, concurrency)
            ideal = concurrency / args.latency
            rate, baseline_rate = num / seconds, len(sample) / baseline_seconds
            print(
                f"{concurrency:11d}  {ideal:5.0f}  {rate:6.0f} ({failed:4d})   {1000 * cpu_seconds / num:11.2f}"
                f"  {baseline_rate:6.0f} ({baseline_failed:4d})     {rate / baseline_rate:5.1f}",
                flush=True,
            )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
