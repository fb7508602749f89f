"""Client for a model behind a chat endpoint: concurrent calls, one retry layer, and failures as data."""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from ..errors import RankerError
from ..types import Usage
from .budget import Budget, make_prices
from .dialect import Dialect, ReplySchema
from .endpoint import Endpoint
from .limits import AdaptiveConcurrency, RateLimiter, resolve_num_processes
from .loop import EventLoopThread
from .messages import Messages
from .meter import Meter
from .replies import InvalidReply
from .responses import CallError, Response, read_error_body, read_message, read_retry_after
from .settings import ChatSettings
from .store import digest

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_BASE = 0.5  # seconds
_BACKOFF_CAP = 8.0  # seconds

_NO_CALLS = Usage(attempts=0)
_REFUSED_CONTENT = ("content_filter", "content_policy_violation")
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
    """

    messages: Callable[[str | None], Messages]
    read: Callable[[str], T]
    schema: ReplySchema | None = None
    refusal_note: str = ""
    seed_offset: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatAnswer(Generic[T]):
    """The value that was read from a reply, and the usage of all attempts."""

    value: T
    usage: Usage


@dataclass(frozen=True, slots=True)
class ChatFailure:
    """The reason why there is no answer, and the usage of all attempts. See `RankingFailure` for the fields."""

    reason: str
    detail: str
    usage: Usage | None


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
        self.budget = Budget(settings.max_cost, settings.max_run_tokens, make_prices(settings.prices), num_processes)
        self._extra_body = settings.extra_body or {}
        self._dialect = Dialect()
        # The global generator is part of the random state of a training run.
        self._jitter = random.Random()  # noqa: S311
        self._meter = Meter(
            AdaptiveConcurrency(settings.max_concurrency),
            self.budget,
            RateLimiter(settings.rpm, settings.tpm, num_processes),
        )
        self._endpoint = Endpoint(
            settings.base_url, settings.api_key, max_connections=settings.max_concurrency, timeout=settings.timeout
        )
        self._loop = EventLoopThread(self._endpoint)
        self._streams: set[Future[None]] = set()
        self._finalizer = weakref.finalize(self, self._loop.close)

    @property
    def url(self) -> str:
        """Address of the endpoint, without secrets."""
        return self._endpoint.url

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that the answers depend on, for cache keys. `extra_body` is hashed, and there is no API key."""
        return {
            "model": self.settings.model,
            "base_url": self.url,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            "seed": self.settings.seed,
            "extra_body": digest(self._extra_body).hex() if self._extra_body else None,
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
        work = self._loop.submit(self._answer_all(tasks, arrivals, slots))
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
        self._loop.submit(self._endpoint.connect()).result()

    def close(self) -> None:
        """Cancel the calls in flight and close the connections. Called when the client is garbage-collected."""
        self._finalizer()

    async def _answer_all(
        self, tasks: Iterable[ChatTask[T]], arrivals: _Arrivals[T], slots: asyncio.Semaphore
    ) -> None:
        async def answer(position: int, task: ChatTask[T]) -> None:
            arrivals.put((position, await self._answer(task, slots)))

        async with asyncio.TaskGroup() as group:
            for position, task in enumerate(tasks):
                await slots.acquire()
                group.create_task(answer(position, task))

    async def _answer(self, task: ChatTask[T], slots: asyncio.Semaphore) -> ChatAnswer[T] | ChatFailure:
        """Ask until there is an answer, an error that no retry can fix, or no retry left."""
        settings = self.settings
        note: str | None = None
        attempt = bad_replies = 0
        calls: list[Usage] = []
        while True:
            answer = await self._ask(task, note, settings.seed + task.seed_offset + bad_replies, calls)
            if not isinstance(answer, CallError):
                return ChatAnswer(answer, sum(calls, _NO_CALLS))
            if answer.final or answer.retry_after > settings.timeout or attempt == settings.max_retries:
                return ChatFailure(answer.reason, answer.detail, sum(calls, _NO_CALLS) if calls else None)
            if answer.note is not None:
                bad_replies += 1
                note = answer.note
            else:
                backoff = min(_BACKOFF_CAP, _BACKOFF_BASE * 2**attempt)
                slots.release()
                await asyncio.sleep(answer.retry_after + self._jitter.uniform(0, backoff))
                await slots.acquire()
            attempt += 1

    async def _ask(self, task: ChatTask[T], note: str | None, seed: int, calls: list[Usage]) -> T | CallError:
        """Make one attempt, dropping the parameters that the endpoint refuses until it accepts the request."""
        messages = task.messages(note)
        start = self._dialect
        pending, tried = [start], set[Dialect]()
        while pending:
            dialect = pending.pop(0)
            if dialect in tried:
                continue
            tried.add(dialect)
            answer = await self._send(messages, self._fields(task, dialect, seed), calls)
            if isinstance(answer, CallError):
                return answer
            response = answer
            if 200 <= response.status < 300:
                self._remember(dialect, start)
                return self._read_reply(task, response)
            error = self._call_error(response)
            if error is not None:
                return error
            if response.status not in (400, 422) or task.schema is None:
                break
            # If the endpoint names a parameter, it is dropped next, in addition to those dropped so far. Otherwise
            # each parameter is dropped in turn.
            fallbacks = dialect.fallbacks()
            refused = read_error_body(response).refused_parameter(fallbacks)
            first = [] if refused is None else [fallbacks.pop(refused)]
            pending = [*first, *pending, *(fallbacks.values() if first or dialect == start else ())]
        raise self._fatal_error(response)

    def _fields(self, task: ChatTask[T], dialect: Dialect, seed: int) -> Mapping[str, Any]:
        if task.schema is None:
            return task.fields
        return dialect.parameters(
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            seed=seed,
            schema=task.schema,
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

    async def _send(self, messages: Messages, fields: Mapping[str, Any], calls: list[Usage]) -> Response | CallError:
        max_tokens = fields.get("max_completion_tokens") or fields.get("max_tokens") or self.settings.max_tokens
        fields = {**fields, **self._extra_body}
        answer, usage = await self._meter.call(
            messages, max_tokens, lambda: self._endpoint.send(self.settings.model, messages, fields)
        )
        if usage is not None:
            calls.append(usage)
        return answer

    def _read_reply(self, task: ChatTask[T], response: Response) -> T | CallError:
        display = self._endpoint.for_display
        message = read_message(response.body)
        if message is None:
            return CallError("invalid_response", display(f"The response has no chat completion: {response.text}"))
        content, refusal, finish_reason = message
        if task.schema is None:
            content = content or str(refusal or "")
        elif refusal or finish_reason == "content_filter":
            return CallError("refusal", display(str(refusal or finish_reason)), note=task.refusal_note)
        elif finish_reason != "stop":
            detail = (
                f"finish_reason {finish_reason!r} instead of 'stop', max_tokens={self.settings.max_tokens}: "
                f"...{content[-80:]}"
            )
            return CallError("truncated", display(detail), note=_TRUNCATED_NOTE)
        content = self._endpoint.redact(content)  # it can be stored and trained on
        try:
            return task.read(content)
        except InvalidReply as error:
            return CallError(error.reason, display(f"{error}: {content}"), note=_INVALID_NOTE.format(error))

    def _call_error(self, response: Response) -> CallError | None:
        """Return the error of a status that is temporary or concerns only this request, and `None` for any other."""
        status, body = response.status, read_error_body(response)
        detail = self._endpoint.for_display(f"HTTP {status}: {body.message}")
        if status == 402 or (status == 429 and body.code == "insufficient_quota"):
            return CallError("quota_exhausted", detail, final=True)
        if status in (408, 409, 429) or status >= 500:
            reason = {408: "timeout", 429: "rate_limited"}.get(status, "server_error")
            return CallError(reason, detail, retry_after=read_retry_after(response.headers))
        if 300 <= status < 400:
            location = response.headers.get("location", "").partition("?")[0]
            detail = f"HTTP {status}: the endpoint redirects to {location}, which is not followed. Check `base_url`."
            return CallError("redirect", self._endpoint.for_display(detail))
        if status == 413 or (status in (400, 422) and body.reports_length):
            return CallError("too_long", detail, final=True)
        if status in (400, 422) and body.code in _REFUSED_CONTENT:
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
