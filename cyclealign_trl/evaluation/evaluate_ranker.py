"""How good a ranker is, before a run pays for it: it ranks completions whose order is known."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from os import PathLike
from typing import Any, NamedTuple

from tqdm import tqdm  # type: ignore[import-untyped]

from ..rankers.base import Outcome, Ranker, ranker_name
from ..rankers.cache import CachedRanker
from ..types import Demonstration, RankingRequest, prompt_key
from .references import ReferenceRanking, read_references
from .report import JudgedRanking, JudgeReport


class _Task(NamedTuple):
    """One ranking to be asked for; see `JudgedRanking`."""

    reference: int
    num_demonstrations: int
    reverse: bool
    shown: tuple[int, ...]


class _Stopwatch:
    """A ranker that notes how long the other one takes: what stands around it, such as a cache, is not counted."""

    def __init__(self, ranker: Ranker) -> None:
        self._ranker = ranker
        self.fingerprint = getattr(ranker, "fingerprint", None)
        self.num_passes: int = getattr(ranker, "num_passes", 1)
        self._last = threading.local()

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        started = time.perf_counter()
        outcomes = self._ranker.rank(requests)
        self._last.seconds = time.perf_counter() - started
        return outcomes

    def take(self) -> float | None:
        """Seconds of the last call in this thread, once; `None` if there was none."""
        seconds: float | None = self._last.__dict__.pop("seconds", None)
        return seconds


def evaluate_ranker(
    ranker: Ranker,
    dataset: Iterable[Mapping[str, Any]],
    *,
    cache_path: str | PathLike[str] | None = None,
    max_demonstrations: int = 0,
    reverse: bool = True,
    max_samples: int | None = None,
    max_concurrency: int = 32,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> JudgeReport:
    """Measures a ranker on data with reference orders.

    The completions of each row are shown in random order, which is what position bias is read from: an `LLMRanker`
    must not shuffle again (`shuffle=False`), or the figures are those of the ranker with its shuffling. Demonstrations
    are rows that are held out: they and all rows of the same prompt are not ranked. Every number of them, from 0 up,
    ranks the same rows in the same shown order.

    Args:
        ranker: What to measure.
        dataset: Rows with a reference order, in any layout of `read_references`.
        cache_path: The database of a `CachedRanker`, which keeps the answers: a run that is interrupted, repeated or
            extended pays for none of them twice. The ranker must have a `fingerprint`.
        max_demonstrations: Figures are given for 0, 1, ... up to this many demonstrations.
        reverse: Whether to rank each row a second time, its completions shown in reverse order. It doubles the price,
            and shows position bias beyond doubt.
        max_samples: How many rows to rank, drawn at random. `None` means all.
        max_concurrency: Rankings asked for at once, each from a thread of its own.
        confidence_level: Coverage of the intervals; a position bias is one whose p-value is below the rest.
        seed: Seed of shown orders, samples, demonstrations and intervals. Shown orders depend on it and on the row
            alone.

    Raises:
        RankerError: If the ranker cannot answer at all.
        ValueError: If an argument is out of its range, a row cannot be read, or there are too few rows.
    """
    for name, value, least in (
        ("max_demonstrations", max_demonstrations, 0),
        ("max_samples", max_samples, 1),
        ("max_concurrency", max_concurrency, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must lie between 0 and 1, got {confidence_level}.")
    references, dropped = read_references(dataset)
    ranked, demonstrations = _divide(references, max_demonstrations, max_samples, seed)
    tasks = []
    for number in range(max_demonstrations + 1):
        for index, reference in enumerate(ranked):
            shown = _shown_order(reference, seed)
            tasks.append(_Task(index, number, False, shown))
            if reverse:
                tasks.append(_Task(index, number, True, shown[::-1]))

    timed = _Stopwatch(ranker)
    asked: Ranker = timed if cache_path is None else CachedRanker(timed, cache_path)

    def ask(task: _Task) -> JudgedRanking:
        reference = ranked[task.reference]
        completions = tuple(reference.completions[index] for index in task.shown)
        number = task.num_demonstrations
        request = RankingRequest(
            reference.prompt, completions, demonstrations[:number], reference.metadata, num_static=number
        )
        (outcome,) = asked.rank([request])
        return JudgedRanking(*task, outcome, timed.take())

    try:
        rankings = _answers(ask, tasks, max_concurrency)
    finally:
        if isinstance(asked, CachedRanker):
            asked.close()
    return JudgeReport(
        ranker=ranker_name(ranker),
        references=tuple(ranked),
        demonstrations=demonstrations,
        dropped=dict(sorted(dropped.items())),
        rankings=tuple(rankings),
        confidence_level=confidence_level,
        seed=seed,
    )


def _divide(
    references: Sequence[ReferenceRanking], max_demonstrations: int, max_samples: int | None, seed: int
) -> tuple[list[ReferenceRanking], tuple[Demonstration, ...]]:
    """The rows to rank, and the demonstrations. Those are drawn from the other end: more of the one or of the other
    leave the rest as it was, and the answers to it in the cache.
    """
    drawn = list(references)
    random.Random(seed).shuffle(drawn)  # noqa: S311 (no secret is made here)
    held_out: dict[str, ReferenceRanking] = {}
    while drawn and len(held_out) < max_demonstrations:
        reference = drawn.pop()
        held_out.setdefault(prompt_key(reference.prompt), reference)
    ranked = [reference for reference in drawn if prompt_key(reference.prompt) not in held_out][:max_samples]
    if not ranked:
        raise ValueError(
            f"Of {len(references)} rows with a reference order, {len(held_out)} are held out as demonstrations, and "
            "none is left to rank."
        )
    return ranked, tuple(_demonstration(reference, seed) for reference in held_out.values())


def _demonstration(reference: ReferenceRanking, seed: int) -> Demonstration:
    """The row as a demonstration. Of completions that the reference ties, the first shown stands for all."""
    by_rank: dict[int, int] = {}
    for index in _shown_order(reference, seed):
        by_rank.setdefault(reference.ranks[index], index)
    shown = list(by_rank.values())
    return Demonstration(
        reference.prompt,
        tuple(reference.completions[index] for index in shown),
        tuple(shown.index(by_rank[rank]) for rank in sorted(by_rank)),
    )


def _shown_order(reference: ReferenceRanking, seed: int) -> tuple[int, ...]:
    order = list(range(len(reference.completions)))
    key = f"{seed}\n{prompt_key(reference.prompt)}\n{reference.completions!r}"
    random.Random(key.encode(errors="backslashreplace")).shuffle(order)  # noqa: S311
    return tuple(order)


def _answers(
    ask: Callable[[_Task], JudgedRanking], tasks: Sequence[_Task], max_concurrency: int
) -> list[JudgedRanking]:
    """The answers in the order of the tasks, asked for in several threads, with a progress bar."""
    with ThreadPoolExecutor(max_concurrency, thread_name_prefix="cyclealign-judge") as threads:
        futures = [threads.submit(ask, task) for task in tasks]
        try:
            for future in tqdm(as_completed(futures), total=len(tasks), desc="Rankings", disable=None):
                future.result()
        finally:
            threads.shutdown(cancel_futures=True)  # after an error, what is not asked yet is not asked any more
    return [future.result() for future in futures]
