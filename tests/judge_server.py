"""A judge behind a chat endpoint, in a process of its own, for tests with up to a thousand concurrent calls.

    python tests/judge_server.py --latency 0.5

The process prints its port. Completions state their merit (`merit 3: ...`), and the judge ranks by it. Every prompt
begins with a number. With `--fault_ratio`, the answers to some prompts are faulty, at first or always: see `fault_of`.
`GET /stats` returns the arrival time and the tokens of every call, the number of calls per prompt, the maximum number
of open calls, and the number of calls that followed a redirect.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from aiohttp import web

FAULTS = (
    "429",
    "429 with Retry-After",
    "500",
    "502",
    "reset",
    "slow body",
    "broken JSON",
    "wrong shape",
    "no choices",
    "refusal",
    "length",
    "wrong content type",
    "redirect",
    "error in a success",
    "error in a choice",
    "parts without text",
    "invalid generation",
    "flagged",
    "too long",
    "rejected",
)
COMPLETION = re.compile(r"# Completion ([A-Z]+)\n<data-\w+>\nmerit (\d+):")


@dataclass
class Server:
    """Address and statistics of a running judge."""

    port: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats") as response:
            return json.load(response)


@contextmanager
def running(**options: float) -> Iterator[Server]:
    """Run a judge for the duration of the block."""
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield Server(int(process.stdout.readline()))
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def most_within(seconds: float, calls: list[tuple[float, int]]) -> tuple[int, int]:
    """Return the maximum numbers of calls and of tokens that arrived in any window of the given length."""
    window: deque[tuple[float, int]] = deque()
    most_calls = most_tokens = tokens = 0
    for call in sorted(calls):
        window.append(call)
        tokens += call[1]
        while window[0][0] <= call[0] - seconds:
            tokens -= window.popleft()[1]
        most_calls, most_tokens = max(most_calls, len(window)), max(most_tokens, tokens)
    return most_calls, most_tokens


def fault_of(number: int, ratio: float) -> tuple[str | None, int]:
    """Return the fault of a prompt's answers, and how many answers have it: 1, 2, or 99 for all."""
    chance = random.Random(number)
    if chance.random() >= ratio:
        return None, 0
    return chance.choice(FAULTS), chance.choice((1, 2, 99))


class Judge:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.jitter = random.Random(0)
        self.asked: Counter[int] = Counter()
        self.calls: list[tuple[float, int]] = []  # time of arrival, tokens
        self.open = self.most_open = self.redirected = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            text = await request.read()
            if self.options.transit:
                await asyncio.sleep(self.jitter.uniform(0, self.options.transit))
            return await self._answer(request, json.loads(text))
        finally:
            self.open -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        query = body["messages"][-1]["content"].rpartition("### Instruction")[2]
        number = int(re.search(r"\d+", query.partition("\n")[2].partition("\n")[2])[0])
        merit = {label: int(worth) for label, worth in COMPLETION.findall(query)}
        ranking = sorted(merit, key=lambda label: -merit[label])
        prompt_tokens = sum(len(message["content"]) for message in body["messages"]) // 4
        self.calls.append((time.time(), prompt_tokens + self.options.reply_tokens))
        fault, times = fault_of(number, self.options.fault_ratio)
        self.asked[number] += 1
        if fault is not None and self.asked[number] <= times:
            return await self._fail(request, fault, ranking, prompt_tokens)
        await asyncio.sleep(self.options.latency)
        return web.json_response(self._completion(json.dumps({"ranking": ranking}), prompt_tokens))

    def _completion(self, content: Any, prompt_tokens: int, finish_reason: str = "stop", **message: Any) -> Any:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": self.options.reply_tokens}
        message = {"role": "assistant", "content": content, **message}
        return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage}

    async def _fail(self, request: web.Request, fault: str, ranking: list[str], tokens: int) -> web.StreamResponse:
        wrong = json.dumps({"ranking": ranking[::-1]})  # a client must not accept it in any of these forms
        if fault.startswith("429"):
            headers = {"Retry-After": "0.05"} if "Retry" in fault else {}
            return web.json_response({"error": {"message": wrong}}, status=429, headers=headers)
        if fault in ("500", "502"):
            return web.Response(text=json.dumps(self._completion(wrong, tokens)), status=int(fault))
        if fault == "reset":
            request.transport.abort()
            return web.Response()
        if fault == "slow body":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            with suppress(ConnectionResetError):  # the client times out
                for character in json.dumps(self._completion(wrong, tokens)):
                    await response.write(character.encode())
                    await asyncio.sleep(1.0)
            return response
        if fault == "redirect":
            raise web.HTTPTemporaryRedirect(f"http://localhost:{self.options.port}/redirected")
        if fault in ("flagged", "too long", "rejected"):
            status, message = {
                "flagged": (403, "Your input was flagged."),
                "too long": (400, "The request exceeds the available context size."),
                "rejected": (422, wrong),
            }[fault]
            return web.json_response({"error": {"message": message}}, status=status)
        if fault == "invalid generation":
            error = {"message": wrong, "code": "json_validate_failed", "failed_generation": wrong}
            return web.json_response({"error": error}, status=400)
        parts = [{"type": "thinking", "thinking": wrong}]
        bodies = {
            "error in a success": json.dumps({"error": {"code": 502, "message": wrong}}),
            "error in a choice": json.dumps(self._completion(wrong, tokens, "error")),
            "parts without text": json.dumps(self._completion(parts, tokens)),
            "broken JSON": json.dumps(self._completion(wrong, tokens))[:-9],
            "wrong shape": json.dumps({"choices": {"message": wrong}, "usage": [1]}),
            "no choices": json.dumps({"choices": []}),
            "refusal": json.dumps(self._completion("", tokens, refusal="I will not.")),
            "length": json.dumps(self._completion(wrong, tokens, "length")),
            "wrong content type": f"<html><p>{wrong}</p></html>",
        }
        content_type = "text/html" if fault == "wrong content type" else "application/json"
        return web.Response(text=bodies[fault], content_type=content_type)

    async def redirect_target(self, request: web.Request) -> web.Response:
        """Count calls that followed a redirect, which a client must not do."""
        self.redirected += 1
        return web.json_response(self._completion('{"ranking": []}', 0))

    async def stats(self, request: web.Request) -> web.Response:
        asked = {str(number): count for number, count in self.asked.items()}
        return web.json_response(
            {"calls": self.calls, "asked": asked, "most_open": self.most_open, "redirected": self.redirected}
        )


async def serve(options: argparse.Namespace) -> None:
    judge = Judge(options)
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", judge.answer)
    app.router.add_route("*", "/redirected", judge.redirect_target)
    app.router.add_get("/stats", judge.stats)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
    await site.start()
    options.port = runner.addresses[0][1]
    print(options.port, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scripted judge behind a chat endpoint on loopback.")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before a ranking is sent")
    parser.add_argument("--transit", type=float, default=0.0, help="maximum random delay of a call, in seconds")
    parser.add_argument("--reply_tokens", type=int, default=10, help="completion tokens reported for a reply")
    parser.add_argument("--fault_ratio", type=float, default=0.0, help="share of the prompts with faulty answers")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
