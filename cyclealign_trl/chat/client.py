"""Client for a model behind a chat endpoint: concurrent calls, one retry layer, and failures as data."""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

from ..errors import RankerError
from ..types import Usage
from . import forks
from .budget import Budget, make_prices
from .dialect import Dialect, ReplySchema
from .endpoint import Endpoint, endpoint_url
from .known_prices import known_prices
from .limits import AdaptiveConcurrency, RateLimiter, resolve_num_processes
from .loop import EventLoopThread
from .messages import Messages
from .meter import Meter
from .rejections import Rejections
from .replies import InvalidReply
from .responses import (
    CallError,
    Response,
    holds_error,
    read_error_body,
    read_message,
    read_reasoning_tokens,
    read_retry_after,
)
from .settings import ChatSettings
from .store import digest

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRUNCATED = "truncated"
"""Reason of a reply that reached its token limit."""
REASONING_FACTOR = 8
"""Limit of a reply's tokens for a model that reasons, relative to `max_tokens`."""
MAX_REPLY_FACTOR = 16
"""Largest limit of a reply's tokens after truncated replies, relative to `max_tokens`."""

_BACKOFF_BASE = 0.5  # seconds
_BACKOFF_CAP = 8.0  # seconds

_NO_CALLS = Usage(attempts=0)
_LIMIT_FIELDS = ("max_completion_tokens", "max_tokens")
_FIXES = {
    400: "Remove or change the field that the endpoint refuses.",
    401: "Set OPENAI_API_KEY, or pass `api_key`, to a key that is valid at this endpoint.",
    403: "Use a key that may call this model, or another model.",
    404: "Check `model`, and that `base_url` is the address above '/chat/completions' (it often ends in '/v1').",
}
_INVALID_NOTE = "Your previous reply was not valid: {}. Reply with the JSON object described above."
_TRUNCATED_NOTE = "Your previous reply was not finished. Be brief, and reply with the JSON object described above."


@dataclass(frozen=True, slots=True)
class ChatTask(Generic[T]):
    """One question to the model, and how to read its reply.

    With a `schema`, the reply is one JSON object. The client's sampling parameters are sent, and an unfinished
    reply, a refusal or an invalid reply is retried with a note to the model. Without one, the reply is plain text:
    only `fields` are sent with the messages, and a refusal or a reply that reached its token limit is an answer, too.

    Args:
        messages: Function that builds the chat messages of an attempt from the note on the previous reply, which is
            `None` for the first one.
        read: Function that reads the text of a reply. It raises `InvalidReply` if the reply does not have the
            requested form.
        schema: Schema of the reply. The messages must describe it as well.
        refusal_note: Note that is sent to the model after a refusal.
        seed_offset: Number added to the client's seed, to sample several replies to equal messages.
        fields: Fields of the request body for a plain-text reply.
        max_reply_tokens: Maximum number of tokens in a reply that was truncated and is requested again. `None` means
            16 times the client's `max_tokens`, and a higher number means the same.
    """

    messages: Callable[[str | None], Messages]
    read: Callable[[str], T]
    schema: ReplySchema | None = None
    refusal_note: str = ""
    seed_offset: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    max_reply_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ChatAnswer(Generic[T]):
    """The value that was read from a reply, the usage of all attempts, and why the reply ended, "" if unknown."""

    value: T
    usage: Usage
    finish_reason: str = ""


@dataclass(frozen=True, slots=True)
class ChatFailure:
    """The reason why there is no answer, and the usage of all attempts. See `RankingFailure` for the fields.

    `retry_after` is the number of seconds that the endpoint asks to wait.
    """

    reason: str
    detail: str
    usage: Usage | None
    retry_after: float = 0.0


class _Reply(NamedTuple, Generic[T]):
    value: T
    finish_reason: str


_Arrivals = queue.SimpleQueue[tuple[int, ChatAnswer[T] | ChatFailure] | BaseException | None]


class ChatClient:
    """Client for one model behind an OpenAI-compatible endpoint.

    Calls from any number of threads share one event loop in a daemon thread, and one limit on the calls in flight.
    If the endpoint refuses one of the parameters `temperature`, `seed`, `max_tokens` and `response_format`, the client
    logs a warning and drops or replaces it in all further requests.

    Args:
        settings: Model, endpoint, limits and sampling parameters.

    Raises:
        RankerError: If neither an API key nor a `base_url` is given.
        ValueError: If a setting is out of range.
    """

    def __init__(self, settings: ChatSettings) -> None:
        num_processes = resolve_num_processes(settings.num_processes)
        self.settings = settings
        prices = make_prices(settings.prices)
        if prices is None:
            prices = known_prices(settings.model, endpoint_url(settings.base_url))
        self.budget = Budget(settings.max_cost, settings.max_run_tokens, prices, num_processes)
        self._extra_body = settings.extra_body or {}
        self._dialect = Dialect()
        self._accepted_dialect: Dialect | None = None  # the last one that brought an answer
        # Maximum number of tokens in a reply, raised when a longer one turns out to be needed.
        self._reply_tokens = settings.max_tokens * (REASONING_FACTOR if settings.reasons else 1)
        # The global generator is part of the random state of a training run.
        self._jitter = random.Random()  # noqa: S311
        self._connect()
        forks.register(self)

    def _connect(self) -> None:
        settings = self.settings
        self._stale = False
        self._rebuilding = threading.Lock()
        self._rejections = Rejections()
        self._meter = Meter(
            AdaptiveConcurrency(settings.max_concurrency),
            self.budget,
            RateLimiter(settings.rpm, settings.tpm, resolve_num_processes(settings.num_processes)),
        )
        self._endpoint = Endpoint(
            settings.base_url,
            settings.api_key,
            max_connections=settings.max_concurrency,
            timeout=settings.timeout,
            extra_headers=settings.extra_headers,
            api_version=settings.api_version,
        )
        self._loop = EventLoopThread(self._endpoint)
        self._streams: set[Future[None]] = set()
        self._finalizer = weakref.finalize(self, self._loop.close)

    def rebuild_after_fork(self) -> None:
        """Mark the client of a forked process: it needs connections and a thread of its own for its next call."""
        if not self._finalizer.detach():
            return  # the client is closed, or its thread was never needed
        forks.keep(self._meter, self._endpoint, self._loop, self._streams)
        self._streams = set()
        self._rebuilding = threading.Lock()
        self._stale = True

    def _own_loop(self) -> EventLoopThread:
        """Return the event loop of this process."""
        if self._stale:
            with self._rebuilding:
                if self._stale:
                    self._connect()
        return self._loop

    @property
    def url(self) -> str:
        """Address of the endpoint, without secrets."""
        return self._endpoint.url

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of all replies so far that went into reasoning, as far as the endpoint reports them."""
        return self._meter.reasoning_tokens

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that the answers depend on, for cache keys. `extra_body` is hashed, and there is no API key."""
        effort = self.settings.reasoning_effort
        return {
            "model": self.settings.model,
            "base_url": self.url,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            "seed": self.settings.seed,
            "extra_body": digest(self._extra_body).hex() if self._extra_body else None,
            **({} if effort is None else {"reasoning_effort": effort}),  # keys without it are stored already
        }

    def stream(self, tasks: Iterable[ChatTask[T]]) -> Generator[tuple[int, ChatAnswer[T] | ChatFailure], None, None]:
        """Yield the position and the answer of each task, as the replies arrive.

        Closing the generator cancels the calls that are still in flight.

        Raises:
            RankerError: If the endpoint refuses the key, the model or every form of the request.
        """
        arrivals: _Arrivals[T] = queue.SimpleQueue()

        def finish(work: Future[None]) -> None:
            if work.cancelled():
                closed = RankerError("The client was closed before all of its replies had arrived.")
                arrivals.put(closed if self._loop.closed else None)
            else:
                error = work.exception()
                arrivals.put(error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error)

        # An answer keeps its slot until the next one is requested, so that few paid answers are lost if the caller
        # fails before it has stored them.
        slots = asyncio.Semaphore(self.settings.max_concurrency)
        work = self._own_loop().submit(self._answer_all(tasks, arrivals, slots))
        work.add_done_callback(finish)
        self._streams.add(work)
        try:
            while (arrival := arrivals.get()) is not None:
                if isinstance(arrival, BaseException):
                    raise arrival
                yield arrival
                self._loop.call_soon(slots.release)
        finally:
            self._streams.discard(work)
            work.cancel()

    def cancel(self) -> None:
        """Cancel the calls in flight of all threads. Their streams end early."""
        for work in list(self._streams):
            work.cancel()

    def check_connection(self) -> None:
        """Check that the endpoint is reachable by requesting its list of models, which is free of charge.

        Raises:
            RankerError: If there is no response.
        """
        self._own_loop().submit(self._endpoint.connect()).result()

    def close(self) -> None:
        """Cancel the calls in flight and close the connections. Called when the client is garbage-collected."""
        if not self._stale:
            self._finalizer()

    async def _answer_all(
        self, tasks: Iterable[ChatTask[T]], arrivals: _Arrivals[T], slots: asyncio.Semaphore
    ) -> None:
        async def answer(position: int, task: ChatTask[T]) -> None:
            arrivals.put((position, await self._answer(task, slots)))

        async with asyncio.TaskGroup() as group:
            self._rejections.start_source()
            try:
                for position, task in enumerate(tasks):
                    await slots.acquire()
                    self._rejections.start_request()
                    group.create_task(answer(position, task)).add_done_callback(self._rejections.end_request)
            finally:
                self._rejections.end_source()

    async def _answer(self, task: ChatTask[T], slots: asyncio.Semaphore) -> ChatAnswer[T] | ChatFailure:
        """Ask until there is an answer, an error that no retry can fix, or no retry left."""
        settings = self.settings
        note: str | None = None
        attempt = bad_replies = 0
        calls: list[Usage] = []
        bound = self._max_reply_tokens(task)
        limit = min(self._reply_tokens, bound)
        truncated: CallError | None = None
        while True:
            answer = await self._ask(task, note, settings.seed + task.seed_offset + bad_replies, limit, calls)
            if isinstance(answer, _Reply):
                self._keep_limit(limit, calls[-1].completion_tokens)
                return ChatAnswer(answer.value, self._total(calls), answer.finish_reason)
            if limit > settings.max_tokens and (isinstance(answer, Response) or answer.reason == "too_long"):
                # The model can have a lower limit than the one that we raised.
                if truncated is not None:
                    return ChatFailure(truncated.reason, truncated.detail, self._total(calls))
                limit = settings.max_tokens
                continue
            if isinstance(answer, Response):
                answer = await self._rejected(answer, slots)
            if answer.reason == TRUNCATED:
                truncated = answer
                if limit == bound:
                    answer = replace(answer, final=True)
                limit = min(2 * limit, bound)
            if answer.final or answer.retry_after > settings.timeout or attempt == settings.max_retries:
                total = self._total(calls) if calls else None
                return ChatFailure(answer.reason, answer.detail, total, answer.retry_after)
            if answer.note is not None:
                bad_replies += 1
                note = answer.note
            else:
                backoff = min(_BACKOFF_CAP, _BACKOFF_BASE * 2**attempt)
                slots.release()
                await asyncio.sleep(answer.retry_after + self._jitter.uniform(0, backoff))
                await slots.acquire()
            attempt += 1

    def _keep_limit(self, limit: int, used: int) -> None:
        """Raise the limit for later requests, by as much as a reply needed."""
        while self._reply_tokens < limit and (self._reply_tokens < used or not used):
            self._reply_tokens = min(2 * self._reply_tokens, limit)

    def _max_reply_tokens(self, task: ChatTask[T]) -> int:
        max_tokens = self.settings.max_tokens
        if any(name in self._extra_body for name in _LIMIT_FIELDS):
            return max_tokens  # `extra_body` sets another limit, which stays as it is
        bound = max_tokens * MAX_REPLY_FACTOR
        return bound if task.max_reply_tokens is None else max(max_tokens, min(bound, task.max_reply_tokens))

    def _total(self, calls: Sequence[Usage]) -> Usage:
        """Return the usage of all calls. Its cost is unknown if that of any call is."""
        total = sum(calls, _NO_CALLS)
        served = any(call.prompt_tokens or call.completion_tokens for call in calls)
        known = all(call.cost is not None for call in calls) and (served or self.budget.prices is not None)
        return total if known else replace(total, cost=None)

    async def _rejected(self, response: Response, slots: asyncio.Semaphore) -> CallError:
        """Return the failure of a request that the endpoint rejects. Raise `RankerError` if it rejects all."""
        slots.release()  # the decision can depend on requests that have not started
        if await self._rejections.are_fatal(response.status):
            raise self._fatal_error(response)
        await slots.acquire()
        return CallError("rejected", self._describe(response), final=True)

    async def _ask(
        self, task: ChatTask[T], note: str | None, seed: int, max_tokens: int, calls: list[Usage]
    ) -> _Reply[T] | CallError | Response:
        """Make one attempt, dropping the parameters that the endpoint refuses until it accepts the request.

        Returns:
            The reply, the reason why there is none, or the response if the endpoint rejects every form of the request.
        """
        messages = task.messages(note)
        start = self._dialect
        pending, tried = [start], set[Dialect]()
        while pending:
            dialect = pending.pop(0)
            if dialect in tried:
                continue
            tried.add(dialect)
            fields = self._fields(task, dialect, seed, max_tokens)
            answer = await self._send(dialect.messages(messages), fields, calls, adjustable=task.schema is not None)
            if isinstance(answer, CallError):
                return answer
            response = answer
            if 200 <= response.status < 300:
                if start != self._accepted_dialect:  # else, only this request needs another dialect
                    self._remember(dialect, start)
                return self._read_reply(task, response, max_tokens)
            error, body = self._call_error(response), read_error_body(response)
            if task.schema is None:
                return error or response
            fallbacks = dialect.fallbacks(reasoning_effort=self.settings.reasoning_effort is not None)
            if error is None and response.status in (400, 422):
                refused = body.refused_parameter(fallbacks)
            else:  # some servers fail with HTTP 500 if the chat template has no system role
                refused = body.refused_parameter(fallbacks.keys() & {"system"})
            accepted = start == self._accepted_dialect  # perhaps by another request in the meantime
            if refused is None and (error is not None or accepted or response.status not in (400, 422)):
                return error or response
            # If the endpoint names a parameter, it is dropped next, in addition to those dropped so far. Otherwise
            # each parameter is dropped in turn.
            first = [] if refused is None else [fallbacks.pop(refused)]
            in_turn = not accepted and (bool(first) or dialect == start)
            pending = [*first, *pending, *(fallbacks.values() if in_turn else ())]
        return error or response

    def _fields(self, task: ChatTask[T], dialect: Dialect, seed: int, max_tokens: int) -> Mapping[str, Any]:
        if task.schema is None:
            return task.fields
        return dialect.parameters(
            max_tokens=max_tokens,
            temperature=self.settings.temperature,
            seed=seed,
            schema=task.schema,
            reasoning_effort=self.settings.reasoning_effort,
        )

    def _remember(self, dialect: Dialect, start: Dialect) -> None:
        if dialect in (start, self._dialect):
            return
        before, after = asdict(self._dialect), asdict(dialect)
        changes = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in after if after[name] != before[name])
        self._dialect = dialect
        logger.warning(
            "%s refuses a parameter for the model %s. Changed in all further requests: %s.",
            self.url,
            self.settings.model,
            changes,
        )

    async def _send(
        self, messages: Messages, fields: Mapping[str, Any], calls: list[Usage], *, adjustable: bool
    ) -> Response | CallError:
        fields = {**fields, **self._extra_body}
        limit_field = next((name for name in _LIMIT_FIELDS if fields.get(name)), None)

        async def send(max_tokens: int) -> Response | CallError:
            limit = {} if limit_field is None else {limit_field: max_tokens}
            return await self._endpoint.send(self.settings.model, messages, {**fields, **limit})

        max_tokens = self.settings.max_tokens if limit_field is None else fields[limit_field]
        answer, usage = await self._meter.call(
            messages, max_tokens, send, adjustable=adjustable and limit_field is not None
        )
        if usage is not None:
            calls.append(usage)
        return answer

    def _read_reply(self, task: ChatTask[T], response: Response, max_tokens: int) -> _Reply[T] | CallError:
        display = self._endpoint.for_display
        message = None if holds_error(response.body) else read_message(response.body)
        if message is None:
            return CallError("invalid_response", display(f"The response has no chat completion: {response.text}"))
        self._rejections.answer()
        content, refusal, finish_reason = message
        if finish_reason == "error":
            return CallError("server_error", display(f"The reply ended with an error: {response.text}"))
        if task.schema is None:
            if finish_reason == "content_filter" and not content:
                return CallError("refusal", "A content filter of the endpoint withheld the reply.", final=True)
            content = content or refusal
        elif refusal or finish_reason == "content_filter":
            return CallError("refusal", display(refusal or finish_reason), note=task.refusal_note)
        elif message.truncated:
            reasoning = read_reasoning_tokens(response.body)
            advice = (
                f"{reasoning:,} of its tokens are reasoning. Raise `max_tokens` or lower `reasoning_effort`"
                if reasoning
                else "Raise `max_tokens`"
            )
            detail = f"The reply reached its limit of {max_tokens:,} tokens. {advice}. Its end: ...{content[-80:]}"
            return CallError(TRUNCATED, display(detail), note=_TRUNCATED_NOTE)
        content = self._endpoint.redact(content)  # it can be stored and trained on
        try:
            value = task.read(content)
        except InvalidReply as error:
            if message.withheld:
                return CallError("refusal", display(f"finish_reason {finish_reason!r}: {content}"), task.refusal_note)
            return CallError(error.reason, display(f"{error}: {content}"), note=_INVALID_NOTE.format(error))
        self._accepted_dialect = self._dialect
        return _Reply(value, finish_reason)

    def _describe(self, response: Response) -> str:
        return self._endpoint.for_display(f"HTTP {response.status}: {read_error_body(response).message}")

    def _call_error(self, response: Response) -> CallError | None:
        """Return the error of a status that is temporary or concerns only this request, and `None` for any other."""
        status, body, detail = response.status, read_error_body(response), self._describe(response)
        if status == 402 or (status in (400, 403, 429) and body.reports_quota):
            return CallError("quota_exhausted", detail, final=True)
        if status in (408, 409, 425, 429) or status >= 500:
            reason = {408: "timeout", 429: "rate_limited"}.get(status, "server_error")
            retry_after = read_retry_after(response.headers) or body.retry_after
            return CallError(reason, detail, retry_after=retry_after)
        if 300 <= status < 400:
            location = response.headers.get("location", "").partition("?")[0]
            detail = f"HTTP {status}: the endpoint redirects to {location}, which is not followed. Check `base_url`."
            return CallError("redirect", self._endpoint.for_display(detail))
        if status in (400, 422) and body.reports_invalid_reply:
            return CallError("unparsable", detail, note=_INVALID_NOTE.format("it does not follow the schema"))
        if status == 413 or (status in (400, 422) and body.reports_length and body.param not in _LIMIT_FIELDS):
            return CallError("too_long", detail, final=True)
        if status in (400, 403, 422, 451) and body.reports_content:
            return CallError("refusal", detail, final=True)
        return None

    def _fatal_error(self, response: Response) -> RankerError:
        fix = _FIXES.get(response.status, "A retry cannot help.")
        return RankerError(
            self._endpoint.for_display(
                f"The endpoint {self.url} rejects requests to the model {self.settings.model!r}. {fix} "
                f"It answered HTTP {response.status}: {read_error_body(response).message}"
            )
        )
