"""`AlignedServer`: an upstream and its aligner behind an OpenAI-compatible chat endpoint.

It runs on aiohttp, which the package depends on already as the transport of the `openai` client.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from typing import Any, cast

from aiohttp import web

from ...errors import PromptError, UpstreamError
from ...types import Prompt
from ..aligner import Aligner
from ..upstreams import AlignedUpstream, finish_reason_of
from .batcher import Batcher
from .protocol import (
    BadRequestError,
    ChatRequest,
    completion_body,
    completion_chunks,
    error_body,
    read_request,
)

logger = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_INVALID_REQUEST = "invalid_request_error"


class AlignedServer:
    """Serve `POST /v1/chat/completions`, `GET /v1/models`, `GET /v1/models/{model}` and `GET /health`.

    A stream starts when the answer is corrected, because a correction needs the whole answer. The upstream and the
    aligner each answer concurrent requests in batches of their own size.

    Args:
        aligned: The upstream and its aligner.
        model: Name to serve them under.
        api_key: Bearer key that requests must carry, except to `/health`. `None` accepts all requests.
        max_body_size: Maximum size of a request body, in bytes.
        max_in_flight: Maximum number of requests in flight. Further requests get a 503.
    """

    def __init__(
        self,
        aligned: AlignedUpstream,
        model: str,
        *,
        api_key: str | None = None,
        max_body_size: int = 2**20,
        max_in_flight: int = 4096,
    ) -> None:
        self._aligned = aligned
        self._model = model
        self._api_key = api_key
        self._max_body_size = max_body_size
        self._max_in_flight = max_in_flight
        self._in_flight = 0

    def make_app(self) -> web.Application:
        """Return the application to run with `aiohttp.web.run_app` or another runner."""
        app = web.Application(client_max_size=self._max_body_size, middlewares=[self._handle_errors])
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._retrieve_model)
        app.router.add_get("/health", self._health)
        app.cleanup_ctx.append(self._run_batchers)
        return app

    async def _run_batchers(self, app: web.Application) -> AsyncIterator[None]:
        upstream, aligner = self._aligned.upstream, self._aligned.aligner
        self._answers: Batcher[Prompt, str] = Batcher(
            lambda sampling, prompts: upstream(prompts, **dict(cast("Any", sampling))),
            upstream.batch_size,
            upstream.max_concurrency,
        )
        self._corrections: Batcher[tuple[Prompt, str], tuple[str, int, int]] = Batcher(
            lambda _, pairs: _correct(aligner, pairs), aligner.generator.batch_size
        )
        batchers: list[Batcher[Any, Any]] = [self._answers, self._corrections]
        for batcher in batchers:
            batcher.start()
        yield
        for batcher in batchers:
            await batcher.close()

    # Routes

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        chat_request = read_request(await request.read(), self._model)
        if self._in_flight >= self._max_in_flight:
            raise BadRequestError("Too many requests are in flight. Try again later.", None, "overloaded", 503)
        self._in_flight += 1
        try:
            body = completion_body(self._model, *await self._answer(chat_request))
            if chat_request.stream:
                return await _send_stream(request, completion_chunks(body, include_usage=chat_request.include_usage))
            return web.json_response(body)
        finally:
            self._in_flight -= 1

    async def _answer(self, request: ChatRequest) -> tuple[str, int, int, str]:
        """Return the corrected answer, the numbers of tokens in prompt and answer, and the finish reason."""
        sampling: Hashable = tuple(sorted(request.sampling.items()))
        try:
            answer = await self._answers.ask(sampling, request.messages)
        except PromptError as error:
            raise BadRequestError(str(error), "messages", error.code) from error
        except Exception as error:
            if isinstance(error, UpstreamError) and error.retry_after is not None:
                logger.warning("The upstream is overloaded: %s", error)
                message = "The upstream model has received too many requests. Try again later."
                wait = max(1.0, error.retry_after)
                raise BadRequestError(message, None, "rate_limit_exceeded", 429, wait) from error
            logger.exception("The upstream failed.")
            raise BadRequestError("The upstream model failed.", None, "upstream_error", 502) from error
        return *await self._corrections.ask(None, (request.messages, answer)), finish_reason_of(answer)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model_body]})

    async def _retrieve_model(self, request: web.Request) -> web.Response:
        model = request.match_info["model"]
        if model != self._model:
            message = f"The model {model[:100]!r} does not exist. This server only has {self._model!r}."
            raise BadRequestError(message, "model", "model_not_found", 404)
        return web.json_response(self._model_body)

    @property
    def _model_body(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": 0, "owned_by": "cyclealign-trl"}

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    # Errors

    @web.middleware
    async def _handle_errors(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Check the API key, and turn errors into OpenAI-style error bodies."""
        try:
            if not self._is_authorized(request):
                raise BadRequestError("Incorrect API key provided.", None, "invalid_api_key", 401)
            return await handler(request)
        except BadRequestError as error:
            error_type = _INVALID_REQUEST if error.status < 500 else "server_error"
            if error.status == 429:
                error_type = "rate_limit_error"
            body = error_body(str(error), error_type, error.param, error.code)
            headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
            return web.json_response(body, status=error.status, headers=headers)
        except web.HTTPRequestEntityTooLarge:
            message = f"The body is larger than {self._max_body_size:,} bytes."
            return web.json_response(error_body(message, _INVALID_REQUEST), status=413)
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.method} is not allowed on {request.path}. Use {allowed}."
            return web.json_response(error_body(message, _INVALID_REQUEST), status=405, headers={"Allow": allowed})
        except web.HTTPNotFound:
            message = f"{request.path} does not exist. Use /v1/chat/completions, /v1/models or /health."
            return web.json_response(error_body(message, _INVALID_REQUEST), status=404)
        except Exception:
            logger.exception("A request failed.")
            return web.json_response(error_body("The server failed.", "server_error"), status=500)

    def _is_authorized(self, request: web.Request) -> bool:
        if self._api_key is None or request.path == "/health":
            return True
        header = request.headers.get("Authorization", "").encode("utf-8", "replace")
        return hmac.compare_digest(header, f"Bearer {self._api_key}".encode())  # in constant time


async def _send_stream(request: web.Request, chunks: Sequence[dict[str, Any]]) -> web.StreamResponse:
    """Send chunks as server-sent events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    with contextlib.suppress(ConnectionError):  # the client has disconnected
        await response.prepare(request)
        for event in (*map(json.dumps, chunks), "[DONE]"):
            await response.write(f"data: {event}\n\n".encode())
        await response.write_eof()
    return response


def _correct(aligner: Aligner, pairs: Sequence[tuple[Prompt, str]]) -> list[tuple[str, int, int]]:
    """Return each corrected answer, and the numbers of tokens in its prompt and in itself."""
    corrected = aligner.correct([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
    prompts = ["".join(message["content"] for message in prompt) for prompt, _ in cast("Any", pairs)]
    counts = [
        [len(ids) for ids in aligner.generator.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        for texts in (prompts, corrected)
    ]
    return list(zip(corrected, *counts, strict=True))
