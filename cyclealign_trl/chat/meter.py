"""One call after the other: when it may be made, and what it took."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

from ..types import Usage
from .budget import BUDGET_EXHAUSTED, Budget
from .limits import AdaptiveConcurrency, Permit, RateLimiter
from .messages import message_bytes
from .responses import Response, Setback, read_usage

_TOKENS_PER_BYTE = 1 / 3  # more than usual in English and Chinese alike, until the endpoint has counted once


class Meter:
    """Makes calls as soon as concurrency, budget and limits allow, and settles with all three what each took.

    Args:
        concurrency: Bounds the calls in flight.
        budget: What may be spent. Nobody else may reserve there.
        rate_limiter: What may be sent per minute.
        max_tokens: Tokens that a reply may take.
    """

    def __init__(
        self, concurrency: AdaptiveConcurrency, budget: Budget, rate_limiter: RateLimiter, max_tokens: int
    ) -> None:
        self.concurrency = concurrency
        self.budget = budget
        self._rate_limiter = rate_limiter
        self._max_tokens = max_tokens
        self._tokens_per_byte: float | None = None
        self._settled = asyncio.Event()

    async def call(
        self, messages: list[dict[str, str]], send: Callable[[], Awaitable[Response | Setback]]
    ) -> tuple[Response | Setback, Usage | None]:
        """Makes one call.

        Args:
            messages: What is sent.
            send: Sends it.

        Returns:
            What came back, and what the call took; `None` if the budget did not allow for it.
        """
        num_bytes = message_bytes(messages) or 1
        expected = Usage(math.ceil(num_bytes * (self._tokens_per_byte or _TOKENS_PER_BYTE)), self._max_tokens)
        async with self.concurrency as number:
            if not await self._reserve(expected):
                detail = f"Spent are {self.budget}, and the next call may take {self.budget.describe(expected)}."
                return Setback(BUDGET_EXHAUSTED, detail, final=True), None
            permit: Permit | None = None
            answer: Response | Setback | None = None
            usage: Usage | None = None
            try:
                permit = await self._rate_limiter.admit(expected.prompt_tokens + expected.completion_tokens)
                answer = await send()
                usage = _usage(answer)
            finally:
                # What was cut off, or never answered, may be billed all the same: it stays at what was expected.
                billed = expected if usage is None and permit is not None else usage or Usage(attempts=0)
                self.budget.settle(expected, billed)
                self._settled.set()
                if permit is not None:
                    headers = answer.headers if isinstance(answer, Response) else {}
                    counted = usage if usage is not None and usage.prompt_tokens else None
                    self._rate_limiter.settle(permit, asyncio.get_running_loop().time(), counted, headers)
        if isinstance(answer, Response) and answer.status == 429:
            self.concurrency.too_many(number)
        elif isinstance(answer, Response) and answer.status < 300:
            self.concurrency.fine()
        if usage is not None and usage.prompt_tokens:
            # The most of late: limits would rather be missed from below.
            self._tokens_per_byte = max(usage.prompt_tokens / num_bytes, 0.99 * (self._tokens_per_byte or 0.0))
        return answer, Usage() if usage is None else self.budget.priced(usage)

    async def _reserve(self, expected: Usage) -> bool:
        """Waits for calls in flight where the budget depends on what they take; returns whether it suffices."""
        while (reserved := self.budget.reserve(expected)) is None:
            self._settled.clear()
            await self._settled.wait()
        return reserved


def _usage(answer: Response | Setback) -> Usage | None:
    """What a call took: as the reply says, else nothing where the endpoint did not serve it; `None` is unknown."""
    if isinstance(answer, Setback):
        return Usage() if answer.unsent else None
    return read_usage(answer.body) or (Usage() if answer.status >= 300 else None)
