"""`Batcher`: answer concurrent requests in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Answer items in batches, in worker threads.

    A batch contains the items that are waiting when a worker is free, up to `batch_size`; it is never delayed to
    collect more. Items with different keys go to separate calls. If a call fails, its items are retried one by one, so
    that one bad item does not fail the others. An item is dropped if its `ask` was cancelled.

    Args:
        answer: Answers items with the same key, in their order. Called from worker threads.
        batch_size: Maximum number of items in a call.
        max_concurrency: Maximum number of calls in flight.
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
        """Start the workers on the running event loop."""
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._max_concurrency)]

    async def close(self) -> None:
        """Stop the workers. Calls in flight finish in their threads, and waiting items are not answered."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def ask(self, key: Hashable, item: T) -> R:
        """Return the answer to one item, or raise the exception of its call."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((key, item, future))
        return await future

    async def _work(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._batch_size and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            groups: dict[Hashable, list[tuple[T, asyncio.Future[R]]]] = {}
            for key, item, future in batch:
                groups.setdefault(key, []).append((item, future))
            for key, group in groups.items():
                await self._answer_group(key, group)

    async def _answer_group(self, key: Hashable, group: list[tuple[T, asyncio.Future[R]]]) -> None:
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
                await self._answer_group(key, [pair])
            return
        for (_, future), answer in zip(group, answers, strict=True):
            if not future.done():  # cancelled during the call
                future.set_result(answer)
