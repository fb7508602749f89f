"""The seam between the cycle and whoever ranks: one required method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from ..types import RankingFailure, RankingRequest, RankingResult, Usage, ranks_from_scores

Outcome = RankingResult | RankingFailure

CANCELLED = "cancelled"
"""Why a request has no answer whose call was ended by `cancel`."""


@runtime_checkable
class Ranker(Protocol):
    """Anything with a `rank` method.

    A ranker may also have:

    - A `fingerprint`, a text that changes whenever its answers might (model, endpoint, prompt version, sampling): with
      one, its answers can be cached (see `CachedRanker`).
    - A `name`, by which a published model card calls it; without one, that says its class.
    - A `num_passes`, if it merges so many passes over a request, and can be asked for each one by itself
      (`RankingRequest.pass_index`): a cache then keeps every pass.
    - A `budget` (`cyclealign_trl.chat.budget.Budget`), if what it does is paid for. It reserves and settles there
      each call that it makes, and answers `RankingFailure("budget_exhausted")` in place of one that does not fit.
      `CycleAlignTrainer` keeps the budget's ledger in the output directory, and shares out what is left among its
      processes after every step.
    - A method `estimate(request)`, which says without a call what `Usage` a ranking is likely to take, for `cyclealign
      estimate`.
    - A method `cancel()`, which may be called from any thread while others wait for answers: it ends the calls that
      are open, and each of these requests becomes a `RankingFailure("cancelled")`. The trainer calls it when a step
      has waited for its rankings for too long.
    """

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Ranks each request; the answers stand in the order of the requests.

        Called from worker threads, several at a time. What fails for one request is a `RankingFailure` in its place;
        raise `RankerError` only for what no further request can survive.
        """
        ...


@runtime_checkable
class StreamingRanker(Ranker, Protocol):
    """A ranker that also hands out its answers one by one, so that each can be stored the moment it is paid for."""

    def stream(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        """Yields (position of the request, its answer) in order of arrival."""
        ...


def cancel(ranker: Ranker) -> None:
    """Cancels what a ranker is asked at the moment, if it can."""
    if callable(method := getattr(ranker, "cancel", None)):
        method()


def estimate(ranker: Ranker, request: RankingRequest) -> Usage | None:
    """What a ranking is likely to take, without a call; `None` where the ranker does not say."""
    method = getattr(ranker, "estimate", None)
    return method(request) if callable(method) else None


def ranker_name(ranker: Ranker) -> str:
    """What to call a ranker in public: its `name`, or its class."""
    return getattr(ranker, "name", None) or type(ranker).__name__


def outcome_of(scores: Sequence[float]) -> Outcome:
    """The ranking of one request's completions by their scores, where all of them are finite."""
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            return RankingFailure("no_score", f"completion {index} has the score {score}")
    ranks = ranks_from_scores(scores)
    return RankingResult(order=tuple(sorted(range(len(ranks)), key=ranks.__getitem__)), ranks=ranks)
