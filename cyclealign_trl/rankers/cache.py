"""Ranker that stores the rankings of another ranker in SQLite, so that none is paid for twice."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..chat.budget import Budget
from ..chat.joint_budget import JointBudget
from ..chat.store import AnswerStore, digest, make_folder
from ..types import RankingRequest, RankingResult, Trimmed, Usage
from .base import Outcome, Ranker, cancel, estimate, in_request_order, ranker_name, stream_outcomes
from .jury import JuryRanker
from .passes import stream_in_passes


class CachedRanker:
    """Cache the rankings of another ranker in a database.

    Of a `JuryRanker`, the rankings of each member that has a fingerprint are stored, instead of the merged ones.

    Rankings are stored, failures are not. The key consists of the ranker's fingerprint and the request: prompt,
    completions, demonstrations and metadata. A stored ranking is returned with `usage.cached` set. Equal requests in
    one call are sent once. `rank` is thread-safe.

    Args:
        ranker: Ranker to cache. It, or a member of a jury, must have a `fingerprint`. If it also has a `stream`
            method, each ranking is stored as soon as it arrives.
        path: Path of the database, created if missing.
        also_read: Further databases to read from, such as those of other processes. They are not written to. Missing
            files are ignored.

    Raises:
        RankerError: If a file was not written by this class, or is damaged.
        ValueError: If the ranker has no fingerprint.
    """

    def __init__(
        self, ranker: Ranker, path: str | PathLike[str], also_read: Sequence[str | PathLike[str]] = ()
    ) -> None:
        self._ranker = ranker
        if not is_cacheable(ranker):
            raise ValueError(
                f"{type(ranker).__name__} has no `fingerprint`, so its stored rankings could not be recognised as "
                "outdated. Use it without a cache, or add a `fingerprint`."
            )
        self._store = AnswerStore(path, also_read)
        if isinstance(ranker, JuryRanker):
            self._ranker = self._cache_members(ranker)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._ranker!r}, {str(self._store.path)!r})"

    @property
    def name(self) -> str:
        """Name of the cached ranker."""
        return ranker_name(self._ranker)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the cached ranker."""
        return getattr(self._ranker, "fingerprint", None)

    @property
    def num_passes(self) -> int:
        """Number of passes of the cached ranker, 1 if it does not make several."""
        return getattr(self._ranker, "num_passes", 1)

    @property
    def shuffle(self) -> bool:
        """Whether the cached ranker shows completions in an order of its own."""
        return getattr(self._ranker, "shuffle", False)

    @property
    def budget(self) -> Budget | JointBudget | None:
        """Budget of the cached ranker, if it has one."""
        return getattr(self._ranker, "budget", None)

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Rank the completions of each request. See `Ranker.rank`.

        Raises:
            RankerError: If the database is damaged, or if the cached ranker raises it.
        """
        return in_request_order(self.stream(requests))

    def stream(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        """Yield (index of the request, outcome): stored rankings first, then new ones in order of arrival."""
        if isinstance(self._ranker, JuryRanker):
            return self._ranker.stream(requests)
        return stream_in_passes(self._stream_single_passes, requests, self.num_passes)

    def estimate(self, request: RankingRequest) -> Usage | None:
        """Return the expected usage without the cache, or `None` if the ranker has no estimate."""
        return estimate(self._ranker, request)

    def cancel(self) -> None:
        """Cancel the open calls of the ranker, if it supports cancelling."""
        cancel(self._ranker)

    def close(self) -> None:
        """Close the databases. The cached ranker stays open."""
        self._store.close()

    def _cache_members(self, jury: JuryRanker) -> JuryRanker:
        """Return the jury with members that are cached in this store, except those that cannot be or are already.

        Two stores of one file would take each other for another process.
        """
        members: list[Ranker] = []
        for member in jury.members:
            if isinstance(member, CachedRanker) or not is_cacheable(member):
                members.append(member)
            elif isinstance(member, JuryRanker):
                members.append(self._cache_members(member))
            else:
                cached = copy.copy(self)
                cached._ranker = member
                members.append(cached)
        return jury.with_members(members)

    def _stream_single_passes(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        indices_by_key: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            indices_by_key.setdefault(_key(self.fingerprint, request), []).append(index)
        missing_keys = []
        for key, indices in indices_by_key.items():
            stored = self._look_up(key, requests[indices[0]])
            if stored is None:
                missing_keys.append(key)
                continue
            for index in indices:
                yield index, stored
        missing = [requests[indices_by_key[key][0]] for key in missing_keys]
        for missing_index, outcome in stream_outcomes(self._ranker, missing):
            key = missing_keys[missing_index]
            if isinstance(outcome, RankingResult):
                self._store.put(key, _encode(outcome))
            first, *repeats = indices_by_key[key]
            yield first, outcome
            for index in repeats:
                yield index, _without_expense(outcome)

    def _look_up(self, key: str, request: RankingRequest) -> RankingResult | None:
        rankings = (_decode(value, request) for value in self._store.find(key))
        return next((ranking for ranking in rankings if ranking is not None), None)


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
    """Return the stored ranking, or `None` if it is not a valid ranking of the request's completions."""
    try:
        fields: dict[str, Any] = json.loads(value)
        ranks, improved, usage = fields["ranks"], fields["improved_completion"], fields["usage"]
        consistency, trimmed, reasoning = (fields.get(name) for name in ("consistency", "trimmed", "reasoning"))
        result = RankingResult(
            order=tuple(fields["order"]),
            ranks=None if ranks is None else tuple(ranks),
            improved_completion=None if improved is None else str(improved),
            usage=None if usage is None else Usage(**usage),
            consistency=None if consistency is None else float(consistency),
            trimmed=None if trimmed is None else Trimmed(**trimmed),
            reasoning=None if reasoning is None else str(reasoning),
        )
    except (ValueError, TypeError, KeyError):
        return None
    indices = (*result.order, *(result.ranks or ()))
    valid = len(result.order) == len(request.completions) and all(isinstance(index, int) for index in indices)
    return _mark_as_cached(result) if valid else None


def _mark_as_cached(result: RankingResult) -> RankingResult:
    return replace(result, usage=replace(result.usage or Usage(attempts=0), cached=True))


def _without_expense(outcome: Outcome) -> Outcome:
    """Return the outcome for a repeated request that was not sent. The first request accounts for the usage."""
    return _mark_as_cached(outcome) if isinstance(outcome, RankingResult) else replace(outcome, usage=None)


def is_cacheable(ranker: Ranker) -> bool:
    """Return whether a ranker, or a member of a jury, has a fingerprint."""
    if isinstance(ranker, JuryRanker):
        return any(map(is_cacheable, ranker.members))
    return bool(getattr(ranker, "fingerprint", None))


def with_cache(ranker: Ranker, folder: Path, process_index: int) -> Ranker:
    """Return a ranker that keeps its answers in `folder/rankings-R.sqlite`, R being the index of the process.

    It also reads the databases of other processes and of earlier runs in the folder. Rankers that cannot be cached,
    or are cached already, are returned unchanged.
    """
    if isinstance(ranker, CachedRanker) or not is_cacheable(ranker):
        return ranker
    own = folder / f"rankings-{process_index}.sqlite"
    make_folder(folder)
    return CachedRanker(ranker, own, also_read=sorted(set(folder.glob("rankings-*.sqlite")) - {own}))
