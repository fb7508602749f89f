"""Answers of the ranker that are still on their way."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ..errors import RankerError
from ..rankers.base import CANCELLED, Outcome, Ranker, StreamingRanker, cancel
from ..types import RankingFailure, RankingRequest


class PendingRanking:
    """The ranker's answers to some requests, taken in by a thread of its own, which keeps no program from ending.

    Args:
        ranker: The ranker.
        requests: What it is asked.
    """

    def __init__(self, ranker: Ranker, requests: Sequence[RankingRequest]) -> None:
        self._ranker = ranker
        self._requests = requests
        self._answers: dict[int, Outcome] = {}
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._work, name="cyclealign-ranking", daemon=True).start()

    def outcomes(self, deadline: float) -> list[Outcome]:
        """Waits for the answers, in the order of the requests; raises what the ranker raised.

        Args:
            deadline: When to stop waiting, as `time.monotonic` has it. What has not arrived by then is cancelled where
                the ranker can, and a `RankingFailure("deadline")`.
        """
        if not self._done.wait(max(0.0, deadline - time.monotonic())):
            cancel(self._ranker)
        if self._error is not None:
            raise self._error
        answers = dict(self._answers)
        late = RankingFailure("deadline", "It had not arrived when the step stopped waiting (`ranking_timeout`).")
        outcomes = [answers.get(position, late) for position in range(len(self._requests))]
        # Only a step that stops waiting cancels, and it cancels all of its parts at once.
        return [
            late if isinstance(outcome, RankingFailure) and outcome.reason == CANCELLED else outcome
            for outcome in outcomes
        ]

    def _work(self) -> None:
        try:
            if self._requests:
                self._ask()
        except BaseException as error:  # handed to whoever waits
            self._error = error
        finally:
            self._done.set()

    def _ask(self) -> None:
        if isinstance(self._ranker, StreamingRanker):
            for position, answer in self._ranker.stream(self._requests):
                self._answers[position] = answer
            num_answers = len(self._answers)
        else:
            answers = self._ranker.rank(self._requests)
            self._answers.update(enumerate(answers))
            num_answers = len(answers)
        if num_answers != len(self._requests):
            raise RankerError(
                f"{type(self._ranker).__name__} was given {len(self._requests)} requests and answered {num_answers}."
            )
