"""An event loop in a thread of its own, so that synchronous methods can use an asynchronous client."""

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


class EventLoopThread:
    """An event loop in a daemon thread, started when the first coroutine is submitted.

    Args:
        endpoint: The endpoint whose coroutines run on the loop. It is closed together with the loop.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """True if `close` has been called."""
        return self._closed

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop.

        Raises:
            RankerError: If the loop is closed.
        """
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RankerError("The client is closed. Build a new one.")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run_until_stopped, args=(self._loop,), name="cyclealign-chat", daemon=True
                )
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function on the loop. Do nothing if the loop is closed or was never started."""
        with self._lock:
            if self._loop is not None and not self._closed:
                self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Cancel all tasks, close the endpoint and end the thread."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._drain(), loop)
        # A task on the loop can own the last reference to the client, and a thread cannot join itself.
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
