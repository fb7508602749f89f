"""An upstream and an aligner behind one OpenAI-compatible chat endpoint.

On aiohttp, which the package needs anyway: `openai` speaks HTTP through it.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from typing import Any, cast

from aiohttp import web

from ...errors import PromptError
from ...types import Prompt
from ..aligner import Aligner
from ..upstreams import AlignedUpstream
from .batcher import Batcher
from .requests import BadRequestError, ChatRequest, completion, error_body, read_request

logger = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_INVALID = "invalid_request_error"


class AlignedServer:
    """Answers `POST /v1/chat/completions`, `GET /v1/models` and `GET /health`, without streaming.

    Requests that wait are answered together, by upstream and aligner each in batches of their own size.

    Args:
        aligned: The upstream and its aligner.
        model: What the two together are called.
        api_key: The bearer key to require, but for `/health`. `None` lets everyone in.
        max_body_size: Largest body of a request, in bytes.
        max_waiting: Requests in hand at once; further ones are told to come back.
    """

    def __init__(
        self,
        aligned: AlignedUpstream,
        model: str,
        *,
        api_key: str | None = None,
        max_body_size: int = 2**20,
        max_waiting: int = 4096,
    ) -> None:
        self._aligned = aligned
        self._model = model
        self._api_key = api_key
        self._max_body_size = max_body_size
        self._max_waiting = max_waiting
        self._in_hand = 0

    def make_app(self) -> web.Application:
        """The application, for `aiohttp.web.run_app` or a server of one's own."""
        app = web.Application(client_max_size=self._max_body_size, middlewares=[self._errors])
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.cleanup_ctx.append(self._batchers)
        return app

    async def _batchers(self, app: web.Application) -> AsyncIterator[None]:
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

    async def _complete(self, request: web.Request) -> web.Response:
        asked = read_request(await request.read(), self._model)
        if self._in_hand >= self._max_waiting:
            raise BadRequestError("Too many requests are waiting: try again later.", None, "overloaded", 503)
        self._in_hand += 1
        try:
            return web.json_response(completion(self._model, *await self._answer(asked)))
        finally:
            self._in_hand -= 1

    async def _answer(self, asked: ChatRequest) -> tuple[str, int, int]:
        """The corrected answer, and the tokens of prompt and answer."""
        sampling: Hashable = tuple(sorted(asked.sampling.items()))
        try:
            answer = await self._answers.ask(sampling, asked.messages)
        except PromptError as error:
            raise BadRequestError(str(error), "messages", "invalid_prompt") from error
        except Exception as error:
            logger.exception("The upstream failed.")
            raise BadRequestError("The upstream model did not answer.", None, "upstream_error", 502) from error
        return await self._corrections.ask(None, (asked.messages, answer))

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "cyclealign-trl"}
        return web.json_response({"object": "list", "data": [model]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    # What goes wrong

    @web.middleware
    async def _errors(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Lets in whoever may come in, and says in OpenAI's shape what goes wrong."""
        try:
            if not self._may_come_in(request):
                raise BadRequestError("Incorrect API key provided.", None, "invalid_api_key", 401)
            return await handler(request)
        except BadRequestError as error:
            kind = _INVALID if error.status < 500 else "server_error"
            body = error_body(str(error), kind, error.param, error.code)
            return web.json_response(body, status=error.status)
        except web.HTTPRequestEntityTooLarge:
            message = f"The body is larger than {self._max_body_size:,} bytes."
            return web.json_response(error_body(message, _INVALID), status=413)
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.method} is not allowed on {request.path}, only {allowed}."
            return web.json_response(error_body(message, _INVALID), status=405, headers={"Allow": allowed})
        except web.HTTPNotFound:
            message = f"There is no {request.path} here, only /v1/chat/completions, /v1/models and /health."
            return web.json_response(error_body(message, _INVALID), status=404)
        except Exception:
            logger.exception("A request failed.")
            return web.json_response(error_body("The server failed.", "server_error"), status=500)

    def _may_come_in(self, request: web.Request) -> bool:
        if self._api_key is None or request.path == "/health":
            return True
        given = request.headers.get("Authorization", "").encode("utf-8", "replace")
        return hmac.compare_digest(given, f"Bearer {self._api_key}".encode())  # in constant time


def _correct(aligner: Aligner, pairs: Sequence[tuple[Prompt, str]]) -> list[tuple[str, int, int]]:
    """Corrected answers with the tokens, by the aligner's tokenizer, of messages and answer."""
    corrected = aligner.correct([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
    texts = (["".join(message["content"] for message in prompt) for prompt, _ in cast("Any", pairs)], corrected)
    tokenizer, plain = aligner.generator.tokenizer, {"add_special_tokens": False, "verbose": False}
    counts = [[len(ids) for ids in tokenizer(of, **plain)["input_ids"]] for of in texts]
    return list(zip(corrected, *counts, strict=True))
