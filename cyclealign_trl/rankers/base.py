"""The interface between trainers and rankers, and helpers that rankers share."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from ..types import RankingFailure, RankingRequest, RankingResult, Usage, ranks_from_scores

Outcome = RankingResult | RankingFailure

CANCELLED = "cancelled"
"""Failure reason of a request whose call was ended by `cancel`."""


@runtime_checkable
class Ranker(Protocol):
    """Protocol of a ranker: any object with a `rank` method. No base class is needed.

    To rank with another API, write one class. `rankers/function.py` is the file to copy. A complete ranker over an
    HTTP API that scores completions:

    ```python
    from requests import RequestException, post

    from cyclealign_trl import RankingFailure
    from cyclealign_trl.rankers.base import rank_by_scores


    class ScoreServiceRanker:
        def __init__(self, url):
            self.url = url

        def rank(self, requests):
            return [self._rank_one(request) for request in requests]

        def _rank_one(self, request):
            query = {"prompt": request.prompt, "completions": request.completions}
            try:
                response = post(self.url, json=query, timeout=60)
                response.raise_for_status()
                scores = response.json()
            except RequestException as error:
                return RankingFailure("connection", str(error))
            return rank_by_scores(scores)
    ```

    A trainer calls `rank` from several threads at once, so a ranker that cannot run concurrently needs a lock.

    Each of the following attributes is optional and enables one feature:

    - `name` (`str`): Name of the ranker in model cards and reports. Defaults to the name of its class.
    - `fingerprint` (`str`): Identifies everything that determines the outcomes, such as model, endpoint, prompt
      version and sampling settings. Enables caching: see `CachedRanker`. A ranker without it is never cached.
    - `num_passes` (`int`): Number of passes over a request that the ranker merges into one ranking. The ranker must
      then also answer a request for a single pass (`RankingRequest.pass_index`). `CachedRanker` stores every pass.
    - `shuffle` (`bool`): Whether the ranker shows the completions in an order of its own. Passes 0 and 1 of a request
      must then show opposite orders. Callers that need both orders ask for these passes, and otherwise swap the
      completions themselves.
    - `budget` (`cyclealign_trl.chat.budget.Budget`, or `JointBudget` of several rankers): Spending limit. The ranker
      reserves the largest possible cost before a call and settles the real cost after it. A request that the budget
      cannot cover becomes `RankingFailure("budget_exhausted")`. `CycleAlignTrainer` keeps the ledger in its output
      directory, and divides the remaining budget among its processes after every step.
    - `stream(requests)`: Yields outcomes as they arrive. See `StreamingRanker`.
    - `estimate(request)`: Returns the `Usage` to expect for a ranking without making a call. Used by
      `cyclealign estimate`.
    - `cancel()`: Ends all open calls. Their requests become `RankingFailure("cancelled")`. The trainer calls it, from
      any thread, when a step has waited too long for its rankings.
    """

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Rank the completions of each request.

        Args:
            requests: Requests to rank. Each one has a prompt, its completions, and demonstrations to show first.

        Returns:
            One outcome per request, in the same order: a `RankingResult`, or a `RankingFailure` for a request that
            could not be ranked. Training skips a failed request and counts its `reason`, so return a failure instead
            of a guessed order.

        Raises:
            RankerError: If no further request can succeed, for example because the API key is wrong. This stops the
                run.
        """
        ...


@runtime_checkable
class StreamingRanker(Ranker, Protocol):
    """Ranker that also yields outcomes one by one, so that `CachedRanker` can store each one when it arrives."""

    def stream(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        """Yield (index of the request, outcome) in order of arrival."""
        ...


def stream_outcomes(ranker: Ranker, requests: Sequence[RankingRequest]) -> Generator[tuple[int, Outcome], None, None]:
    """Yield (position of the request, its outcome) as the answers arrive; all at once if the ranker does not stream.

    Without requests, the ranker is not asked.
    """
    if not requests:
        return
    if isinstance(ranker, StreamingRanker):
        yield from ranker.stream(requests)
    else:
        yield from enumerate(ranker.rank(requests))


def cancel(ranker: Ranker) -> None:
    """Cancel the open calls of a ranker, if it supports cancelling."""
    if callable(method := getattr(ranker, "cancel", None)):
        method()


def set_default_tokenizer(ranker: Ranker, tokenizer: Any) -> None:
    """Give a ranker the policy's tokenizer, if it can use one, such as a `FunctionRanker`."""
    if callable(method := getattr(ranker, "set_default_tokenizer", None)):
        method(tokenizer)


def estimate(ranker: Ranker, request: RankingRequest) -> Usage | None:
    """Return the usage that a ranker expects for a request, or `None` if it has no estimate."""
    method = getattr(ranker, "estimate", None)
    return method(request) if callable(method) else None


def ranker_name(ranker: Ranker) -> str:
    """Return the public name of a ranker: its `name`, or the name of its class."""
    return getattr(ranker, "name", None) or type(ranker).__name__


def check_ranker(ranker: object) -> None:
    """Raise `TypeError` with a suggestion if an object is not a ranker."""
    if isinstance(ranker, type):
        raise TypeError(f"ranker is the class {ranker.__name__}. Pass an instance of it: {ranker.__name__}(...).")
    if not callable(getattr(ranker, "rank", None)):
        raise TypeError(
            f"ranker must have a method rank(requests), and {type(ranker).__name__} has none. {_suggestion(ranker)}"
        )


def _suggestion(ranker: object) -> str:
    """Return how to make a ranker from an object of another kind."""
    if isinstance(ranker, str):
        return f"Pass LLMRanker({ranker!r}), or RewardModelRanker({ranker!r}) if it is a reward model."
    if is_model(ranker):
        return "Pass RewardModelRanker(model), or SelfRewardRanker(model) if it is not a reward model."
    if callable(ranker):
        return "Pass FunctionRanker(f) for a reward function f."
    if isinstance(ranker, list | tuple):
        return "Pass FunctionRanker([...]) for reward functions."
    return 'Pass a ranker such as LLMRanker("gpt-5-mini").'


def is_model(value: object) -> bool:
    """Return whether a value is a PyTorch module, without importing PyTorch."""
    return hasattr(value, "named_parameters")


def rank_by_scores(scores: Sequence[float]) -> Outcome:
    """Rank the completions of one request by score, higher is better.

    Completions with equal scores share a rank, and `order` lists them by index.

    Args:
        scores: One score per completion.

    Returns:
        The ranking, or `RankingFailure("no_score")` if a score is not finite.
    """
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            return RankingFailure("no_score", f"completion {index} has the score {score}")
    ranks = ranks_from_scores(scores)
    return RankingResult(order=order_from_ranks(ranks), ranks=ranks)


def order_from_ranks(ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the indices of the completions, best first. Completions with equal ranks keep the order of their indices.

    Example:
        >>> order_from_ranks([1, 0, 1])
        (1, 0, 2)
    """
    return tuple(sorted(range(len(ranks)), key=ranks.__getitem__))


def in_request_order(outcomes: Iterable[tuple[int, Outcome]]) -> list[Outcome]:
    """Return the outcomes of a stream in the order of their requests."""
    by_index = dict(outcomes)
    return [by_index[index] for index in range(len(by_index))]


def check_positive(**settings: int | None) -> None:
    """Raise `ValueError` if a setting is less than 1. `None` is accepted."""
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
