"""Tell a request that an endpoint rejects from an endpoint that rejects all requests."""

from __future__ import annotations

import asyncio

MAX_REJECTIONS = 8
"""Number of rejections in a row that show that the endpoint rejects all requests."""

_WRONG_KEY = 401
_ABOUT_ALL_REQUESTS = (403, 404)  # permission, model or address


class Rejections:
    """Decide what a rejection (HTTP 4xx) means. Everything here runs on one event loop.

    HTTP 401 is always fatal: it concerns the key, which all requests share. Once the endpoint has answered, any other
    rejection concerns its own request. Only `MAX_REJECTIONS` in a row of HTTP 403 or of HTTP 404 are fatal, because
    permissions and models can be withdrawn at any time.

    As long as the endpoint has not answered, the decision waits for the other requests. A rejection is fatal if none
    of them is answered.
    """

    def __init__(self) -> None:
        self._answered = False
        self._last_status = 0
        self._in_a_row = 0
        self._num_open = 0  # requests without an outcome
        self._num_waiting = 0  # rejected requests among them
        self._num_sources = 0  # streams that have further requests
        self._changed = asyncio.Event()

    def start_source(self) -> None:
        """Count a stream that has further requests."""
        self._num_sources += 1

    def end_source(self) -> None:
        """Count a stream whose requests have all started."""
        self._num_sources -= 1
        self._changed.set()

    def start_request(self) -> None:
        """Count a request that starts."""
        self._num_open += 1

    def end_request(self, _: object = None) -> None:
        """Count a request that has an outcome."""
        self._num_open -= 1
        self._changed.set()

    def answer(self) -> None:
        """Count an answer of the endpoint."""
        self._answered = True
        self._in_a_row = 0
        self._changed.set()

    async def are_fatal(self, status: int) -> bool:
        """Count a rejection. Return whether the endpoint rejects all requests."""
        self._in_a_row = self._in_a_row + 1 if status == self._last_status else 1
        self._last_status = status
        if status == _WRONG_KEY:
            return True
        if self._answered:
            return status in _ABOUT_ALL_REQUESTS and self._in_a_row >= MAX_REJECTIONS
        self._num_waiting += 1
        self._changed.set()
        try:
            while not self._answered and self._num_waiting < MAX_REJECTIONS and self._others_are_open():
                self._changed.clear()
                await self._changed.wait()
            return not self._answered
        finally:
            self._num_waiting -= 1

    def _others_are_open(self) -> bool:
        return self._num_waiting < self._num_open or self._num_sources > 0
