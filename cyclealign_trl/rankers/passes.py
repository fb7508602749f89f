"""Rank the same completions several times in different orders, and merge the rankings.

Judges favour completions by their position. Passes that show the completions in different orders average this bias
out, and their agreement (`RankingResult.consistency`) measures how reliable the ranking is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

from ..chat.store import digest
from ..types import RankingFailure, RankingRequest, RankingResult
from .base import Outcome, order_from_ranks
from .kendall_tau import kendall_tau
from .merging import borda_ranks, mean_tau, total_usage

StreamSinglePasses = Callable[[Sequence[RankingRequest]], Iterator[tuple[int, Outcome]]]
"""Function like `StreamingRanker.stream` that makes one pass over each request."""


def shown_order(request: RankingRequest, seed: int) -> list[int]:
    """Return the indices of the completions in the order in which a pass shows them.

    The order depends on the seed and the request alone, not on the order of calls. Every second pass reverses the
    order of the pass before it, so that in such a pair each completion precedes each other one exactly once.
    """
    pair, reverse = divmod(request.pass_index or 0, 2)
    demonstrations = [asdict(demonstration) for demonstration in request.demonstrations]
    key = digest([seed, pair, request.prompt, request.completions, demonstrations])
    order = list(range(len(request.completions)))
    random.Random(key).shuffle(order)  # noqa: S311 - not used for secrets
    return order[::-1] if reverse else order


def stream_in_passes(
    stream: StreamSinglePasses, requests: Sequence[RankingRequest], num_passes: int
) -> Iterator[tuple[int, Outcome]]:
    """Yield (index of the request, merged outcome) for each request as soon as its last pass has arrived.

    A request with a `pass_index` is ranked in that pass only.

    Args:
        stream: Function that makes single passes. It receives the passes over all requests in one call.
        requests: Requests to rank.
        num_passes: Number of passes over each request.
    """
    passes: list[RankingRequest] = []
    passes_of: list[range] = []  # per request, the indices of its passes
    for request in requests:
        first = len(passes)
        if request.pass_index is None and num_passes > 1:
            passes += [replace(request, pass_index=index) for index in range(num_passes)]
        else:
            passes.append(request)
        passes_of.append(range(first, len(passes)))
    request_of = [index for index, own in enumerate(passes_of) for _ in own]
    arrived: dict[int, Outcome] = {}
    for pass_number, outcome in stream(passes):
        arrived[pass_number] = outcome
        request_index = request_of[pass_number]
        own = passes_of[request_index]
        if all(number in arrived for number in own):
            # Merged in the order of the passes, so that the result does not depend on the order of arrival.
            yield request_index, merge_passes([arrived.pop(number) for number in own])


def merge_passes(outcomes: Sequence[Outcome]) -> Outcome:
    """Merge the outcomes of several passes into one ranking by Borda count.

    Completions are ordered by the sum of their positions (see `borda_ranks`). Completions with equal sums share a
    rank, and `order` lists them by index. The improved completion comes from the pass whose ranking is closest to the
    merged one (by Kendall's tau-b, the first pass if several are equally close), among the passes that have one. The
    usage includes failed passes. It includes cached passes only if all passes are cached.

    If half of the passes or more have failed, the result is the first failure: the remaining passes could not average
    out the position bias.

    Args:
        outcomes: One outcome per pass over the same completions, in the order of the passes. A single outcome is
            returned unchanged.
    """
    if len(outcomes) == 1:
        return outcomes[0]
    results = [outcome for outcome in outcomes if isinstance(outcome, RankingResult)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, RankingFailure)]
    usage = total_usage(outcomes)
    if 2 * len(results) <= len(outcomes):
        detail = f"{len(failures)} of {len(outcomes)} passes failed. The first: {failures[0].detail}"
        return RankingFailure(failures[0].reason, detail, usage)
    rankings = [result.resolved_ranks for result in results]
    ranks = borda_ranks(rankings)
    closest_first = sorted(results, key=lambda result: -(kendall_tau(result.resolved_ranks, ranks) or 0.0))
    improved = (result.improved_completion for result in closest_first)
    return RankingResult(
        order=order_from_ranks(ranks),
        ranks=ranks,
        improved_completion=next((text for text in improved if text is not None), None),
        usage=usage,
        consistency=mean_tau(rankings),
        trimmed=results[0].trimmed,
    )
