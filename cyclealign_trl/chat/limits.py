"""Limits on the speed of calls: calls in flight, requests and tokens per minute, and the endpoint's own headers.

Everything here lives on one event loop. Times are readings of the loop's clock, in seconds.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from ..types import Usage
from .responses import RateLimit, read_rate_limit

_MINUTE = 60.0  # seconds; tests shorten it
_MARGIN = 1.02  # our clock against the endpoint's
_TRANSIT = 3.0  # seconds after which a request has reached the endpoint
_MAX_PAUSE = 600.0  # seconds; waiting for a later reset, such as a daily one, would make every call hang

_RESOURCES = ("requests", "tokens")


def resolve_num_processes(num_processes: int | None) -> int:
    """Return the number of processes that share a limit, read from the launcher's `WORLD_SIZE` if not given.

    Raises:
        ValueError: If the number is below 1.
    """
    if num_processes is None:
        return max(1, int(os.environ.get("WORLD_SIZE") or 1))
    if num_processes < 1:
        raise ValueError(f"`num_processes` must be at least 1, or None to read WORLD_SIZE, got {num_processes}.")
    return num_processes


class AdaptiveConcurrency:
    """Limit on the calls in flight that halves when the endpoint is overloaded and recovers slowly.

    Use it as an asynchronous context manager around each call. Entering waits for a free slot and returns the call's
    number, which `decrease` takes.

    Args:
        maximum: Maximum number of calls in flight.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._limit = float(maximum)
        self._in_flight = 0
        self._num_calls = self._decreased_at = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        """Current maximum number of calls in flight."""
        return int(self._limit)

    async def __aenter__(self) -> int:
        if self._in_flight < self.limit:
            self._in_flight += 1
        else:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # the slot was already assigned
                    await self.__aexit__()
                raise
        self._num_calls += 1
        return self._num_calls

    async def __aexit__(self, *exception: object) -> None:
        self._in_flight -= 1
        self._assign_slots()

    def decrease(self, call_number: int) -> None:
        """Halve the limit because the endpoint rejected a call.

        Calls that started before the last decrease do not count: the endpoint received them under the old limit.
        """
        if call_number > self._decreased_at:
            self._decreased_at = self._num_calls
            self._limit = max(1.0, self._limit / 2)

    def increase(self) -> None:
        """Raise the limit after a call that the endpoint accepted, by 1 per round trip of all calls."""
        self._limit = min(self._maximum, self._limit + 1 / self._limit)
        self._assign_slots()

    def _assign_slots(self) -> None:
        while self._waiting and self._in_flight < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_flight += 1
                turn.set_result(None)


@dataclass(eq=False, slots=True)
class _WindowEntry:
    """Amount that one call occupies in a window until it expires."""

    amount: int
    expired: bool = False


class _Window:
    """Amount that was sent in the last minute, as the endpoint can see it.

    A request reaches the endpoint at an unknown time, at the latest `_TRANSIT` after being sent or when it is
    answered. It counts for a minute from the earlier of the two, so that no jitter can push two minutes' worth of
    requests into one minute at the endpoint.

    Args:
        per_minute: Limit per minute. Below 1, a single one is sent in a longer window.
    """

    def __init__(self, per_minute: float) -> None:
        self._limit = max(1, math.floor(per_minute))
        self._length = _MINUTE * _MARGIN * max(1.0, 1 / per_minute)
        self._used = 0
        # A heap of (time, tie-breaker, entry). It contains an entry twice after its call has ended.
        self._expiries: list[tuple[float, int, _WindowEntry]] = []
        self._num_scheduled = 0

    def wait(self, amount: int, now: float) -> float:
        """Return the seconds until there can be room, or 0 if there is.

        An amount above the limit waits until the window is empty.
        """
        while self._expiries and (self._expiries[0][0] <= now or self._expiries[0][2].expired):
            entry = heapq.heappop(self._expiries)[2]
            if not entry.expired:
                entry.expired = True
                self._used -= entry.amount
        if self._used + min(amount, self._limit) <= self._limit:
            return 0.0
        return self._expiries[0][0] - now

    def enter(self, amount: int, now: float) -> _WindowEntry:
        entry = _WindowEntry(amount)
        self._used += amount
        self._schedule_expiry(entry, now + _TRANSIT)
        return entry

    def update(self, entry: _WindowEntry, amount: int, now: float) -> None:
        """Replace the expected amount of a call that has ended."""
        if not entry.expired:
            self._used += amount - entry.amount
            entry.amount = amount
            self._schedule_expiry(entry, now)

    def _schedule_expiry(self, entry: _WindowEntry, arrived: float) -> None:
        self._num_scheduled += 1
        heapq.heappush(self._expiries, (arrived + self._length, self._num_scheduled, entry))


class _ReportedQuota:
    """Remaining quota of one resource: the endpoint's last report minus what was sent since."""

    def __init__(self) -> None:
        self._total_sent = 0
        self._remaining = math.inf
        self._limit = math.inf
        self._resets_at = -math.inf
        self._resets_in = 0.0
        self._last_reported = -1  # total sent at the time of the call whose response was last used

    def wait(self, amount: int, now: float) -> float:
        """Return the seconds until there is enough, or 0 if there is."""
        if self._remaining >= min(amount, self._limit):
            return 0.0
        if now < self._resets_at:
            return self._resets_at - now
        self._remaining, self._resets_at = self._limit, now + self._resets_in
        return 0.0

    def send(self, amount: int) -> int:
        """Subtract the amount of a call. Return the total sent so far, which `report` takes."""
        self._remaining -= amount
        self._total_sent += amount
        return self._total_sent

    def report(self, total_sent: int, quota: RateLimit, now: float) -> None:
        """Use the headers of a response, which do not include calls that were sent after its own."""
        if total_sent <= self._last_reported or quota.resets_in > _MAX_PAUSE:
            return
        self._last_reported = total_sent
        self._remaining = quota.remaining - (self._total_sent - total_sent)
        self._limit = math.inf if quota.limit is None else quota.limit
        self._resets_in = quota.resets_in
        self._resets_at = now + quota.resets_in


@dataclass(frozen=True, slots=True)
class Permit:
    """Permission for one call: its expected tokens, and its records for requests and for tokens."""

    tokens: int
    entries: tuple[_WindowEntry | None, ...]
    total_sent: tuple[int, ...]


class RateLimiter:
    """Admit calls one after the other, in the order of their arrival, as fast as the limits allow.

    Args:
        rpm: Requests per minute, over all processes. `None` means no limit.
        tpm: Tokens per minute, sent and received, over all processes. `None` means no limit.
        num_processes: Number of processes that share the limits in equal parts.
    """

    def __init__(self, rpm: float | None, tpm: float | None, num_processes: int) -> None:
        self._windows = [None if limit is None else _Window(limit / num_processes) for limit in (rpm, tpm)]
        self._quotas = [_ReportedQuota() for _ in _RESOURCES]
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    async def admit(self, tokens: int) -> Permit:
        """Wait until a call of so many tokens can be sent."""
        async with self._turn:
            while isinstance(answer := self.try_admit(tokens, asyncio.get_running_loop().time()), float):
                self._changed.clear()
                try:
                    async with asyncio.timeout(answer):
                        await self._changed.wait()  # a call that ends can have used less than expected
                except TimeoutError:
                    pass
        return answer

    def try_admit(self, tokens: int, now: float) -> Permit | float:
        """Admit a call, or return the seconds after which to try again."""
        amounts = (1, tokens)
        waits = [
            limit.wait(amount, now)
            for limits in (self._windows, self._quotas)
            for limit, amount in zip(limits, amounts, strict=True)
            if limit is not None
        ]
        if max(waits) > 0:
            return max(waits)
        return Permit(
            tokens,
            tuple(
                None if window is None else window.enter(amount, now)
                for window, amount in zip(self._windows, amounts, strict=True)
            ),
            tuple(quota.send(amount) for quota, amount in zip(self._quotas, amounts, strict=True)),
        )

    def record(self, permit: Permit, now: float, usage: Usage | None, headers: Mapping[str, str]) -> None:
        """Record the end of a call.

        Args:
            permit: The permit of the call.
            now: The current time.
            usage: Usage of the call. `None` keeps the expected tokens.
            headers: Headers of the response.
        """
        amounts = (1, permit.tokens if usage is None else usage.prompt_tokens + usage.completion_tokens)
        for window, entry, amount in zip(self._windows, permit.entries, amounts, strict=True):
            if window is not None and entry is not None:
                window.update(entry, amount, now)
        for quota, total_sent, resource in zip(self._quotas, permit.total_sent, _RESOURCES, strict=True):
            reported = read_rate_limit(headers, resource)
            if reported is not None:
                quota.report(total_sent, reported, now)
        self._changed.set()
