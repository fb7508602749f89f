"""Ask several rankers at the same time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

from ..errors import RankerError
from ..types import RankingRequest
from .base import Outcome, Ranker, stream_outcomes


@dataclass(frozen=True, slots=True)
class _Answer:
    ranker: int
    request: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None = None


def stream_side_by_side(
    rankers: Sequence[Ranker], requests: Sequence[RankingRequest]
) -> Generator[tuple[int, list[Outcome]], None, None]:
    """Ask each ranker in a thread of its own, and yield each request as soon as the last ranker has answered it.

    The threads are daemons, so a ranker that hangs does not keep the program from exiting. If a ranker raises an
    error, the error is raised after the others have finished, so that what they answer can be stored. Closing the
    iterator early stops each ranker after its next answer.

    Yields:
        Index of the request, and one outcome per ranker, in the order of the rankers.

    Raises:
        RankerError: If a ranker raises it, or does not answer all requests.
    """
    answers: list[dict[int, Outcome]] = [{} for _ in requests]
    events: queue.SimpleQueue[_Answer | _End] = queue.SimpleQueue()
    closed = threading.Event()
    for number, ranker in enumerate(rankers):
        arguments = (number, ranker, requests, events.put, closed)
        threading.Thread(target=_ask, args=arguments, name="cyclealign-jury", daemon=True).start()
    error: BaseException | None = None
    unfinished = len(rankers)
    try:
        while unfinished:
            event = events.get()
            if isinstance(event, _End):
                unfinished -= 1
                error = error or event.error
                continue
            own = answers[event.request]
            own[event.ranker] = event.outcome
            if error is None and len(own) == len(rankers):
                yield event.request, [own[number] for number in range(len(rankers))]
    finally:
        closed.set()
    if error is not None:
        raise error


def _ask(
    number: int,
    ranker: Ranker,
    requests: Sequence[RankingRequest],
    put: Callable[[_Answer | _End], None],
    closed: threading.Event,
) -> None:
    """Send a ranker's outcomes as they arrive, then its end."""
    answered: set[int] = set()
    try:
        with closing(stream_outcomes(ranker, requests)) as outcomes:
            for index, outcome in outcomes:
                answered.add(index)
                put(_Answer(number, index, outcome))
                if closed.is_set():
                    break
        if len(answered) != len(requests) and not closed.is_set():
            raise RankerError(
                f"{type(ranker).__name__} was given {len(requests)} requests and returned {len(answered)} answers. "
                "`rank` must return one per request."
            )
        put(_End())
    except BaseException as error:  # raised again by `stream_side_by_side`
        put(_End(error))
