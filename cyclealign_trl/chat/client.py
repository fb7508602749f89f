"""Questions to a model behind a chat endpoint: many at once, one retry layer, failures as data."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from ..errors import RankerError
from ..types import Usage
from .budget import Budget, Prices, make_prices
from .dialect import Dialect
from .endpoint import Endpoint
from .limits import AdaptiveConcurrency, RateLimiter, resolve_num_processes
from .loop import LoopThread
from .meter import Meter
from .replies import InvalidReply
from .responses import Response, Setback, read_complaint, retry_after
from .store import digest

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_BASE = 0.5  # seconds
_BACKOFF_CAP = 8.0  # seconds

_NOTHING = Usage(attempts=0)
_REFUSED_CONTENT = ("content_filter", "content_policy_violation")
_FIXES = {
    400: "It refuses the request whichever optional parameter is left out.",
    401: "Set OPENAI_API_KEY, or pass `api_key`, to a key that is valid at this endpoint.",
    403: "Use a key that may call this model, or another model.",
    404: "Check `model`, and that `base_url` is the one above '/chat/completions' (it often ends in '/v1').",
}
_INVALID_NOTE = "Your previous reply was not valid: {}. Reply with the JSON object described above."
_TRUNCATED_NOTE = "Your previous reply was not finished. Be brief, and reply with the JSON object described above."


@dataclass(frozen=True, slots=True)
class ChatTask(Generic[T]):
    """One question, and how its reply is read.

    Args:
        messages: Builds the chat messages, which describe the JSON object to reply with. Called for every attempt,
            with a note to the model on its previous bad reply, or with `None`.
        schema_name: What the reply is called, in letters, digits, `_` and `-`.
        schema: JSON schema of the reply, within what strict structured output allows.
        read: Reads the text of a reply; raises `InvalidReply` for one that is not what was asked for.
        refusal_note: The note on a reply that was a refusal.
        seed_offset: Added to the client's seed, to draw again what is asked in the same words.
    """

    messages: Callable[[str | None], list[dict[str, str]]]
    schema_name: str
    schema: Mapping[str, Any]
    read: Callable[[str], T]
    refusal_note: str
    seed_offset: int = 0


@dataclass(frozen=True, slots=True)
class ChatAnswer(Generic[T]):
    """What a reply was read as, and what all attempts at it took."""

    value: T
    usage: Usage


@dataclass(frozen=True, slots=True)
class ChatFailure:
    """Why there is no answer, and what the attempts took all the same, if there were any; see `RankingFailure`."""

    reason: str
    detail: str
    usage: Usage | None


_Arrivals = queue.SimpleQueue[tuple[int, ChatAnswer[T] | ChatFailure] | BaseException | None]


class ChatClient:
    """Asks one model at one OpenAI-compatible endpoint.

    Calls from any number of threads share one event loop in one daemon thread, and one bound on the calls in flight.
    A parameter that the endpoint refuses (`temperature`, `seed`, `max_tokens`, `response_format`) is dropped once,
    remembered and logged.

    Args:
        model: Name of the model at the endpoint.
        base_url: The endpoint, as for `openai.OpenAI`. `None` reads `OPENAI_BASE_URL`, else means OpenAI.
        api_key: The key. `None` reads `OPENAI_API_KEY`; with a `base_url`, none is needed. Written nowhere.
        max_concurrency: Calls in flight at once, over all threads. Halved when the endpoint answers 429, recovering
            slowly.
        rpm: Requests per minute, over all processes. `None` means no limit but what the endpoint's headers say.
        tpm: Tokens per minute, sent and received, over all processes; likewise.
        num_processes: Processes that share the limits, each taking an equal part. `None` reads `WORLD_SIZE`, else
            means 1.
        prices: What the endpoint charges in US dollars per million tokens: `input`, `output` and, if it differs,
            `cached_input`. `None` means unknown, unless its replies say what they cost.
        max_cost: US dollars to spend at most, over all processes, failed calls included; what might cost more is not
            asked. Takes `prices`. `None` means no cap.
        max_run_tokens: Tokens to send and receive at most, likewise.
        timeout: Seconds that one call may take, by the clock. A `Retry-After` beyond it is not waited for.
        max_retries: Further attempts after a first one that failed in a way that may pass.
        temperature: Sampling temperature of the model.
        max_tokens: Tokens that a reply may take.
        seed: Seed of the model's sampling.
        extra_body: Further fields of the request body, for what an endpoint offers beyond the standard.

    Raises:
        RankerError: If no key is given and `base_url` is not either.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        max_concurrency: int = 32,
        rpm: float | None = None,
        tpm: float | None = None,
        num_processes: int | None = None,
        prices: Prices | Mapping[str, float] | None = None,
        max_cost: float | None = None,
        max_run_tokens: int | None = None,
        timeout: float = 60.0,
        max_retries: int = 3,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        seed: int = 0,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if not model:
            raise ValueError("`model` must name the model at the endpoint; got an empty text.")
        if max_concurrency < 1:
            raise ValueError(f"`max_concurrency` must be at least 1; got {max_concurrency}.")
        num_processes = resolve_num_processes(num_processes)
        if rpm is not None and not 0 < rpm < math.inf:
            raise ValueError(f"`rpm` must be above 0 requests per minute, or None for no limit; got {rpm}.")
        if tpm is not None and not num_processes * max_tokens <= tpm < math.inf:
            raise ValueError(
                f"`tpm`, tokens per minute, must let each of {num_processes} processes receive one reply of "
                f"`max_tokens`={max_tokens} at least, or be None for no limit; got {tpm}. Raise it, or lower"
                " `max_tokens`."
            )
        if not 0 < timeout < math.inf:
            raise ValueError(f"`timeout` must be a positive number of seconds; got {timeout}.")
        if max_retries < 0:
            raise ValueError(f"`max_retries` must be at least 0; got {max_retries}.")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` must be at least 0; got {temperature}.")
        if max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1; got {max_tokens}.")
        self.model = model
        self.budget = Budget(max_cost, max_run_tokens, make_prices(prices), num_processes)
        self._timeout = timeout
        self._max_retries = max_retries
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._seed = seed
        self._extra_body = dict(extra_body or {})
        self._dialect = Dialect()
        # Of its own: drawing from the global generator would move the random state of a training run.
        self._jitter = random.Random()  # noqa: S311
        self._max_concurrency = max_concurrency
        self._meter = Meter(
            AdaptiveConcurrency(max_concurrency), self.budget, RateLimiter(rpm, tpm, num_processes), max_tokens
        )
        self._endpoint = Endpoint(
            base_url, api_key, max_connections=max_concurrency, timeout=timeout, extra_body=self._extra_body
        )
        self._loop = LoopThread(self._endpoint)
        self._open: set[Future[None]] = set()
        self._finalizer = weakref.finalize(self, self._loop.close)

    @property
    def url(self) -> str:
        """The endpoint's address, without secrets."""
        return self._endpoint.url

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on, as JSON. It holds no key, and of `extra_body` only a hash."""
        return {
            "model": self.model,
            "base_url": self.url,
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
            "seed": self._seed,
            "extra_body": digest(self._extra_body).hex() if self._extra_body else None,
        }

    def stream(self, tasks: Iterable[ChatTask[T]]) -> Iterator[tuple[int, ChatAnswer[T] | ChatFailure]]:
        """Yields (position of the task, its answer) as the replies arrive.

        Leaving the iterator early cancels the calls that are still open.

        Raises:
            RankerError: If the endpoint refuses the key, the model or every form of the request.
        """
        arrivals: _Arrivals[T] = queue.SimpleQueue()

        def end(work: Future[None]) -> None:
            if work.cancelled():
                closed = RankerError("The client was closed before all of its replies had arrived.")
                arrivals.put(closed if self._loop.closed else None)
            else:
                error = work.exception()
                arrivals.put(error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error)

        # What has arrived takes up room until the next is asked for: it may not have been stored yet, and be lost.
        room = asyncio.Semaphore(self._max_concurrency)
        work = self._loop.submit(self._answer_all(tasks, arrivals, room))
        work.add_done_callback(end)
        self._open.add(work)
        try:
            while (arrival := arrivals.get()) is not None:
                if isinstance(arrival, BaseException):
                    raise arrival
                yield arrival
                self._loop.call_soon(room.release)
        finally:
            self._open.discard(work)
            work.cancel()

    def cancel(self) -> None:
        """Cancels the calls in flight, on behalf of all threads; their streams end early."""
        for work in list(self._open):
            work.cancel()

    def check_connection(self) -> None:
        """Asks for the list of models, which costs nothing; any answer shows that somebody listens.

        Raises:
            RankerError: If nothing answers at the endpoint.
        """
        self._loop.submit(self._endpoint.connect()).result()

    def close(self) -> None:
        """Cancels the calls in flight and frees the connections. Happens by itself when the client is dropped."""
        self._finalizer()

    async def _answer_all(self, tasks: Iterable[ChatTask[T]], arrivals: _Arrivals[T], room: asyncio.Semaphore) -> None:
        async def answer(position: int, task: ChatTask[T]) -> None:
            arrivals.put((position, await self._answer(task, room)))

        async with asyncio.TaskGroup() as group:
            for position, task in enumerate(tasks):
                await room.acquire()
                group.create_task(answer(position, task))

    async def _answer(self, task: ChatTask[T], room: asyncio.Semaphore) -> ChatAnswer[T] | ChatFailure:
        note: str | None = None
        attempt = bad_replies = 0
        calls: list[Usage] = []
        while True:
            answer = await self._ask(task, note, self._seed + task.seed_offset + bad_replies, calls)
            if not isinstance(answer, Setback):
                return ChatAnswer(answer, sum(calls, _NOTHING))
            if answer.final or answer.retry_after > self._timeout or attempt == self._max_retries:
                return ChatFailure(answer.reason, answer.detail, sum(calls, _NOTHING) if calls else None)
            if answer.note is not None:
                bad_replies += 1
                note = answer.note
            else:
                backoff = min(_BACKOFF_CAP, _BACKOFF_BASE * 2**attempt)
                room.release()
                await asyncio.sleep(answer.retry_after + self._jitter.uniform(0, backoff))
                await room.acquire()
            attempt += 1

    async def _ask(self, task: ChatTask[T], note: str | None, seed: int, calls: list[Usage]) -> T | Setback:
        """Asks once, in the richest dialect that the endpoint takes."""
        body = {"model": self.model, "messages": task.messages(note)}
        start = self._dialect
        pending, tried = [start], set[Dialect]()
        while pending:
            dialect = pending.pop(0)
            if dialect in tried:
                continue
            tried.add(dialect)
            answer = await self._send(
                body
                | dialect.parameters(
                    max_tokens=self._max_tokens,
                    temperature=self._temperature,
                    seed=seed,
                    schema_name=task.schema_name,
                    schema=task.schema,
                ),
                calls,
            )
            if isinstance(answer, Setback):
                return answer
            response = answer
            if 200 <= response.status < 300:
                self._remember(dialect, start)
                return self._read_reply(task, response)
            setback = self._setback(response)
            if setback is not None:
                return setback
            if response.status not in (400, 422):
                break
            # What the endpoint names is left out next, on top of what already is; without a name, each in its turn.
            steps = dialect.steps()
            named = [steps.pop(name) for name in read_complaint(response).names(steps)]
            pending = [*named, *pending, *(steps.values() if named or dialect == start else ())]
        raise self._fatal(response)

    def _remember(self, dialect: Dialect, start: Dialect) -> None:
        if dialect in (start, self._dialect):
            return
        was, now = asdict(self._dialect), asdict(dialect)
        changes = ", ".join(f"{name} {was[name]} -> {now[name]}" for name in now if now[name] != was[name])
        self._dialect = dialect
        logger.warning("%s refuses a parameter for %s. Sent from now on: %s.", self.url, self.model, changes)

    async def _send(self, body: dict[str, Any], calls: list[Usage]) -> Response | Setback:
        answer, usage = await self._meter.call(body["messages"], lambda: self._endpoint.send(body))
        if usage is not None:
            calls.append(usage)
        return answer

    def _read_reply(self, task: ChatTask[T], response: Response) -> T | Setback:
        public = self._endpoint.public
        try:
            choice = response.body["choices"][0]
            refusal, content = choice["message"].get("refusal"), choice["message"].get("content") or ""
            finish_reason = choice.get("finish_reason")
            if not isinstance(content, str):
                raise TypeError("the content of the message is no text")
        except (LookupError, TypeError, AttributeError):
            return Setback("invalid_response", public(f"No chat completion: {response.text}"))
        if refusal or finish_reason == "content_filter":
            return Setback("refusal", public(str(refusal or finish_reason)), note=task.refusal_note)
        if finish_reason != "stop":
            detail = (
                f"finish_reason {finish_reason!r} instead of 'stop', max_tokens={self._max_tokens}: ...{content[-80:]}"
            )
            return Setback("truncated", public(detail), note=_TRUNCATED_NOTE)
        content = self._endpoint.without_key(content)  # it may be stored, and trained on
        try:
            return task.read(content)
        except InvalidReply as error:
            return Setback(error.reason, public(f"{error}: {content}"), note=_INVALID_NOTE.format(error))

    def _setback(self, response: Response) -> Setback | None:
        """What a status that may pass, or that concerns this request alone, means; `None` for any other."""
        status, complaint = response.status, read_complaint(response)
        detail = self._endpoint.public(f"HTTP {status}: {complaint.message}")
        if status == 402 or (status == 429 and complaint.code == "insufficient_quota"):
            return Setback("quota_exhausted", detail, final=True)  # no waiting brings money
        if status in (408, 409, 429) or status >= 500:
            reason = {408: "timeout", 429: "rate_limited"}.get(status, "server_error")
            return Setback(reason, detail, retry_after=retry_after(response.headers))
        if 300 <= status < 400:
            # Not followed: see `Endpoint`.
            location = response.headers.get("location", "").partition("?")[0]
            return Setback("redirect", self._endpoint.public(f"HTTP {status}: `base_url` is sent on to {location}"))
        if status == 413 or (status in (400, 422) and complaint.is_about_length):
            return Setback("too_long", detail, final=True)
        if status in (400, 422) and complaint.code in _REFUSED_CONTENT:
            return Setback("refusal", detail, final=True)
        return None

    def _fatal(self, response: Response) -> RankerError:
        fix = _FIXES.get(response.status, "Asking again would not help.")
        answer = f"HTTP {response.status}: {read_complaint(response).message}"
        return RankerError(
            self._endpoint.public(
                f"The model {self.model!r} at {self.url} cannot be asked. {fix} The answer was {answer}"
            )
        )
