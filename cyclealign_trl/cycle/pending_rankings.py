"""Rankings that the ranker is still working on."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ..errors import RankerError
from ..rankers.base import CANCELLED, Outcome, Ranker, cancel, stream_outcomes
from ..types import RankingFailure, RankingRequest


class PendingRankings:
    """The ranker's answers to a batch of requests, collected by a thread while the policy goes on.

    The thread is a daemon, so a ranker that hangs does not keep the program from exiting.

    Args:
        ranker: The ranker.
        requests: The requests.
    """

    def __init__(self, ranker: Ranker, requests: Sequence[RankingRequest]) -> None:
        self._ranker = ranker
        self._requests = requests
        self._answers: dict[int, Outcome] = {}
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._collect, name="cyclealign-ranking", daemon=True).start()

    def wait(self, deadline: float) -> list[Outcome]:
        """Wait for the answers and return them in the order of the requests.

        Args:
            deadline: Time on the clock of `time.monotonic` at which to stop waiting. Answers that are missing then are
                cancelled, if the ranker can, and become `RankingFailure("deadline")`.

        Raises:
            Exception: What the ranker raised.
        """
        if not self._done.wait(max(0.0, deadline - time.monotonic())):
            cancel(self._ranker)
        if self._error is not None:
            raise self._error
        answers = dict(self._answers)
        late = RankingFailure("deadline", "It had not arrived when the step stopped waiting (`ranking_timeout`).")
        outcomes = [answers.get(position, late) for position in range(len(self._requests))]
        # Only a step that stops waiting cancels, and it cancels the rankings of all of its micro-batches at once.
        return [
            late if isinstance(outcome, RankingFailure) and outcome.reason == CANCELLED else outcome
            for outcome in outcomes
        ]

    def _collect(self) -> None:
        try:
            for position, answer in stream_outcomes(self._ranker, self._requests):
                self._answers[position] = answer
            self._check_complete()
        except BaseException as error:  # raised again by `wait`
            self._error = error
        finally:
            self._done.set()

    def _check_complete(self) -> None:
        if len(self._answers) != len(self._requests):
            raise RankerError(
                f"{type(self._ranker).__name__} was given {len(self._requests)} requests and returned "
                f"{len(self._answers)} answers. `rank` must return one per request."
            )
