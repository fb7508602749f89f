"""Single calls: when each can be made, and what it used."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace

from ..types import Usage
from .budget import BUDGET_EXHAUSTED, Budget
from .limits import AdaptiveConcurrency, Permit, RateLimiter
from .messages import Messages, message_bytes
from .responses import CallError, Response, holds_error, read_reasoning_tokens, read_usage

# Above the usual value of English and Chinese, until the endpoint has reported a first usage.
_TOKENS_PER_BYTE = 1 / 3
_MARGIN = 1.25  # shortest reply to reserve, relative to the longest recent one
_UNBILLED = Usage(cost=0.0)


class Meter:
    """Make calls as soon as concurrency, budget and rate limits allow, and record the usage of each with all three.

    Args:
        concurrency: Limit on the calls in flight.
        budget: Budget that the calls are reserved in. It must not be reserved from elsewhere.
        rate_limiter: Limits per minute.
    """

    def __init__(self, concurrency: AdaptiveConcurrency, budget: Budget, rate_limiter: RateLimiter) -> None:
        self.concurrency = concurrency
        self.budget = budget
        self._rate_limiter = rate_limiter
        self.reasoning_tokens = 0  # of all calls
        self._tokens_per_byte: float | None = None
        self._reply_tokens = 0.0  # of the longest recent reply
        self._budget_changed = asyncio.Event()

    async def call(
        self,
        messages: Messages,
        max_tokens: int,
        send: Callable[[int], Awaitable[Response | CallError]],
        *,
        adjustable: bool = False,
    ) -> tuple[Response | CallError, Usage | None]:
        """Make one call.

        Args:
            messages: The chat messages.
            max_tokens: Maximum number of tokens in the reply.
            send: Function that sends the request with a maximum number of tokens in the reply.
            adjustable: Whether this maximum can be lower than `max_tokens`, to use up a budget that does not allow
                that many. It is never lower than what recent replies needed.

        Returns:
            The response or error, and the usage of the call, which is `None` if the budget did not allow it.
        """
        num_bytes = message_bytes(messages) or 1
        expected = Usage(math.ceil(num_bytes * (self._tokens_per_byte or _TOKENS_PER_BYTE)), max_tokens)
        async with self.concurrency as call_number:
            reserved = await self._reserve(expected, adjustable)
            if reserved is None:
                detail = f"The run has spent {self.budget}; the next call could take {self.budget.describe(expected)}."
                return CallError(BUDGET_EXHAUSTED, detail, final=True), None
            expected = reserved
            permit: Permit | None = None
            answer: Response | CallError | None = None
            usage: Usage | None = None
            try:
                permit = await self._rate_limiter.admit(expected.prompt_tokens + expected.completion_tokens)
                answer = await send(expected.completion_tokens)
                usage = _read_usage(answer)
            finally:
                # A cancelled or unanswered call can be billed all the same, so it counts as expected.
                billed = expected if usage is None and permit is not None else usage or Usage(attempts=0)
                self.budget.settle(expected, billed)
                self._budget_changed.set()
                if permit is not None:
                    headers = answer.headers if isinstance(answer, Response) else {}
                    reported = usage if usage is not None and usage.prompt_tokens else None
                    self._rate_limiter.record(permit, asyncio.get_running_loop().time(), reported, headers)
        if isinstance(answer, Response) and answer.status == 429:
            self.concurrency.decrease(call_number)
        elif isinstance(answer, Response) and answer.status < 300:
            self.concurrency.increase()
        if isinstance(answer, Response):
            self.reasoning_tokens += read_reasoning_tokens(answer.body)
        if usage is not None and usage.completion_tokens:
            self._reply_tokens = max(usage.completion_tokens, 0.99 * self._reply_tokens)
        if usage is not None and usage.prompt_tokens:
            # A decaying maximum: limits are better missed from below.
            self._tokens_per_byte = max(usage.prompt_tokens / num_bytes, 0.99 * (self._tokens_per_byte or 0.0))
        return answer, Usage() if usage is None else self.budget.priced(usage)

    async def _reserve(self, expected: Usage, adjustable: bool) -> Usage | None:
        """Reserve a call, waiting for calls in flight if the budget depends on what they use.

        Returns:
            The reserved usage, with a shorter reply if the budget does not allow the expected one. `None` if it does
            not allow the shortest one either.
        """
        while True:
            reserved = self.budget.reserve(expected)
            if reserved:
                return expected
            if reserved is None:
                self._budget_changed.clear()
                await self._budget_changed.wait()
                continue
            shortest = math.ceil(_MARGIN * self._reply_tokens)
            if not adjustable or not 0 < shortest < expected.completion_tokens:
                return None
            expected = replace(expected, completion_tokens=max(shortest, expected.completion_tokens // 2))


def _read_usage(answer: Response | CallError) -> Usage | None:
    """Return the reported usage, none for a call that was not served, and `None` if the usage is unknown."""
    if isinstance(answer, CallError):
        return _UNBILLED if answer.unsent else None
    return read_usage(answer.body) or (_UNBILLED if answer.status >= 300 or holds_error(answer.body) else None)
