"""A ranker behind any OpenAI-compatible chat endpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ..types import RankingFailure, RankingRequest, RankingResult
from .base import CANCELLED, Outcome
from .budget import Budget, Prices
from .client import ChatClient, ChatFailure, ChatTask
from .parsing import parse_ranking
from .prompts import PROMPT_VERSION, build_messages, labels, reply_schema
from .store import digest

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
        max_concurrency: Calls in flight at once, over all threads. Halved when the endpoint answers 429, recovering
            slowly.
        rpm: Requests per minute, over all processes. `None` means no limit but what the endpoint's headers say.
        tpm: Tokens per minute, sent and received, over all processes; likewise.
        num_processes: Processes that share the limits, each taking an equal part. `None` reads `WORLD_SIZE`, else
            means 1.
        prices: What the endpoint charges in US dollars per million tokens: `input`, `output` and, if it differs,
            `cached_input`. `None` means unknown, unless its replies say what they cost.
        max_cost: US dollars to spend at most in a run, over all processes, failed calls included; a request that
            might cost more becomes a `RankingFailure("budget_exhausted")`. Takes `prices`. `None` means no cap.
        max_run_tokens: Tokens to send and receive at most in a run, likewise.
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
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        self._client = ChatClient(
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
        self._criteria = criteria
        self._seed = seed
        self._shuffle = shuffle
        self._improve = improve

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.name!r}, base_url={self._client.url!r})"

    @property
    def name(self) -> str:
        """The model's name, without the endpoint."""
        return self._client.model

    @property
    def budget(self) -> Budget:
        """What it may spend, and has spent."""
        return self._client.budget

    @property
    def fingerprint(self) -> str:
        """JSON text that changes whenever the answers might. It holds no key, and of `extra_body` only a hash."""
        asked = self._client.settings
        return json.dumps(
            {
                "model": asked["model"],
                "base_url": asked["base_url"],
                "criteria": self._criteria,
                "temperature": asked["temperature"],
                "max_tokens": asked["max_tokens"],
                "seed": self._seed,
                "shuffle": self._shuffle,
                "improve": self._improve,
                "extra_body": asked["extra_body"],
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
        waiting = set(range(len(requests)))
        for position, answer in self._client.stream(map(self._task, requests)):
            waiting.discard(position)
            if isinstance(answer, ChatFailure):
                yield position, RankingFailure(answer.reason, answer.detail, answer.usage)
            else:
                yield position, replace(answer.value, usage=answer.usage)
        for position in sorted(waiting):
            yield position, RankingFailure(CANCELLED, "It was cancelled before its answer had arrived.")

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

    def _task(self, request: RankingRequest) -> ChatTask[RankingResult]:
        order = self._shown_order(request)
        names = labels(len(order))
        return ChatTask(
            messages=partial(self._messages, request, order),
            schema_name="ranking",
            schema=reply_schema(names, improve=self._improve),
            read=partial(self._read, order, names),
            refusal_note=_REFUSAL_NOTE,
        )

    def _shown_order(self, request: RankingRequest) -> list[int]:
        """The request's indices in the order in which they are shown."""
        order = list(range(len(request.completions)))
        if self._shuffle:
            demonstrations = [asdict(demonstration) for demonstration in request.demonstrations]
            # 0: the first pass over this request. A second pass, with another order, would count on from here.
            key = [self._seed, 0, request.prompt, request.completions, demonstrations]
            random.Random(digest(key)).shuffle(order)  # noqa: S311
        return order

    def _messages(self, request: RankingRequest, order: Sequence[int], note: str | None) -> list[dict[str, str]]:
        return build_messages(
            request.prompt,
            [request.completions[index] for index in order],
            request.demonstrations,
            criteria=self._criteria,
            improve=self._improve,
            note=note,
        )

    def _read(self, order: Sequence[int], names: Sequence[str], reply: str) -> RankingResult:
        """The ranking in a reply, as indices of the request."""
        parsed = parse_ranking(reply, names)
        return RankingResult(
            tuple(order[index] for index in parsed.order),
            improved_completion=parsed.improved_completion if self._improve else None,
        )
