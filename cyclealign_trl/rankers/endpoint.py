"""One OpenAI-compatible address and the key for it: what is sent there, and what may be told of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import RankerError
from .responses import Response, Setback, read_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_PLACEHOLDER_KEY = "no-key"  # the client insists on one; servers of one's own rarely do
_DETAIL_LENGTH = 500  # characters


class Endpoint:
    """Sends requests, one call each and without retries. All of its coroutines run on one event loop.

    Args:
        base_url: The address, as for `openai.OpenAI`. `None` reads `OPENAI_BASE_URL`, else means OpenAI.
        api_key: The key. `None` reads `OPENAI_API_KEY`; with a `base_url`, none is needed. Written nowhere.
        max_connections: Connections held open at once.
        timeout: Seconds that one call may take, by the clock.
        extra_body: Further fields of every request body.

    Raises:
        RankerError: If no key is given and `base_url` is not either.
        ValueError: If the key cannot be one.
    """

    def __init__(
        self,
        base_url: str | None,
        api_key: str | None,
        *,
        max_connections: int,
        timeout: float,
        extra_body: Mapping[str, Any],
    ) -> None:
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        self._api_key = _resolve_key(api_key, base_url)
        self._client = _make_client(base_url, self._api_key, max_connections)
        self._timeout = timeout
        self._extra_body = extra_body
        self.url = _public_url(str(self._client.base_url))

    async def send(self, body: dict[str, Any]) -> Response | Setback:
        """Asks for one chat completion: the response, whatever its status, or why there is none."""
        import aiohttp
        import openai

        try:
            async with asyncio.timeout(self._timeout):
                raw = await self._client.chat.completions.with_raw_response.create(**body, extra_body=self._extra_body)
                response = raw.http_response
        except TimeoutError:
            return Setback("timeout", f"No reply within {self._timeout:g} s.")
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            # aiohttp's own error: the client makes a time-out of whatever befell the connection.
            cause = error.__cause__ and (error.__cause__.__cause__ or error.__cause__)
            detail = self.public(f"{type(cause).__name__}: {cause}")
            return Setback("connection", detail, unsent=isinstance(cause, aiohttp.ClientConnectorError))
        return Response(response.status_code, response.headers, response.text, read_json(response.text))

    async def connect(self) -> None:
        """Asks for the list of models; any answer will do. Raises `RankerError` if there is none."""
        import openai

        try:
            async with asyncio.timeout(self._timeout):
                await self._client.models.with_raw_response.list()
        except openai.APIStatusError:
            return  # not every server lists its models
        except (TimeoutError, openai.APIConnectionError) as error:
            raise RankerError(
                f"Nothing answers at {self.url}: start the server, or check `base_url`. "
                + self.public(f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}")
            ) from None

    async def close(self) -> None:
        """Frees the connections."""
        await self._client.close()

    def public(self, text: str) -> str:
        """The text as it may be shown: without the key, which endpoints do echo, and cut only after that."""
        if self._api_key != _PLACEHOLDER_KEY:
            text = text.replace(self._api_key, "[API key]")
        return text if len(text) <= _DETAIL_LENGTH else text[: _DETAIL_LENGTH - 3] + "..."


def _resolve_key(api_key: str | None, base_url: str | None) -> str:
    key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not key and base_url is None:
        raise RankerError(
            "No API key. Set OPENAI_API_KEY or pass `api_key`; for a server that needs none, pass its `base_url`."
        )
    if not (key.isascii() and key.isprintable()):
        # Said here: the errors of HTTP libraries quote the header that they refuse.
        raise ValueError("`api_key` holds characters that a header cannot carry: was more than the key copied?")
    return key or _PLACEHOLDER_KEY


def _make_client(base_url: str | None, api_key: str, max_connections: int) -> AsyncOpenAI:
    import httpx2  # what openai speaks HTTP with
    from openai import AsyncOpenAI, DefaultAioHttpClient

    limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
    # No timeouts below our own: theirs run per read, and under aiohttp a reset connection looks like one of them. And
    # no redirects: prompts and key are meant for this address, and for no other that it may name.
    http_client = DefaultAioHttpClient(limits=limits, timeout=None, follow_redirects=False)
    return AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=None, http_client=http_client)


def _public_url(url: str) -> str:
    """The URL without a user's name, a password or a query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
