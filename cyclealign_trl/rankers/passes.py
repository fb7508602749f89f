"""Several passes over the same completions, each in another shown order, merged into one ranking.

A judge has a liking for positions. Asked again in another order it likes other completions for theirs, so what the
passes have in common is its opinion, and how far they agree says what that is worth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from statistics import fmean

from ..chat.store import digest
from ..types import RankingFailure, RankingRequest, RankingResult, Usage, ranks_from_scores
from .base import Outcome
from .kendall_tau import kendall_tau

SinglePasses = Callable[[Sequence[RankingRequest]], Iterator[tuple[int, Outcome]]]
"""A `StreamingRanker.stream` that makes one pass over each request."""


def shown_order(request: RankingRequest, seed: int) -> list[int]:
    """The indices of the request's completions in the order in which its pass shows them.

    It depends on the seed and the request alone, never on the order of calls. Every second pass shows the one before
    in reverse, so that over the two each completion stands before each other one once.
    """
    pair, reverse = divmod(request.pass_index or 0, 2)
    demonstrations = [asdict(demonstration) for demonstration in request.demonstrations]
    key = digest([seed, pair, request.prompt, request.completions, demonstrations])
    order = list(range(len(request.completions)))
    random.Random(key).shuffle(order)  # noqa: S311 (no secret is made here)
    return order[::-1] if reverse else order


def stream_in_passes(
    stream: SinglePasses, requests: Sequence[RankingRequest], num_passes: int
) -> Iterator[tuple[int, Outcome]]:
    """Yields (position of the request, its merged answer), each as soon as its last pass has arrived.

    A request that names its own pass is asked that one alone.

    Args:
        stream: Makes single passes. It is given all of them at once.
        requests: What to rank.
        num_passes: Passes over each request.
    """
    passes: list[RankingRequest] = []
    places: dict[int, list[int]] = {}  # of a request's passes, by its position
    for position, request in enumerate(requests):
        whole = request.pass_index is None and num_passes > 1
        own = [replace(request, pass_index=index) for index in range(num_passes)] if whole else [request]
        places[position] = list(range(len(passes), len(passes) + len(own)))
        passes += own
    owner = {place: position for position, own in places.items() for place in own}
    arrived: dict[int, Outcome] = {}
    for place, outcome in stream(passes):
        arrived[place] = outcome
        own_places = places[owner[place]]
        if all(place in arrived for place in own_places):
            # In the order of the passes, whatever the order of arrival.
            yield owner[place], merge_passes([arrived.pop(place) for place in own_places])


def merge_passes(outcomes: Sequence[Outcome]) -> Outcome:
    """One ranking out of those of several passes, by Borda's count.

    A completion's count is the sum of its ranks. Equal counts are ties, listed by index. The improved completion is
    that of the pass whose ranking is closest to the merged one (Kendall's tau-b; of equally close ones, the first
    pass), among those that have one. The usage is what all passes took, failed ones included; of those that came from
    a cache only if all did.

    Passes fail one by one. With at most half of them left there is no ranking: it would show the bias that it was to
    be freed of. The failure is then the first one.

    Args:
        outcomes: One per pass over the same completions, in the order of the passes. A single one comes back as it is.
    """
    if len(outcomes) == 1:
        return outcomes[0]
    results = [outcome for outcome in outcomes if isinstance(outcome, RankingResult)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, RankingFailure)]
    usage = _total([outcome.usage for outcome in outcomes if outcome.usage is not None])
    if 2 * len(results) <= len(outcomes):
        detail = f"{len(failures)} of {len(outcomes)} passes failed. The first: {failures[0].detail}"
        return RankingFailure(failures[0].reason, detail, usage)
    rankings = [result.resolved_ranks for result in results]
    ranks = ranks_from_scores([-sum(of_one) for of_one in zip(*rankings, strict=True)])
    closeness = [kendall_tau(ranking, ranks) or 0.0 for ranking in rankings]
    closest = sorted(range(len(results)), key=lambda index: -closeness[index])
    improved = (results[index].improved_completion for index in closest)
    return RankingResult(
        order=tuple(sorted(range(len(ranks)), key=ranks.__getitem__)),
        ranks=ranks,
        improved_completion=next((text for text in improved if text is not None), None),
        usage=usage,
        consistency=_consistency(rankings),
        trimmed=results[0].trimmed,
    )


def _consistency(rankings: Sequence[Sequence[int]]) -> float | None:
    taus = [kendall_tau(first, second) for first, second in combinations(rankings, 2)]
    defined = [tau for tau in taus if tau is not None]
    return fmean(defined) if defined else None


def _total(usages: Sequence[Usage]) -> Usage | None:
    """What several answers took together; what a cache gave for nothing counts only where it gave all."""
    counted = [usage for usage in usages if not usage.cached] or list(usages)
    if not counted:
        return None
    return sum(counted[1:], start=counted[0])
