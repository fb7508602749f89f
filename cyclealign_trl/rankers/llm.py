"""A ranker behind any OpenAI-compatible chat endpoint: many calls at once, one retry layer, failures as data."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import queue
import random
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import RankerError
from ..types import RankingFailure, RankingRequest, RankingResult, Usage
from .base import Outcome
from .dialect import Dialect
from .loop import LoopThread
from .parsing import InvalidRanking, parse_ranking
from .prompts import PROMPT_VERSION, build_messages, labels
from .responses import Response, Setback, read_complaint, read_usage, retry_after, total_usage

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

_BACKOFF_BASE = 0.5  # seconds
_BACKOFF_CAP = 8.0  # seconds
_PLACEHOLDER_KEY = "no-key"  # the client insists on one; servers of one's own rarely do
_DETAIL_LENGTH = 500  # characters

_REFUSED_CONTENT = ("content_filter", "content_policy_violation")
_FIXES = {
    400: "It refuses the request whichever optional parameter is left out.",
    401: "Set OPENAI_API_KEY, or pass `api_key`, to a key that is valid at this endpoint.",
    403: "Use a key that may call this model, or another model.",
    404: "Check `model`, and that `base_url` is the one above '/chat/completions' (it often ends in '/v1').",
}
_INVALID_NOTE = "Your previous reply was not valid: {}. Reply with the JSON object described above."
_TRUNCATED_NOTE = "Your previous reply was not finished. Be brief, and reply with the JSON object described above."
_REFUSAL_NOTE = (
    "Your previous reply was a refusal. To rank texts that exist already is to endorse none of them, and an improved "
    "response may itself decline. Reply with the JSON object described above."
)


class LLMRanker:
    """Ranks completions by asking a language model behind an OpenAI-compatible endpoint.

    Calls of `rank` from any number of threads share one client, one event loop in one daemon thread, and one bound on
    the calls in flight. The completions are shown in a shuffled order that depends on `seed` and the request alone.
    A parameter that the endpoint refuses (`temperature`, `seed`, `max_tokens`, `response_format`) is dropped once,
    remembered and logged.

    Args:
        model: Name of the model at the endpoint.
        base_url: The endpoint, as for `openai.OpenAI`. `None` reads `OPENAI_BASE_URL`, else means OpenAI.
        api_key: The key. `None` reads `OPENAI_API_KEY`; with a `base_url`, none is needed. Written nowhere.
        criteria: What makes a completion better, in words. `None` means harmlessness and helpfulness.
        max_concurrency: Calls in flight at once, over all threads.
        timeout: Seconds that one call may take, by the clock. A `Retry-After` beyond it is not waited for.
        max_retries: Further attempts after a first one that failed in a way that may pass.
        temperature: Sampling temperature of the judge.
        max_tokens: Tokens that a reply may take.
        seed: Seed of the shown order and of the judge's sampling.
        shuffle: Whether to shuffle the shown order, against position bias.
        improve: Whether to ask for an improved completion too.
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
        criteria: str | None = None,
        max_concurrency: int = 32,
        timeout: float = 60.0,
        max_retries: int = 3,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        seed: int = 0,
        shuffle: bool = True,
        improve: bool = True,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if not model:
            raise ValueError("`model` must name the model at the endpoint; got an empty text.")
        if max_concurrency < 1:
            raise ValueError(f"`max_concurrency` must be at least 1; got {max_concurrency}.")
        if not 0 < timeout < math.inf:
            raise ValueError(f"`timeout` must be a positive number of seconds; got {timeout}.")
        if max_retries < 0:
            raise ValueError(f"`max_retries` must be at least 0; got {max_retries}.")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` must be at least 0; got {temperature}.")
        if max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1; got {max_tokens}.")
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        self._api_key = _resolve_key(api_key, base_url)
        self._model = model
        self._criteria = criteria
        self._max_concurrency = max_concurrency
        self._timeout = timeout
        self._max_retries = max_retries
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._seed = seed
        self._shuffle = shuffle
        self._improve = improve
        self._extra_body = dict(extra_body or {})
        self._dialect = Dialect()
        # Of its own: drawing from the global generator would move the random state of a training run.
        self._jitter = random.Random()  # noqa: S311
        self._slots = asyncio.Semaphore(max_concurrency)
        client = _make_client(base_url, self._api_key, max_concurrency)
        self._client = client
        self._endpoint = _public_url(str(client.base_url))
        self._loop = LoopThread(client)
        self._finalizer = weakref.finalize(self, self._loop.close)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self._model!r}, base_url={self._endpoint!r})"

    @property
    def name(self) -> str:
        """The model's name, without the endpoint."""
        return self._model

    @property
    def fingerprint(self) -> str:
        """JSON text that changes whenever the answers might. It holds no key, and of `extra_body` only a hash."""
        return json.dumps(
            {
                "model": self._model,
                "base_url": self._endpoint,
                "criteria": self._criteria,
                "temperature": self._temperature,
                "max_tokens": self._max_tokens,
                "seed": self._seed,
                "shuffle": self._shuffle,
                "improve": self._improve,
                "extra_body": _digest(self._extra_body).hex() if self._extra_body else None,
                "prompt_version": PROMPT_VERSION,
            }
        )

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Ranks each request; see `Ranker.rank`.

        Raises:
            RankerError: If the endpoint refuses the key, the model or every form of the request.
            ValueError: If a request has fewer than two completions.
        """
        answers = dict(self.stream(requests))
        return [answers[position] for position in range(len(requests))]

    def stream(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        """Yields (position of the request, its answer) as the replies arrive; raises as `rank` does.

        Leaving the iterator early cancels the calls that are still open.
        """
        for request in requests:
            if len(request.completions) < 2:
                raise ValueError(f"A ranking takes at least 2 completions; got {len(request.completions)}.")
        arrivals: queue.SimpleQueue[tuple[int, Outcome] | BaseException] = queue.SimpleQueue()
        work = self._loop.submit(self._answer_all(list(requests), arrivals))
        try:
            for _ in requests:
                arrival = arrivals.get()
                if isinstance(arrival, BaseException):
                    raise arrival
                yield arrival
        finally:
            work.cancel()

    def check_connection(self) -> None:
        """Asks for the list of models, which costs nothing; any answer shows that somebody listens.

        Raises:
            RankerError: If nothing answers at the endpoint.
        """
        self._loop.submit(self._connect()).result()

    def close(self) -> None:
        """Cancels the calls in flight and frees the connections. Happens by itself when the ranker is dropped."""
        self._finalizer()

    async def _connect(self) -> None:
        import openai

        try:
            async with asyncio.timeout(self._timeout):
                await self._client.models.with_raw_response.list()
        except openai.APIStatusError:
            return  # not every server lists its models
        except (TimeoutError, openai.APIConnectionError) as error:
            raise RankerError(
                f"Nothing answers at {self._endpoint}: start the server, or check `base_url`. "
                + self._public(f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}")
            ) from None

    async def _answer_all(
        self, requests: Sequence[RankingRequest], arrivals: queue.SimpleQueue[tuple[int, Outcome] | BaseException]
    ) -> None:
        async def answer(position: int, request: RankingRequest) -> None:
            arrivals.put((position, await self._answer(request)))

        try:
            async with asyncio.TaskGroup() as group:
                for position, request in enumerate(requests):
                    group.create_task(answer(position, request))
        except BaseExceptionGroup as errors:
            arrivals.put(errors.exceptions[0])
        except asyncio.CancelledError:
            arrivals.put(RankerError("The ranker was closed before all of its rankings had arrived."))
            raise

    async def _answer(self, request: RankingRequest) -> Outcome:
        order = self._shown_order(request)
        shown = [request.completions[index] for index in order]
        names = labels(len(order))
        note: str | None = None
        attempt = bad_replies = 0
        calls: list[Usage] = []
        while True:
            body = {
                "model": self._model,
                "messages": build_messages(
                    request.prompt,
                    shown,
                    request.demonstrations,
                    criteria=self._criteria,
                    improve=self._improve,
                    note=note,
                ),
            }
            answer = await self._ask(body, names, self._seed + bad_replies, calls)
            if isinstance(answer, RankingResult):
                return replace(answer, order=tuple(order[index] for index in answer.order), usage=total_usage(calls))
            if answer.final or answer.retry_after > self._timeout or attempt == self._max_retries:
                return RankingFailure(answer.reason, answer.detail, total_usage(calls))
            if answer.note is not None:
                bad_replies += 1
                note = answer.note
            else:
                backoff = min(_BACKOFF_CAP, _BACKOFF_BASE * 2**attempt)
                await asyncio.sleep(answer.retry_after + self._jitter.uniform(0, backoff))
            attempt += 1

    def _shown_order(self, request: RankingRequest) -> list[int]:
        """The request's indices in the order in which they are shown."""
        order = list(range(len(request.completions)))
        if self._shuffle:
            demonstrations = [asdict(demonstration) for demonstration in request.demonstrations]
            # 0: the first pass over this request. A second pass, with another order, would count on from here.
            key = [self._seed, 0, request.prompt, request.completions, demonstrations]
            random.Random(_digest(key)).shuffle(order)  # noqa: S311
        return order

    async def _ask(
        self, body: dict[str, Any], names: Sequence[str], seed: int, calls: list[Usage]
    ) -> RankingResult | Setback:
        """Asks once, in the richest dialect that the endpoint takes; the order is one of shown positions."""
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
                    names=names,
                    improve=self._improve,
                ),
                calls,
            )
            if isinstance(answer, Setback):
                return answer
            response = answer
            if 200 <= response.status < 300:
                self._remember(dialect, start)
                return self._read_reply(response, names, calls)
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
        logger.warning("%s refuses a parameter for %s. Sent from now on: %s.", self._endpoint, self._model, changes)

    async def _send(self, body: dict[str, Any], calls: list[Usage]) -> Response | Setback:
        import openai

        async with self._slots:
            calls.append(Usage())
            try:
                async with asyncio.timeout(self._timeout):
                    raw = await self._client.chat.completions.with_raw_response.create(
                        **body, extra_body=self._extra_body
                    )
                    response = raw.http_response
            except TimeoutError:
                return Setback("timeout", f"No reply within {self._timeout:g} s.")
            except openai.APIStatusError as error:
                response = error.response
            except openai.APIConnectionError as error:
                return Setback("connection", self._public(f"{type(error.__cause__).__name__}: {error.__cause__}"))
        return Response(response.status_code, response.headers, response.text)

    def _read_reply(self, response: Response, names: Sequence[str], calls: list[Usage]) -> RankingResult | Setback:
        try:
            body = json.loads(response.text)
            calls[-1] = read_usage(body)
            choice = body["choices"][0]
            refusal, content = choice["message"].get("refusal"), choice["message"].get("content") or ""
            finish_reason = choice.get("finish_reason")
            if not isinstance(content, str):
                raise TypeError("the content of the message is no text")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return Setback("invalid_response", self._public(f"No chat completion: {response.text}"))
        if refusal or finish_reason == "content_filter":
            return Setback("refusal", self._public(str(refusal or finish_reason)), note=_REFUSAL_NOTE)
        if finish_reason != "stop":
            detail = (
                f"finish_reason {finish_reason!r} instead of 'stop', max_tokens={self._max_tokens}: ...{content[-80:]}"
            )
            return Setback("truncated", self._public(detail), note=_TRUNCATED_NOTE)
        try:
            parsed = parse_ranking(content, names)
        except InvalidRanking as error:
            return Setback(error.reason, self._public(f"{error}: {content}"), note=_INVALID_NOTE.format(error))
        return RankingResult(parsed.order, improved_completion=parsed.improved_completion if self._improve else None)

    def _setback(self, response: Response) -> Setback | None:
        """What a status that may pass, or that concerns this request alone, means; `None` for any other."""
        status, complaint = response.status, read_complaint(response)
        detail = self._public(f"HTTP {status}: {complaint.message}")
        if status in (408, 409, 429) or status >= 500:
            reason = {408: "timeout", 429: "rate_limited"}.get(status, "server_error")
            return Setback(reason, detail, retry_after=retry_after(response.headers))
        if status == 413 or (status in (400, 422) and complaint.is_about_length):
            return Setback("too_long", detail, final=True)
        if status in (400, 422) and complaint.code in _REFUSED_CONTENT:
            return Setback("refusal", detail, final=True)
        return None

    def _fatal(self, response: Response) -> RankerError:
        fix = _FIXES.get(response.status, "Asking again would not help.")
        answer = f"HTTP {response.status}: {read_complaint(response).message}"
        return RankerError(
            self._public(
                f"The model {self._model!r} at {self._endpoint} cannot be asked. {fix} The answer was {answer}"
            )
        )

    def _public(self, text: str) -> str:
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


def _make_client(base_url: str | None, api_key: str, max_concurrency: int) -> AsyncOpenAI:
    import httpx2  # what openai speaks HTTP with
    from openai import AsyncOpenAI, DefaultAioHttpClient

    limits = httpx2.Limits(max_connections=max_concurrency, max_keepalive_connections=max_concurrency)
    # No timeouts below our own: theirs run per read, and under aiohttp a reset connection looks like one of them.
    http_client = DefaultAioHttpClient(limits=limits, timeout=None)
    return AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=None, http_client=http_client)


def _public_url(url: str) -> str:
    """The URL without a user's name, a password or a query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def _digest(value: object) -> bytes:
    """The same on every machine and in every process, unlike `hash`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
