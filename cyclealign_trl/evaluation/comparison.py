"""Compare two replies to each of many prompts with a judge, in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..rankers.base import Outcome, Ranker, estimate, stream_outcomes
from ..rankers.cache import CachedRanker
from ..types import RankingFailure, RankingRequest, RankingResult, Usage
from .prompts import EvaluationPrompt
from .win_rates import Verdict

_OPPOSITE: dict[Verdict, Verdict] = {"win": "lose", "tie": "tie", "lose": "win"}


@dataclass(frozen=True, slots=True)
class ReplyPair:
    """A prompt with the replies of two models, A and B."""

    prompt: EvaluationPrompt
    reply_a: str
    reply_b: str

    @property
    def equal(self) -> bool:
        """Whether both replies are the same, which is a tie without asking the judge."""
        return self.reply_a == self.reply_b

    def requests(self) -> tuple[RankingRequest, RankingRequest]:
        """Return a request that shows the reply of A first, and one that shows that of B first."""
        prompt, completions = self.prompt.prompt, (self.reply_a, self.reply_b)
        return RankingRequest(prompt, completions), RankingRequest(prompt, completions[::-1])


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a judge says of a pair of replies, in both orders.

    Args:
        pair: The pair.
        outcomes: The judge's outcomes with the reply of A shown first, and with that of B shown first. `None` if both
            replies are equal.
    """

    pair: ReplyPair
    outcomes: tuple[Outcome, Outcome] | None

    @property
    def verdicts(self) -> tuple[Verdict | None, Verdict | None]:
        """Verdict on the reply of A in each order; `None` where the judge failed."""
        if self.outcomes is None:
            return "tie", "tie"
        shown_first, shown_second = map(_first_verdict, self.outcomes)
        return shown_first, None if shown_second is None else _OPPOSITE[shown_second]

    @property
    def verdict(self) -> Verdict | None:
        """Verdict on the reply of A. It wins if it is better in both orders, or better in one and tied in the other.

        Opposite verdicts make a tie. `None` if the judge failed in one of the orders.
        """
        first, second = self.verdicts
        if first is None or second is None:
            return None
        if first == _OPPOSITE[second]:
            return "tie"
        return second if first == "tie" else first

    @property
    def flips(self) -> bool:
        """Whether the verdicts in both orders are opposite, because the judge prefers a position."""
        first, second = self.verdicts
        return first != "tie" and second is not None and first == _OPPOSITE[second]

    @property
    def failure(self) -> RankingFailure | None:
        """The first failure, if there is one."""
        return next((outcome for outcome in self.outcomes or () if isinstance(outcome, RankingFailure)), None)


def compare_replies(
    judge: Ranker, pairs: Sequence[ReplyPair], cache_path: str | PathLike[str] | None = None
) -> list[Comparison]:
    """Ask a judge which reply of each pair is better, in both orders.

    Args:
        judge: A `PairwiseJudge`, or any ranker.
        pairs: The pairs. Equal replies are ties, and the judge is not asked.
        cache_path: Path of a `CachedRanker` database that stores the verdicts as they arrive, so that none is paid for
            twice. The judge must have a `fingerprint`.

    Returns:
        One comparison per pair. A verdict that failed for good is a `RankingFailure`.

    Raises:
        RankerError: If the judge cannot answer at all.
    """
    requests = [request for pair in pairs if not pair.equal for request in pair.requests()]
    cached = None if cache_path is None else CachedRanker(judge, cache_path)
    outcomes: dict[int, Outcome] = {}
    try:
        with tqdm(total=len(requests), desc="Verdicts", disable=None) as progress:
            for index, outcome in stream_outcomes(cached or judge, requests):
                outcomes[index] = outcome
                progress.update()
    finally:
        if cached is not None:
            cached.close()
    comparisons, position = [], 0
    for pair in pairs:
        if pair.equal:
            comparisons.append(Comparison(pair, None))
        else:
            comparisons.append(Comparison(pair, (outcomes[position], outcomes[position + 1])))
            position += 2
    return comparisons


def estimate_comparison(judge: Ranker, pairs: Sequence[ReplyPair]) -> Usage | None:
    """Estimate what `compare_replies` would use without stored verdicts. `None` if the judge has no estimate."""
    total = Usage(attempts=0)
    for pair in pairs:
        for request in () if pair.equal else pair.requests():
            usage = estimate(judge, request)
            if usage is None:
                return None
            total += usage
    return total


def _first_verdict(outcome: Outcome) -> Verdict | None:
    """Return the verdict on the reply that the request shows first."""
    if not isinstance(outcome, RankingResult):
        return None
    first, second = outcome.resolved_ranks
    return "tie" if first == second else "win" if first < second else "lose"
