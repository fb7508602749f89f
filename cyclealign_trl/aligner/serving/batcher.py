"""Requests that wait are answered together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Answers items in threads: as many at once as wait, up to a bound, without waiting for more.

    Items of different keys are never answered together. A batch that fails is tried again one by one, so that no item
    fails because of another. An item whose asker has gone is dropped.

    Args:
        answer: Answers the items of one key, in their order. Called from threads.
        batch_size: Most items of a call.
        max_concurrency: Calls at once.
    """

    def __init__(
        self, answer: Callable[[Hashable, Sequence[T]], Sequence[R]], batch_size: int, max_concurrency: int = 1
    ) -> None:
        self._answer = answer
        self._batch_size = batch_size
        self._max_concurrency = max_concurrency
        self._waiting: asyncio.Queue[tuple[Hashable, T, asyncio.Future[R]]] = asyncio.Queue()
        self._threads = ThreadPoolExecutor(max_concurrency, thread_name_prefix="cyclealign-batch")
        self._workers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Starts to work, on the running event loop."""
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._max_concurrency)]

    async def close(self) -> None:
        """Stops. What is being answered is, what waits is not."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def ask(self, key: Hashable, item: T) -> R:
        """The answer to one item; raises what answering it raised."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((key, item, future))
        return await future

    async def _work(self) -> None:
        while True:
            taken = [await self._waiting.get()]
            while len(taken) < self._batch_size and not self._waiting.empty():
                taken.append(self._waiting.get_nowait())
            groups: dict[Hashable, list[tuple[T, asyncio.Future[R]]]] = {}
            for key, item, future in taken:
                groups.setdefault(key, []).append((item, future))
            for key, group in groups.items():
                await self._settle(key, group)

    async def _settle(self, key: Hashable, group: list[tuple[T, asyncio.Future[R]]]) -> None:
        group = [(item, future) for item, future in group if not future.done()]
        if not group:
            return
        try:
            loop = asyncio.get_running_loop()
            answers = await loop.run_in_executor(self._threads, self._answer, key, [item for item, _ in group])
        except Exception as error:
            if len(group) == 1:
                if not group[0][1].done():
                    group[0][1].set_exception(error)
                return
            for pair in group:
                await self._settle(key, [pair])
            return
        for (_, future), answer in zip(group, answers, strict=True):
            if not future.done():
                future.set_result(answer)
