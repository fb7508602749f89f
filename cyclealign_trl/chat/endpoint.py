"""One OpenAI-compatible address and the key for it: what is sent there, and what may be told of it."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from ..errors import RankerError
from .replies import printable
from .responses import Response, Setback, read_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_PLACEHOLDER_KEY = "no-key"  # the client insists on one; servers of one's own rarely do
_SHORTEST_SECRET = 12  # characters
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
        ValueError: If the key cannot be one, or the address holds more than host, port and path.
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
        base_url = _checked_url(base_url or os.environ.get("OPENAI_BASE_URL"))
        self._api_key = _resolve_key(api_key, base_url)
        self._forms_of_key = _forms(self._api_key)
        self._client = _make_client(base_url, self._api_key, max_connections)
        self._timeout = timeout
        self._extra_body = extra_body
        self.url = str(self._client.base_url).rstrip("/")

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
                # Some servers hang up after an error; the first question must not go to a line that is dead.
                await self._client.models.with_raw_response.list(extra_headers={"Connection": "close"})
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

    def without_key(self, text: str) -> str:
        """The text less the key, which endpoints do echo, and its usual encodings. A key such as "none", for a server
        that needs none, is a word as any other.
        """
        for form in self._forms_of_key:
            if len(form) >= _SHORTEST_SECRET:
                text = text.replace(form, "[API key]")
        return text

    def public(self, text: str) -> str:
        """The text as it may be shown: without the key, without what would drive a terminal, and cut after that."""
        text = self.without_key(text)
        if self._api_key != _PLACEHOLDER_KEY:
            text = text.replace(self._api_key, "[API key]")
        text = printable(text)
        return text if len(text) <= _DETAIL_LENGTH else text[: _DETAIL_LENGTH - 3] + "..."


def _checked_url(url: str | None) -> str | None:
    """The address, if it is one without secrets: HTTP libraries log and quote whole addresses."""
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        whole = False
    if not whole or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "`base_url` must be an address such as http://localhost:8000/v1, without user, password or query: a key "
            "goes into OPENAI_API_KEY or `api_key`."
        )
    return url


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


def _forms(key: str) -> tuple[str, ...]:
    """The key, as a URL has it, and in Base64, where it starts at the first, second or third byte of a group."""
    encoded = []
    for before in range(3):
        whole_groups = (before + len(key)) // 3 * 4  # what stands behind the key is mixed into the last one
        text = base64.b64encode(b"\0" * before + key.encode() + b"\0\0").decode()[:whole_groups]
        encoded.append(text[4 * (before > 0) :])  # and what stands before it into the first
    url_safe = [text.translate(str.maketrans("+/", "-_")) for text in encoded]
    return (key, quote(key, safe=""), *encoded, *url_safe)


def _make_client(base_url: str | None, api_key: str, max_connections: int) -> AsyncOpenAI:
    import httpx2  # what openai speaks HTTP with
    from openai import AsyncOpenAI, DefaultAioHttpClient

    limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
    # No timeouts below our own: theirs run per read, and under aiohttp a reset connection looks like one of them. And
    # no redirects: prompts and key are meant for this address, and for no other that it may name.
    http_client = DefaultAioHttpClient(limits=limits, timeout=None, follow_redirects=False)
    return AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=None, http_client=http_client)
