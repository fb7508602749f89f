"""A ranker behind any OpenAI-compatible chat endpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from .._warnings import OnceLogger
from ..chat.budget import Budget, Prices
from ..chat.client import ChatClient, ChatFailure, ChatTask
from ..chat.dialect import ReplySchema
from ..chat.messages import estimate_tokens, message_bytes
from ..chat.settings import ChatSettings
from ..types import Demonstration, RankingFailure, RankingRequest, RankingResult, Usage
from .base import CANCELLED, Outcome
from .context import FittedRequest, fit_request
from .parsing import parse_ranking
from .passes import shown_order, stream_in_passes
from .prompts import PROMPT_VERSION, build_messages, labels, reply_schema

logger = logging.getLogger(__name__)

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

    With `num_passes`, each request is asked so many times, at once, in shown orders of which every second one is the
    reverse of the one before; the rankings are merged by Borda's count, and how far they agree is the result's
    `consistency`. With a `context_window`, a request that is too long loses its oldest dynamic demonstrations, then
    its static ones, then the ends of its completions, as many as it must; the result's `trimmed` says so. What does
    not even fit then is a `RankingFailure("too_long")`, without a call.

    Model, endpoint, limits and sampling are the arguments of
    [`ChatSettings`][cyclealign_trl.chat.settings.ChatSettings], which describes them. `seed` also determines the shown
    order of the completions. The other arguments are:

    Args:
        criteria: Description of what makes a completion better. `None` means harmlessness and helpfulness.
        shuffle: Whether to shuffle the completions before they are shown, against position bias.
        improve: Whether to request an improved completion as well.
        num_passes: Number of rankings to request and merge per request, against position bias and noise.
        context_window: Tokens that the model accepts, reply included, estimated as one token per 3 bytes of text.
            `None` never truncates a request.

    Raises:
        RankerError: If neither an API key nor a `base_url` is given.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        criteria: str | None = None,
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
        shuffle: bool = True,
        improve: bool = True,
        num_passes: int = 1,
        context_window: int | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if num_passes < 1:
            raise ValueError(f"`num_passes` must be at least 1; got {num_passes}.")
        if num_passes > 1 and not shuffle:
            raise ValueError(
                f"`num_passes={num_passes}` with `shuffle=False` would show the same order {num_passes} times: leave "
                "one of them out."
            )
        if context_window is not None and context_window <= max_tokens:
            raise ValueError(
                f"`context_window` ({context_window} tokens) holds request and reply, so it must be larger than "
                f"`max_tokens` ({max_tokens})."
            )
        settings = ChatSettings(
            model,
            base_url,
            api_key,
            max_concurrency=max_concurrency,
            rpm=rpm,
            tpm=tpm,
            num_processes=num_processes,
            prices=prices,
            max_cost=max_cost,
            max_run_tokens=max_run_tokens,
            timeout=timeout,
            max_retries=max_retries,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            extra_body=extra_body,
        )
        self._client = ChatClient(settings)
        self._settings = settings
        self._criteria = criteria
        self._shuffle = shuffle
        self._improve = improve
        self._num_passes = num_passes
        self._context_window = context_window
        self._once = OnceLogger(logger)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.name!r}, base_url={self._client.url!r})"

    @property
    def name(self) -> str:
        """The model's name, without the endpoint."""
        return self._settings.model

    @property
    def num_passes(self) -> int:
        """How many passes make a ranking."""
        return self._num_passes

    @property
    def budget(self) -> Budget:
        """What it may spend, and has spent."""
        return self._client.budget

    @property
    def fingerprint(self) -> str:
        """JSON text that changes whenever the answers might. It holds no key, and of `extra_body` only a hash."""
        identity = self._client.identity
        return json.dumps(
            {
                "model": identity["model"],
                "base_url": identity["base_url"],
                "criteria": self._criteria,
                "temperature": identity["temperature"],
                "max_tokens": identity["max_tokens"],
                "seed": identity["seed"],
                "shuffle": self._shuffle,
                "improve": self._improve,
                "num_passes": self._num_passes,
                "context_window": self._context_window,
                "extra_body": identity["extra_body"],
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
        yield from stream_in_passes(self._stream, requests, self._num_passes)

    def _stream(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        """As `stream`, of single passes."""
        fits = [self._fit(request) for request in requests]
        waiting = {position: fitted for position, fitted in enumerate(fits) if fitted is not None}
        for position, fitted in enumerate(fits):
            if fitted is None:
                yield position, RankingFailure("too_long", f"More than context_window={self._context_window} tokens.")
        positions = list(waiting)
        for index, answer in self._client.stream(self._task(requests[at], waiting[at]) for at in positions):
            position = positions[index]
            del waiting[position]
            if isinstance(answer, ChatFailure):
                yield position, RankingFailure(answer.reason, answer.detail, answer.usage)
            else:
                yield position, replace(answer.value, usage=answer.usage)
        for position in waiting:
            yield position, RankingFailure(CANCELLED, "It was cancelled before its answer had arrived.")

    def estimate(self, request: RankingRequest) -> Usage:
        """What one ranking of the request is likely to take, by the length of its texts. Nothing is sent.

        Tokens are counted as 4 bytes of text each, retries as none. An improved completion is taken to be longer than
        the longest of K shown by a K-th, which is where the upper end of what K samples are drawn from is expected.
        """
        fitted = self._fit(request)
        if fitted is None:
            return self._client.budget.priced(Usage(attempts=0))
        order = range(len(request.completions))
        messages = self._messages(request, order, fitted.demonstrations, fitted.max_characters)
        reply = json.dumps({"ranking": labels(len(order)), **({"improved_response": ""} if self._improve else {})})
        longest = max(len(completion.encode(errors="replace")) for completion in request.completions)
        improved_bytes = longest * (len(order) + 1) // len(order) if self._improve else 0
        reply_tokens = min(estimate_tokens(len(reply) + improved_bytes), self._settings.max_tokens)
        num_passes = self._num_passes if request.pass_index is None else 1
        usage = Usage(
            prompt_tokens=num_passes * estimate_tokens(message_bytes(messages)),
            completion_tokens=num_passes * reply_tokens,
            attempts=num_passes,
        )
        return self._client.budget.priced(usage)

    def cancel(self) -> None:
        """Cancels the calls in flight, on behalf of all threads: what they were for becomes a `RankingFailure`."""
        self._client.cancel()

    def check_connection(self) -> None:
        """Asks for the list of models, which costs nothing; any answer shows that somebody listens.

        Raises:
            RankerError: If nothing answers at the endpoint.
        """
        self._client.check_connection()

    def close(self) -> None:
        """Cancels the calls in flight and frees the connections. Happens by itself when the ranker is dropped."""
        self._client.close()

    def _fit(self, request: RankingRequest) -> FittedRequest | None:
        """How much of the request is shown; `None` if it cannot be short enough."""
        if self._context_window is None:
            return FittedRequest(request.demonstrations)
        build = partial(self._messages, request, range(len(request.completions)))
        fitted = fit_request(request, build, self._context_window, self._settings.max_tokens)
        if fitted is not None and fitted.trimmed is not None:
            self._once.warning(
                "trimmed",
                "Requests to %s exceed context_window=%d: demonstrations or ends of completions are left out (counted "
                "in ranker/dropped_demonstrations, ranker/cut_completions). Lower max_demonstrations or "
                "max_completion_length, or take a model with more room.",
                self.name,
                self._context_window,
            )
        return fitted

    def _task(self, request: RankingRequest, fitted: FittedRequest) -> ChatTask[RankingResult]:
        order = self._shown_order(request)
        names = labels(len(order))
        return ChatTask(
            messages=partial(self._messages, request, order, fitted.demonstrations, fitted.max_characters),
            schema=ReplySchema("ranking", reply_schema(names, improve=self._improve)),
            read=partial(self._read, order, names, fitted),
            refusal_note=_REFUSAL_NOTE,
            seed_offset=request.pass_index or 0,  # few completions have fewer orders than there may be passes
        )

    def _shown_order(self, request: RankingRequest) -> list[int]:
        """The request's indices in the order in which they are shown."""
        return shown_order(request, self._settings.seed) if self._shuffle else list(range(len(request.completions)))

    def _messages(
        self,
        request: RankingRequest,
        order: Sequence[int],
        demonstrations: Sequence[Demonstration],
        max_characters: int | None,
        note: str | None = None,
    ) -> list[dict[str, str]]:
        return build_messages(
            request.prompt,
            [request.completions[index] for index in order],
            demonstrations,
            criteria=self._criteria,
            improve=self._improve,
            max_characters=max_characters,
            note=note,
        )

    def _read(self, order: Sequence[int], names: Sequence[str], fitted: FittedRequest, reply: str) -> RankingResult:
        """The ranking in a reply, as indices of the request."""
        parsed = parse_ranking(reply, names)
        return RankingResult(
            tuple(order[index] for index in parsed.order),
            improved_completion=parsed.improved_completion if self._improve else None,
            trimmed=fitted.trimmed,
        )
