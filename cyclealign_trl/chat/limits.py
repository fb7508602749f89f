"""How fast an endpoint may be asked: calls at once, requests and tokens per minute, and what its headers say is left.

Nothing here waits for anything but its turn, and all of it lives on one event loop. Times are readings of its clock.
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
from .responses import read_rate_limit

_MINUTE = 60.0  # seconds; shorter in tests
_MARGIN = 1.02  # our minute over the endpoint's
_TRANSIT = 3.0  # seconds that a request may be under way before it counts at the endpoint
_LONGEST_PAUSE = 600.0  # seconds; a reset later than that is no matter of minutes, and every call would hang

_RESOURCES = ("requests", "tokens")


def resolve_num_processes(num_processes: int | None) -> int:
    """The number of processes that share a limit: as given, else what a launcher says (`WORLD_SIZE`), else 1."""
    if num_processes is None:
        return max(1, int(os.environ.get("WORLD_SIZE") or 1))
    if num_processes < 1:
        raise ValueError(f"`num_processes` must be at least 1, or None for WORLD_SIZE; got {num_processes}.")
    return num_processes


class AdaptiveConcurrency:
    """A bound on the calls in flight: it halves where they are too many for the endpoint, and recovers slowly.

    An asynchronous context manager around one call; entering it waits for a free place and gives a number, by which
    `too_many` knows calls that were sent before it halved the bound the last time: those say nothing new.

    Args:
        maximum: Calls in flight at most.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._bound = float(maximum)
        self._in_flight = 0
        self._entered = self._halved_at = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def bound(self) -> int:
        """Calls in flight at most, for now."""
        return int(self._bound)

    async def __aenter__(self) -> int:
        if self._in_flight < self.bound:
            self._in_flight += 1
        else:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # let in, but on the way out
                    await self.__aexit__()
                raise
        self._entered += 1
        return self._entered

    async def __aexit__(self, *exception: object) -> None:
        self._in_flight -= 1
        self._let_in()

    def too_many(self, number: int) -> None:
        """Halves the bound, once per round trip: the endpoint had too many calls to take this one."""
        if number > self._halved_at:
            self._halved_at = self._entered
            self._bound = max(1.0, self._bound / 2)

    def fine(self) -> None:
        """Raises the bound by one per round trip: the endpoint took a call."""
        self._bound = min(self._maximum, self._bound + 1 / self._bound)
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._in_flight < self.bound:
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_flight += 1
                turn.set_result(None)


@dataclass(eq=False, slots=True)
class _Stay:
    """What one call takes up of a window, until it is gone."""

    amount: int
    gone: bool = False


class _Window:
    """What was sent in the last minute, as the endpoint may see it.

    A request reaches the endpoint some time between being sent and being answered. So that no jitter can push two
    windows into one at the endpoint, it counts for a minute from its answer, or from `_TRANSIT` after being sent.

    Args:
        per_minute: What may be sent in a minute. Below 1, one is sent in a longer window.
    """

    def __init__(self, per_minute: float) -> None:
        self._limit = max(1, math.floor(per_minute))
        self._length = _MINUTE * _MARGIN * max(1.0, 1 / per_minute)
        self._used = 0
        self._leaving: list[tuple[float, int, _Stay]] = []  # a heap; a stay is in it twice once it has ended
        self._count = 0

    def wait(self, amount: int, now: float) -> float:
        """Seconds until there may be room; 0 if there is. What is more than the limit goes alone."""
        while self._leaving and (self._leaving[0][0] <= now or self._leaving[0][2].gone):
            stay = heapq.heappop(self._leaving)[2]
            if not stay.gone:
                stay.gone = True
                self._used -= stay.amount
        if self._used + min(amount, self._limit) <= self._limit:
            return 0.0
        return self._leaving[0][0] - now

    def enter(self, amount: int, now: float) -> _Stay:
        stay = _Stay(amount)
        self._used += amount
        self._leave(stay, now + _TRANSIT)
        return stay

    def end(self, stay: _Stay, amount: int, now: float) -> None:
        """The call is over, and took that much."""
        if not stay.gone:
            self._used += amount - stay.amount
            stay.amount = amount
            self._leave(stay, now)

    def _leave(self, stay: _Stay, arrived: float) -> None:
        self._count += 1  # keeps the heap from comparing stays
        heapq.heappush(self._leaving, (arrived + self._length, self._count, stay))


class _Told:
    """What the endpoint's headers say is left of one resource, less what was sent since."""

    def __init__(self) -> None:
        self._sent = 0  # in all
        self._left = math.inf
        self._limit = math.inf
        self._resets_at = -math.inf
        self._resets_in = 0.0
        self._latest = -1

    def wait(self, amount: int, now: float) -> float:
        """Seconds until there is enough; 0 if there is."""
        if self._left >= min(amount, self._limit):
            return 0.0
        if now < self._resets_at:
            return self._resets_at - now
        self._left, self._resets_at = self._limit, now + self._resets_in
        return 0.0

    def send(self, amount: int) -> int:
        """Counts what is sent; returns how much that is in all, for `hear`."""
        self._left -= amount
        self._sent += amount
        return self._sent

    def hear(self, sent: int, limit: float | None, left: float, resets_in: float, now: float) -> None:
        """Takes in what came back with a call; it knows of nothing that was sent later."""
        if sent <= self._latest or resets_in > _LONGEST_PAUSE:
            return
        self._latest = sent
        self._left = left - (self._sent - sent)
        self._limit = math.inf if limit is None else limit
        self._resets_in = resets_in
        self._resets_at = now + resets_in


@dataclass(frozen=True, slots=True)
class Permit:
    """One call that was let through: what it is expected to take, and where that was noted."""

    tokens: int
    stays: tuple[_Stay | None, ...]
    sent: tuple[int, ...]


class RateLimiter:
    """Lets calls through one after the other, in the order in which they ask, as fast as the limits allow.

    Args:
        rpm: Requests per minute, over all processes. `None` means no limit.
        tpm: Tokens per minute, sent and received, over all processes. `None` means no limit.
        num_processes: Processes that share the limits: each takes an equal part.
    """

    def __init__(self, rpm: float | None, tpm: float | None, num_processes: int) -> None:
        self._windows = [None if limit is None else _Window(limit / num_processes) for limit in (rpm, tpm)]
        self._told = [_Told() for _ in _RESOURCES]
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    async def admit(self, tokens: int) -> Permit:
        """Waits until a call that may take so many tokens can be sent."""
        async with self._turn:
            while isinstance(answer := self.try_admit(tokens, asyncio.get_running_loop().time()), float):
                self._changed.clear()
                try:
                    async with asyncio.timeout(answer):
                        await self._changed.wait()  # a call that is over may have taken less than expected
                except TimeoutError:
                    pass
        return answer

    def try_admit(self, tokens: int, now: float) -> Permit | float:
        """Lets a call through, or says in how many seconds to ask again."""
        amounts = (1, tokens)
        waits = [
            part.wait(amount, now)
            for parts in (self._windows, self._told)
            for part, amount in zip(parts, amounts, strict=True)
            if part is not None
        ]
        if max(waits) > 0:
            return max(waits)
        return Permit(
            tokens,
            tuple(
                None if window is None else window.enter(amount, now)
                for window, amount in zip(self._windows, amounts, strict=True)
            ),
            tuple(told.send(amount) for told, amount in zip(self._told, amounts, strict=True)),
        )

    def settle(self, permit: Permit, now: float, usage: Usage | None, headers: Mapping[str, str]) -> None:
        """A call is over.

        Args:
            permit: What `admit` gave for it.
            now: The time.
            usage: What it took. `None` leaves it at what was expected.
            headers: Those of the response.
        """
        amounts = (1, permit.tokens if usage is None else usage.prompt_tokens + usage.completion_tokens)
        for window, stay, amount in zip(self._windows, permit.stays, amounts, strict=True):
            if window is not None and stay is not None:
                window.end(stay, amount, now)
        for told, sent, resource in zip(self._told, permit.sent, _RESOURCES, strict=True):
            limit = read_rate_limit(headers, resource)
            if limit is not None:
                told.hear(sent, limit.limit, limit.remaining, limit.resets_in, now)
        self._changed.set()
