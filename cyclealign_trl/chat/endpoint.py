"""One OpenAI-compatible endpoint and its API key: sending requests, and redacting the key from texts."""

from __future__ import annotations

import asyncio
import base64
import inspect
import os
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlsplit

from ..errors import RankerError
from .messages import Messages
from .replies import printable
from .responses import CallError, Response, read_response

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_DEFAULT_URL = "https://api.openai.com/v1"
_PLACEHOLDER_KEY = "no-key"  # the client requires a key, local servers rarely do
_SHORTEST_SECRET = 12  # characters
_MAX_DISPLAY_LENGTH = 500  # characters
_MAX_RECENT_KEYS = 8  # that responses can still quote


class Endpoint:
    """Send single requests to one endpoint, without retries. All coroutines run on one event loop.

    Args:
        base_url: See `ChatSettings`.
        api_key: See `ChatSettings`.
        max_connections: Maximum number of open connections.
        timeout: Seconds of wall-clock time for one call.
        extra_headers: See `ChatSettings`.
        api_version: See `ChatSettings`.

    Raises:
        RankerError: If neither an API key nor a `base_url` is given.
        ValueError: If the key or a header contains characters that a header cannot carry, or the address contains
            more than host, port, path and `api-version`.
    """

    def __init__(
        self,
        base_url: str | None,
        api_key: str | Callable[[], Any] | None,
        *,
        max_connections: int,
        timeout: float,
        extra_headers: Mapping[str, str] | None = None,
        api_version: str | None = None,
    ) -> None:
        base_url, version_in_url = _resolve_url(base_url)
        self._api_version = api_version or version_in_url
        self._make_key = api_key if callable(api_key) else None
        key = None if callable(api_key) else _resolve_key(api_key, base_url)
        self._extra_headers = _checked_headers(extra_headers or {})
        self._keys = deque([] if key is None or key == _PLACEHOLDER_KEY else [key], _MAX_RECENT_KEYS)
        query = {} if self._api_version is None else {"api-version": self._api_version}
        self._client = _make_client(base_url, key or _PLACEHOLDER_KEY, max_connections, query)
        self._timeout = timeout
        self.url = str(self._client.base_url).rstrip("/")

    async def send(self, model: str, messages: Messages, fields: Mapping[str, Any]) -> Response | CallError:
        """Request one chat completion.

        Args:
            model: Name of the model.
            messages: The chat messages.
            fields: All other fields of the request body.

        Returns:
            The response, of any status, or the reason why there is none.
        """
        import aiohttp
        import openai

        completions: Any = self._client.chat.completions
        try:
            async with asyncio.timeout(self._timeout):
                headers = await self._headers()
                # `extra_body` takes any field, including those that the client does not know.
                raw = await completions.with_raw_response.create(
                    model=model, messages=messages, extra_body=fields, extra_headers=headers
                )
                response = raw.http_response
        except TimeoutError:
            return CallError("timeout", f"No reply within {self._timeout:g} s.")
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            # The client reports every connection error as a timeout: aiohttp's own error is in the chain of causes.
            cause = error.__cause__ and (error.__cause__.__cause__ or error.__cause__)
            detail = self.for_display(f"{type(cause).__name__}: {cause}")
            return CallError("connection", detail, unsent=isinstance(cause, aiohttp.ClientConnectorError))
        return read_response(response.status_code, response.headers, response.text)

    async def connect(self) -> None:
        """Request the list of models. Any response shows that the endpoint is reachable.

        Raises:
            RankerError: If there is no response.
        """
        import openai

        try:
            async with asyncio.timeout(self._timeout):
                # Some servers close the connection after an error, so it must not be reused for the first call.
                headers = await self._headers()
                await self._client.models.with_raw_response.list(extra_headers={**headers, "Connection": "close"})
        except openai.APIStatusError:
            return  # not every server can list its models
        except (TimeoutError, openai.APIConnectionError) as error:
            raise RankerError(
                f"Nothing answers at {self.url}: start the server, or check `base_url`. "
                + self.for_display(f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}")
            ) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    def redact(self, text: str) -> str:
        """Replace the API key and its usual encodings, which some endpoints echo.

        A short key such as "none" is not replaced: it belongs to a server without authentication, and is a common
        word.
        """
        for secret in (*self._keys, *self._extra_headers.values()):
            for form in _encodings(secret):
                if len(form) >= _SHORTEST_SECRET:
                    text = text.replace(form, "[API key]")
        return text

    async def _headers(self) -> dict[str, str]:
        """Return the headers of a request beyond those of the client, with a new key if a function makes them."""
        headers = {}
        if self._make_key is not None:
            key = await self._new_key(self._make_key)
            headers["Authorization"] = f"Bearer {key}"
        if self._api_version is not None and self._keys:
            headers["api-key"] = self._keys[-1]  # Azure reads the key there
        return {**headers, **self._extra_headers}

    async def _new_key(self, make_key: Callable[[], Any]) -> str:
        try:
            key = await asyncio.to_thread(make_key)  # it can wait for another server
            if inspect.isawaitable(key):
                key = await key
        except Exception as error:
            raise RankerError(f"The function `api_key` raised {type(error).__name__}. Check it.") from None
        if not isinstance(key, str) or not key.strip():
            raise RankerError(f"The function `api_key` must return a key as text, got {type(key).__name__}.")
        key = key.strip()
        if not _fits_in_a_header(key):
            raise RankerError("The function `api_key` returned characters that an HTTP header cannot carry.")
        if key not in self._keys:
            self._keys.append(key)
        return key

    def for_display(self, text: str) -> str:
        """Return the text without the API key, however short, and without control characters, truncated."""
        text = self.redact(text)
        for key in self._keys:
            text = text.replace(key, "[API key]")
        text = printable(text)
        return text if len(text) <= _MAX_DISPLAY_LENGTH else text[: _MAX_DISPLAY_LENGTH - 3] + "..."


def endpoint_url(base_url: str | None) -> str:
    """Return the address of an endpoint, from the argument or the environment."""
    return _resolve_url(base_url)[0] or _DEFAULT_URL


def _resolve_url(base_url: str | None) -> tuple[str | None, str | None]:
    return _checked_url(base_url or os.environ.get("OPENAI_BASE_URL"))


def _checked_url(url: str | None) -> tuple[str | None, str | None]:
    """Return the address, and the `api-version` of its query.

    Raises:
        ValueError: If the address can contain secrets, because HTTP libraries log whole addresses.
    """
    if url is None or not url.strip():
        return None, None
    url = url.strip()
    try:
        parts = urlsplit(url)
        complete = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        )
        query = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        complete = False
    if not complete or "@" in parts.netloc or query.keys() - {"api-version"} or parts.fragment:
        raise ValueError(
            "`base_url` must be an address such as http://localhost:8000/v1, without user, password or query (except "
            "`?api-version=`). Pass a key as OPENAI_API_KEY or `api_key`, and other credentials in `extra_headers`."
        )
    return url.partition("?")[0], query.get("api-version")


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not isinstance(value, str) or not _fits_in_a_header(f"{name}{value.strip()}") or not name:
            raise ValueError(f"`extra_headers` must map names to texts that an HTTP header can carry. Check {name!r}.")
    return {name: value.strip() for name, value in headers.items()}


def _fits_in_a_header(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _resolve_key(api_key: str | None, base_url: str | None) -> str:
    key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not key and base_url is None:
        raise RankerError(
            "No API key. Set OPENAI_API_KEY or pass `api_key`, or pass the `base_url` of a server that needs none."
        )
    if not _fits_in_a_header(key):
        # HTTP libraries would quote the whole header in their error.
        raise ValueError("`api_key` contains characters that an HTTP header cannot carry. Check what was copied.")
    return key or _PLACEHOLDER_KEY


def _encodings(key: str) -> list[str]:
    """Return the key, its form in a URL, and its Base64 at each of the three offsets in a group of three bytes."""
    encoded = []
    for offset in range(3):
        whole_groups = (offset + len(key)) // 3 * 4  # the last group also depends on the text after the key
        text = base64.b64encode(b"\0" * offset + key.encode() + b"\0\0").decode()[:whole_groups]
        encoded.append(text[4 * (offset > 0) :])  # the first group also depends on the text before the key
    url_safe = [text.translate(str.maketrans("+/", "-_")) for text in encoded]
    return [key, quote(key, safe=""), *encoded, *url_safe]


def _make_client(base_url: str | None, api_key: str, max_connections: int, query: Mapping[str, str]) -> AsyncOpenAI:
    import httpx2  # the HTTP library of openai
    from openai import AsyncOpenAI, DefaultAioHttpClient

    limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
    # No timeouts in the client: they apply per read, and with aiohttp a reset connection looks like one of them.
    # No redirects: prompts and key must not be sent to another address.
    http_client = DefaultAioHttpClient(limits=limits, timeout=None, follow_redirects=False)
    return AsyncOpenAI(
        base_url=base_url,
        api_key=api_key,
        max_retries=0,
        timeout=None,
        default_query=dict(query),
        http_client=http_client,
    )
