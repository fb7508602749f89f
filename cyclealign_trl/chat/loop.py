"""An event loop in a thread of its own, for an asynchronous client behind a synchronous method."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import RankerError

if TYPE_CHECKING:
    from .endpoint import Endpoint

T = TypeVar("T")


class LoopThread:
    """One event loop in one daemon thread, started by the first work; the endpoint lives and dies on it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it takes no more work."""
        return self._closed

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine on the loop. Raises `RankerError` after `close`."""
        with self._lock:
            if self._closed:
                work.close()
                raise RankerError("The client is closed: build another one.")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run_until_stopped, args=(self._loop,), name="cyclealign-ranker", daemon=True
                )
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Calls a function on the loop, which work was submitted to before; after `close`, does nothing."""
        with self._lock:
            if self._loop is not None and not self._closed:
                self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Cancels what runs, closes the endpoint, ends the thread."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._drain(), loop)
        # The last reference to a client may be one of its own tasks: then this is the thread that would be waited for.
        if threading.current_thread() is not thread:
            thread.join()

    async def _drain(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._endpoint.close()
        finally:
            asyncio.get_running_loop().stop()


def _run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()
