"""Ranker over a language model behind an OpenAI-compatible chat endpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from .base import CANCELLED, Outcome, check_positive, in_request_order
from .context import FittedRequest, fit_request, tokens_left
from .parsing import parse_ranking
from .passes import shown_order, stream_in_passes
from .prompts import PROMPT_VERSION, build_messages, labels, reply_schema

logger = logging.getLogger(__name__)

_REFUSAL_NOTE = (
    "Your previous reply was a refusal. To rank texts that exist already is to endorse none of them, and an improved "
    "response may itself decline. Reply with the JSON object described above."
)


class LLMRanker:
    """Rank completions with a language model behind an OpenAI-compatible endpoint.

    `rank` is thread-safe. All threads share one client, one event loop in a daemon thread, and one limit on the calls
    in flight. The completions are shuffled before they are shown, in an order that depends on `seed` and the request
    alone. If the endpoint rejects a parameter (`temperature`, `seed`, `max_tokens`, `response_format`), the ranker
    drops or replaces it, logs this once, and does not send the parameter again.

    With `num_passes`, each request is ranked several times concurrently. Every second pass shows the completions in
    reverse order. The rankings are merged by Borda count, and `RankingResult.consistency` is their agreement.

    With a `context_window`, requests that are too long are shortened: first the oldest dynamic demonstrations are
    dropped, then the static ones, and then the completions are truncated. `RankingResult.trimmed` counts both. A
    request that still does not fit becomes `RankingFailure("too_long")` without a call.

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
        api_key: str | Callable[[], Any] | None = None,
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
        reasoning_effort: str | None = None,
        extra_headers: Mapping[str, str] | None = None,
        api_version: str | None = None,
    ) -> None:
        check_positive(num_passes=num_passes)
        if num_passes > 1 and not shuffle:
            raise ValueError(
                f"`num_passes={num_passes}` with `shuffle=False` would show the same order {num_passes} times. Set "
                "`shuffle=True` or `num_passes=1`."
            )
        if context_window is not None and context_window <= max_tokens:
            raise ValueError(
                f"`context_window` must be larger than `max_tokens`, because it includes the reply, got "
                f"{context_window} and {max_tokens}."
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
            reasoning_effort=reasoning_effort,
            extra_headers=extra_headers,
            api_version=api_version,
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

    def __deepcopy__(self, memo: dict[int, Any]) -> LLMRanker:
        self._check_copy()
        copied = type(self).__new__(type(self))
        copied.__setstate__({name: value for name, value in self.__dict__.items() if name != "_client"})
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self._check_copy()
        if isinstance(self._settings.api_key, str) or self._settings.extra_headers:
            raise TypeError(
                "An LLMRanker with `api_key` or `extra_headers` cannot be pickled, because the pickle would contain "
                "secrets. Set OPENAI_API_KEY, or pass a function as `api_key`."
            )
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._client = ChatClient(self._settings)

    def _check_copy(self) -> None:
        if self._settings.max_cost is not None or self._settings.max_run_tokens is not None:
            raise TypeError(
                "An LLMRanker with `max_cost` or `max_run_tokens` cannot be copied, because each copy could spend as "
                "much. Build one ranker for each use, with a part of the budget."
            )

    @property
    def name(self) -> str:
        """Name of the model, without the endpoint."""
        return self._settings.model

    @property
    def num_passes(self) -> int:
        """Number of passes that are merged into a ranking."""
        return self._num_passes

    @property
    def shuffle(self) -> bool:
        """Whether completions are shuffled before they are shown."""
        return self._shuffle

    @property
    def budget(self) -> Budget:
        """Spending limits and the amounts spent so far."""
        return self._client.budget

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of all replies so far that went into reasoning, as far as the endpoint reports them."""
        return self._client.reasoning_tokens

    @property
    def fingerprint(self) -> str:
        """JSON object with everything that determines the rankings.

        It does not contain the API key, and contains only a hash of `extra_body`.
        """
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
                **{name: identity[name] for name in ("reasoning_effort",) if name in identity},
            }
        )

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Rank the completions of each request. See `Ranker.rank`.

        Raises:
            RankerError: If the endpoint rejects the API key, the model, or every form of the request.
            ValueError: If a request has fewer than two completions.
        """
        return in_request_order(self.stream(requests))

    def stream(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        """Yield (index of the request, outcome) in order of arrival.

        Closing the iterator early cancels the open calls.

        Raises:
            RankerError: If the endpoint rejects the API key, the model, or every form of the request.
            ValueError: If a request has fewer than two completions.
        """
        for request in requests:
            if len(request.completions) < 2:
                raise ValueError(
                    f"A ranking request must have at least 2 completions, got {len(request.completions)}."
                )
        yield from stream_in_passes(self._stream_single_passes, requests, self._num_passes)

    def estimate(self, request: RankingRequest) -> Usage:
        """Estimate the usage of one ranking from the lengths of its texts, without a call.

        One token is counted per 4 bytes of text, and no retries. The improved completion is assumed to be longer than
        the longest of the K completions by a factor of (K + 1) / K, which gives an unbiased estimate of the maximum of
        a uniform distribution.
        """
        fitted = self._fit_request(request)
        if fitted is None:
            return self._client.budget.priced(Usage(attempts=0))
        order = range(len(request.completions))
        messages = self._build_messages(request, order, fitted.demonstrations, fitted.max_characters)
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
        """Cancel the calls in flight of all threads. Their requests become `RankingFailure("cancelled")`."""
        self._client.cancel()

    def check_connection(self) -> None:
        """Check that a server answers at the endpoint, with a free request for its list of models.

        Raises:
            RankerError: If no server answers.
        """
        self._client.check_connection()

    def close(self) -> None:
        """Cancel the calls in flight and close the connections. Garbage collection of the ranker does the same."""
        self._client.close()

    def _stream_single_passes(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        pending: dict[int, FittedRequest] = {}
        for index, request in enumerate(requests):
            fitted = self._fit_request(request)
            if fitted is None:
                detail = f"the request exceeds context_window={self._context_window} tokens"
                yield index, RankingFailure("too_long", detail)
            else:
                pending[index] = fitted
        indices = list(pending)
        for task_index, answer in self._client.stream(self._task(requests[i], pending[i]) for i in indices):
            index = indices[task_index]
            del pending[index]
            if isinstance(answer, ChatFailure):
                yield index, RankingFailure(answer.reason, answer.detail, answer.usage)
            else:
                yield index, replace(answer.value, usage=answer.usage)
        for index in pending:
            yield index, RankingFailure(CANCELLED, "the call was cancelled before its reply arrived")

    def _fit_request(self, request: RankingRequest) -> FittedRequest | None:
        """Return the part of the request that fits into the context window, or `None` if it cannot fit."""
        if self._context_window is None:
            return FittedRequest(request.demonstrations)
        build = partial(self._build_messages, request, range(len(request.completions)))
        fitted = fit_request(request, build, self._context_window, self._settings.max_tokens)
        if fitted is not None and fitted.trimmed is not None:
            self._once.warning(
                "trimmed",
                "Requests to %s exceed context_window=%d, so demonstrations are dropped or completions truncated "
                "(counted in ranker/dropped_demonstrations and ranker/cut_completions). Lower max_demonstrations or "
                "max_completion_length, or use a model with a larger context window.",
                self.name,
                self._context_window,
            )
        return fitted

    def _task(self, request: RankingRequest, fitted: FittedRequest) -> ChatTask[RankingResult]:
        order = self._shown_order(request)
        names = labels(len(order))
        messages = partial(self._build_messages, request, order, fitted.demonstrations, fitted.max_characters)
        window = self._context_window
        return ChatTask(
            messages=messages,
            max_reply_tokens=None if window is None else tokens_left(messages(), window),
            schema=ReplySchema("ranking", reply_schema(names, improve=self._improve)),
            read=partial(self._read_reply, order, names, fitted),
            refusal_note=_REFUSAL_NOTE,
            # Two passes can show the same order, because a few completions have only a few orders.
            seed_offset=request.pass_index or 0,
        )

    def _shown_order(self, request: RankingRequest) -> list[int]:
        """Return the indices of the completions in the order in which they are shown."""
        return shown_order(request, self._settings.seed) if self._shuffle else list(range(len(request.completions)))

    def _build_messages(
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

    def _read_reply(
        self, order: Sequence[int], names: Sequence[str], fitted: FittedRequest, reply: str
    ) -> RankingResult:
        """Parse a reply, and map its ranking from the order shown to the order of the request."""
        parsed = parse_ranking(reply, names)
        return RankingResult(
            tuple(order[index] for index in parsed.order),
            improved_completion=parsed.improved_completion if self._improve else None,
            trimmed=fitted.trimmed,
        )
