"""Evaluate a ranker on completions whose order is known."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from os import PathLike
from typing import Any, NamedTuple

from tqdm import tqdm  # type: ignore[import-untyped]

from ..rankers.base import Ranker, ranker_name
from ..rankers.cache import CachedRanker
from ..types import Demonstration, RankingRequest, prompt_key
from .intervals import check_confidence_level
from .references import ReferenceRanking, read_references
from .report import JudgedRanking, JudgeReport


class _Task(NamedTuple):
    """A ranking to request; the fields are those of `JudgedRanking`."""

    reference: int
    num_demonstrations: int
    reverse: bool
    shown: tuple[int, ...]


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
    """Evaluate a ranker on data with reference orders.

    The completions of each row are shown in random order, from which the position bias is estimated. An `LLMRanker`
    must therefore not shuffle them again (`shuffle=False`). If it does, the figures describe the ranker with its
    shuffling.

    Demonstrations are drawn from the rows and held out: no row with the same prompt is ranked. The same rows are
    ranked in the same shown order for each number of demonstrations, from 0 to `max_demonstrations`.

    Args:
        ranker: Ranker to evaluate.
        dataset: Rows with a reference order, in any format that `read_references` supports.
        cache_path: Path of a `CachedRanker` database that stores the answers, so that an interrupted, repeated or
            extended evaluation does not pay for them twice. The ranker, or a member of a jury, must have a
            `fingerprint`.
        max_demonstrations: Largest number of demonstrations. Figures are computed for 0, 1, ... demonstrations.
        reverse: Whether to rank each row a second time with its completions shown in reverse order. This doubles the
            price, and separates position bias from opinion exactly.
        max_samples: Number of rows to rank, drawn at random. `None` ranks all rows.
        max_concurrency: Maximum number of concurrent rankings, each in its own thread.
        confidence_level: Coverage of the intervals. Position bias counts as found if its p-value is below
            `1 - confidence_level`.
        seed: Seed of shown orders, samples, demonstrations and intervals. The shown order of a row depends only on
            the seed and the row.

    Raises:
        RankerError: If the ranker cannot answer at all.
        ValueError: If an argument is out of range, a row cannot be read, or too few rows remain.
    """
    for name, value, minimum in (
        ("max_demonstrations", max_demonstrations, 0),
        ("max_samples", max_samples, 1),
        ("max_concurrency", max_concurrency, 1),
    ):
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    check_confidence_level(confidence_level)
    references, dropped = read_references(dataset)
    ranked, demonstrations = _hold_out_demonstrations(references, max_demonstrations, max_samples, seed)
    tasks = []
    for num_demonstrations in range(max_demonstrations + 1):
        for index, reference in enumerate(ranked):
            shown = shown_order(reference, seed)
            tasks.append(_Task(index, num_demonstrations, False, shown))
            if reverse:
                tasks.append(_Task(index, num_demonstrations, True, shown[::-1]))

    cached_ranker = None if cache_path is None else CachedRanker(ranker, cache_path)

    def rank(task: _Task) -> JudgedRanking:
        reference = ranked[task.reference]
        request = RankingRequest(
            reference.prompt,
            tuple(reference.completions[index] for index in task.shown),
            demonstrations[: task.num_demonstrations],
            reference.metadata,
            num_static=task.num_demonstrations,
        )
        started = time.perf_counter()
        (outcome,) = (cached_ranker or ranker).rank([request])
        seconds = time.perf_counter() - started
        is_cached = outcome.usage is not None and outcome.usage.cached
        return JudgedRanking(*task, outcome, None if is_cached else seconds)

    try:
        rankings = _run_tasks(rank, tasks, max_concurrency)
    finally:
        if cached_ranker is not None:
            cached_ranker.close()
    return JudgeReport(
        ranker=ranker_name(ranker),
        references=tuple(ranked),
        demonstrations=demonstrations,
        dropped=dict(sorted(dropped.items())),
        rankings=tuple(rankings),
        confidence_level=confidence_level,
        seed=seed,
    )


def _hold_out_demonstrations(
    references: Sequence[ReferenceRanking], max_demonstrations: int, max_samples: int | None, seed: int
) -> tuple[list[ReferenceRanking], tuple[Demonstration, ...]]:
    """Return the rows to rank and the demonstrations.

    Demonstrations are drawn from the end of the shuffled rows and samples from the start. If either number grows, the
    rows drawn before stay the same, and so do their cached answers.
    """
    shuffled = list(references)
    random.Random(seed).shuffle(shuffled)  # noqa: S311 (not used for security)
    held_out: dict[str, ReferenceRanking] = {}
    while shuffled and len(held_out) < max_demonstrations:
        reference = shuffled.pop()
        held_out.setdefault(prompt_key(reference.prompt), reference)
    ranked = [reference for reference in shuffled if prompt_key(reference.prompt) not in held_out][:max_samples]
    if not ranked:
        raise ValueError(
            f"No rows are left to rank: of {len(references)} rows with a reference order, {len(held_out)} are held "
            "out as demonstrations. Use more rows or a lower max_demonstrations."
        )
    return ranked, tuple(_demonstration(reference, seed) for reference in held_out.values())


def _demonstration(reference: ReferenceRanking, seed: int) -> Demonstration:
    """Return the row as a demonstration, with only the first shown of completions that the reference ties."""
    index_by_rank: dict[int, int] = {}
    for index in shown_order(reference, seed):
        index_by_rank.setdefault(reference.ranks[index], index)
    shown = list(index_by_rank.values())
    return Demonstration(
        reference.prompt,
        tuple(reference.completions[index] for index in shown),
        tuple(shown.index(index_by_rank[rank]) for rank in sorted(index_by_rank)),
    )


def shown_order(reference: ReferenceRanking, seed: int) -> tuple[int, ...]:
    """Return the indices of a row's completions in a random order that depends on the seed and the row alone."""
    order = list(range(len(reference.completions)))
    key = f"{seed}\n{prompt_key(reference.prompt)}\n{reference.completions!r}"
    random.Random(key.encode(errors="backslashreplace")).shuffle(order)  # noqa: S311 (not used for security)
    return tuple(order)


def _run_tasks(
    rank: Callable[[_Task], JudgedRanking], tasks: Sequence[_Task], max_concurrency: int
) -> list[JudgedRanking]:
    """Return the rankings in the order of the tasks."""
    with ThreadPoolExecutor(max_concurrency, thread_name_prefix="cyclealign-judge") as executor:
        futures = [executor.submit(rank, task) for task in tasks]
        try:
            for future in tqdm(as_completed(futures), total=len(tasks), desc="Rankings", disable=None):
                future.result()
        finally:
            executor.shutdown(cancel_futures=True)  # after an error, do not pay for the remaining rankings
    return [future.result() for future in futures]
