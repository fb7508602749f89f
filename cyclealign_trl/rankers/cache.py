"""A ranker that pays for no answer twice: valid rankings are kept in SQLite, each from the moment it arrives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

from ..chat.budget import Budget
from ..chat.store import AnswerStore, digest
from ..types import RankingRequest, RankingResult, Trimmed, Usage
from .base import Outcome, Ranker, StreamingRanker, cancel, estimate, ranker_name
from .passes import stream_in_passes


class CachedRanker:
    """Answers from a database what was answered before, and stores what the ranker answers now.

    Only valid rankings are stored, never failures. The key is the ranker's fingerprint together with the request:
    prompt, completions, demonstrations and metadata. A stored answer comes back with `usage.cached` set. The same
    request twice in one call is sent once. Any number of threads may call `rank`.

    Args:
        ranker: The ranker to ask. It must have a `fingerprint`; with a `stream` too, each answer is stored the moment
            it arrives.
        path: The database; made where it is missing.
        also_read: Databases to look into as well, such as those of the other processes of a run. Nothing is added to
            them, and files that do not exist are passed over.

    Raises:
        RankerError: If a file is no database of this class, or is damaged.
        ValueError: If the ranker has no fingerprint.
    """

    def __init__(
        self, ranker: Ranker, path: str | PathLike[str], also_read: Sequence[str | PathLike[str]] = ()
    ) -> None:
        self._ranker = ranker
        if not self.fingerprint:
            raise ValueError(
                f"A {type(ranker).__name__} has no `fingerprint`, so nothing tells when its stored answers are stale: "
                "use it without a cache, or give it one."
            )
        self._store = AnswerStore(path, also_read)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._ranker!r}, {str(self._store.path)!r})"

    @property
    def name(self) -> str:
        """That of the ranker."""
        return ranker_name(self._ranker)

    @property
    def fingerprint(self) -> str | None:
        """That of the ranker."""
        return getattr(self._ranker, "fingerprint", None)

    @property
    def num_passes(self) -> int:
        """That of the ranker, 1 where it has none."""
        return getattr(self._ranker, "num_passes", 1)

    @property
    def budget(self) -> Budget | None:
        """That of the ranker."""
        return getattr(self._ranker, "budget", None)

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Ranks each request; see `Ranker.rank`. Raises what the ranker raises, and `RankerError` as on opening."""
        answers = dict(self.stream(requests))
        return [answers[position] for position in range(len(requests))]

    def stream(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        """Yields (position of the request, its answer): first what is stored, then the rest as it arrives."""
        return stream_in_passes(self._stream, requests, self.num_passes)

    def _stream(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        positions: dict[str, list[int]] = {}
        for position, request in enumerate(requests):
            positions.setdefault(_key(self.fingerprint, request), []).append(position)
        missing = []
        for key, same in positions.items():
            stored = self._look_up(key, requests[same[0]])
            if stored is None:
                missing.append(key)
                continue
            for position in same:
                yield position, stored
        for index, outcome in self._ask([requests[positions[key][0]] for key in missing]):
            key = missing[index]
            if isinstance(outcome, RankingResult):
                self._store.put(key, _encode(outcome))
            first, *repeats = positions[key]
            yield first, outcome
            for position in repeats:
                yield position, _free(outcome)

    def estimate(self, request: RankingRequest) -> Usage | None:
        """What the ranker would take for the request, stored or not; `None` where it does not say."""
        return estimate(self._ranker, request)

    def cancel(self) -> None:
        """Cancels what the ranker is asked at the moment, if it can."""
        cancel(self._ranker)

    def close(self) -> None:
        """Closes the databases. The ranker belongs to whoever made it, and stays open."""
        self._store.close()

    def _ask(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        if not requests:
            return iter(())
        if isinstance(self._ranker, StreamingRanker):
            return self._ranker.stream(requests)
        return iter(enumerate(self._ranker.rank(requests)))

    def _look_up(self, key: str, request: RankingRequest) -> RankingResult | None:
        fitting = (_decode(value, request) for value in self._store.find(key))
        return next((stored for stored in fitting if stored is not None), None)


def _key(fingerprint: str | None, request: RankingRequest) -> str:
    content = {
        "fingerprint": fingerprint,
        "prompt": request.prompt,
        "completions": request.completions,
        "demonstrations": [asdict(demonstration) for demonstration in request.demonstrations],
        "metadata": dict(request.metadata),
        "num_static": request.num_static,
        "pass": request.pass_index or 0,
    }
    return digest(content).hex()


def _encode(result: RankingResult) -> str:
    return json.dumps(asdict(result))


def _decode(value: str, request: RankingRequest) -> RankingResult | None:
    """The stored ranking; `None` where it is no ranking of this request's completions."""
    try:
        fields: dict[str, Any] = json.loads(value)
        ranks, improved, usage = fields["ranks"], fields["improved_completion"], fields["usage"]
        consistency, trimmed = fields.get("consistency"), fields.get("trimmed")
        result = RankingResult(
            order=tuple(fields["order"]),
            ranks=None if ranks is None else tuple(ranks),
            improved_completion=None if improved is None else str(improved),
            usage=None if usage is None else Usage(**usage),
            consistency=None if consistency is None else float(consistency),
            trimmed=None if trimmed is None else Trimmed(**trimmed),
        )
    except (ValueError, TypeError, KeyError):
        return None
    indices = (*result.order, *(result.ranks or ()))
    fits = len(result.order) == len(request.completions) and all(isinstance(index, int) for index in indices)
    return _cached(result) if fits else None


def _cached(result: RankingResult) -> RankingResult:
    return replace(result, usage=replace(result.usage or Usage(attempts=0), cached=True))


def _free(outcome: Outcome) -> Outcome:
    """The outcome of a request that was not sent because its equal was: its expense is counted there."""
    return _cached(outcome) if isinstance(outcome, RankingResult) else replace(outcome, usage=None)
