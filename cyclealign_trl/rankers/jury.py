"""Ranker that merges the rankings of several rankers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import combinations
from typing import Any

from .._warnings import OnceLogger
from ..chat.budget import BUDGET_EXHAUSTED, Budget
from ..chat.joint_budget import JointBudget
from ..types import RankingFailure, RankingRequest, RankingResult, Trimmed, Usage
from .base import (
    CANCELLED,
    Outcome,
    Ranker,
    cancel,
    check_ranker,
    estimate,
    in_request_order,
    order_from_ranks,
    ranker_name,
    set_default_tokenizer,
)
from .merging import borda_ranks, mean_tau, total_usage
from .side_by_side import stream_side_by_side

logger = logging.getLogger(__name__)


class JuryRanker:
    """Rank completions by the votes of several rankers: a panel, against the bias of a single judge.

    All members rank at the same time, each in its own thread. Their rankings are merged by Borda count: completions
    are ordered by the weighted sum of their positions. Tied completions share the mean of their positions, and
    completions with equal sums are ties.

    A member that fails to rank a request is left out, as long as `min_members` others have ranked it, and a warning is
    logged once per member and reason. Otherwise the ranking fails, with the reason of the first member that failed.
    The reason is `"budget_exhausted"` if too few members have a budget left.

    - `RankingResult.consistency` is the mean of Kendall's tau-b over all pairs of members. A pair with a member that
      failed counts as 0, so that with `weight_by_consistency` a ranking by fewer members weighs less.
    - `RankingResult.improved_completion` is that of the first member that has written one.
    - `RankingResult.usage` is the sum over the members, those that failed included.

    Each member keeps its own budget, limits and passes. `CachedRanker` and the trainer's `cache_rankings` store the
    rankings of each member that has a fingerprint, so that a repeated request asks only the members that failed, and a
    changed panel only the new ones.

    Args:
        members: At least two rankers. Improved completions are taken from the first one that has written one.
        weights: One positive weight per member. `None` weights all members with 1.
        min_members: Number of members that must have ranked a request.

    Raises:
        TypeError: If a member is not a ranker.
        ValueError: If there are fewer than two members, a member is there twice, or an argument is out of range.
    """

    def __init__(
        self, members: Sequence[Ranker], weights: Sequence[float] | None = None, *, min_members: int = 1
    ) -> None:
        self._members = tuple(members)
        for member in self._members:
            check_ranker(member)
        number = len(self._members)
        if number < 2:
            raise ValueError(f"JuryRanker needs at least 2 members, got {number}.")
        self._weights = (1.0,) * number if weights is None else tuple(map(float, weights))
        if len(self._weights) != number:
            raise ValueError(
                f"JuryRanker needs one weight per member, got {len(self._weights)} weights for {number} members."
            )
        if not all(0 < weight < math.inf for weight in self._weights):
            raise ValueError(f"Weights must be positive and finite, got {list(self._weights)}. Leave out a member.")
        self._min_members = min_members
        if not 1 <= min_members <= number:
            raise ValueError(f"`min_members` must be from 1 to {number}, the number of members, got {min_members}.")
        for first, second in combinations(range(number), 2):
            if _are_equal(self._members[first], self._members[second]):
                raise ValueError(
                    f"Members {first} and {second} are the same ranker ({ranker_name(self._members[first])}), which "
                    "answers the same twice. Give it a weight of 2 instead, or another `seed`."
                )
        self._once = OnceLogger(logger)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._members)!r})"

    @property
    def members(self) -> tuple[Ranker, ...]:
        """The rankers of the panel."""
        return self._members

    @property
    def name(self) -> str:
        """Names of the members."""
        from ..training.model_card import public_name  # imports huggingface_hub

        *names, last = (public_name(ranker_name(member)) for member in self._members)
        return f"jury of {', '.join(names)} and {last}"

    @property
    def fingerprint(self) -> str | None:
        """JSON object with the fingerprints of all members and how they are merged. `None` if a member has none."""
        fingerprints = [getattr(member, "fingerprint", None) for member in self._members]
        if None in fingerprints:
            return None
        return json.dumps({"jury": fingerprints, "weights": self._weights, "min_members": self._min_members})

    @property
    def budget(self) -> JointBudget | None:
        """Budgets of the members, each with its own caps. `None` if no member has one."""
        budgets: dict[int, tuple[str, Budget | JointBudget]] = {}  # a budget that two members share counts once
        for member in self._members:
            if (budget := getattr(member, "budget", None)) is not None:
                budgets.setdefault(id(budget), (ranker_name(member), budget))
        return JointBudget(budgets.values()) if budgets else None

    @property
    def shuffle(self) -> bool:
        """Whether a member shows the completions in an order of its own."""
        return any(getattr(member, "shuffle", False) for member in self._members)

    @property
    def reasoning_tokens(self) -> int | None:
        """Reasoning tokens of all members that count them. `None` if none does."""
        counts = [getattr(member, "reasoning_tokens", None) for member in self._members]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None

    def with_members(self, members: Sequence[Ranker]) -> JuryRanker:
        """Return a jury with other members and the same settings, for example with each member wrapped."""
        return type(self)(members, self._weights, min_members=self._min_members)

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Rank the completions of each request. See `Ranker.rank`.

        Raises:
            RankerError: If a member raises it: it will answer no further request, so the panel would not be the one
                that was asked for.
            ValueError: If a member ranks another number of completions than a request has.
        """
        return in_request_order(self.stream(requests))

    def stream(self, requests: Sequence[RankingRequest]) -> Iterator[tuple[int, Outcome]]:
        """Yield (index of the request, merged outcome) for each request as soon as its last member has answered.

        If a member raises an error, the error is raised after the other members have finished, so that their answers
        are stored. Closing the iterator early stops each member after its next answer.
        """
        with closing(stream_side_by_side(self._members, requests)) as answers:
            for index, outcomes in answers:
                yield index, self._merge(outcomes, len(requests[index].completions))

    def estimate(self, request: RankingRequest) -> Usage | None:
        """Return the expected usage of all members that have an estimate, or `None` if none has one.

        The cost is `None` if that of a member is unknown.
        """
        estimates = [usage for member in self._members if (usage := estimate(member, request)) is not None]
        if not estimates:
            return None
        return _with_known_cost(sum(estimates[1:], start=estimates[0]), estimates)

    def cancel(self) -> None:
        """Cancel the open calls of all members that support cancelling."""
        for member in self._members:
            cancel(member)

    def set_default_tokenizer(self, tokenizer: Any) -> None:
        """Set the tokenizer of members that need one and have none."""
        for member in self._members:
            set_default_tokenizer(member, tokenizer)

    def _merge(self, outcomes: Sequence[Outcome], num_completions: int) -> Outcome:
        """Merge the outcomes of all members for one request."""
        self._check_sizes(outcomes, num_completions)
        ranked = {number: outcome for number, outcome in enumerate(outcomes) if isinstance(outcome, RankingResult)}
        failures = {number: outcome for number, outcome in enumerate(outcomes) if isinstance(outcome, RankingFailure)}
        usage = total_usage(outcomes)
        if usage is not None:
            usage = _with_known_cost(usage, [outcome.usage for outcome in outcomes if outcome.usage is not None])
        if len(ranked) < self._min_members:
            return self._failure(failures, usage)
        self._warn_about(failures)
        rankings = [result.resolved_ranks for result in ranked.values()]
        ranks = borda_ranks(rankings, [self._weights[number] for number in ranked])
        improved = (result.improved_completion for result in ranked.values())
        return RankingResult(
            order=order_from_ranks(ranks),
            ranks=ranks,
            improved_completion=next((text for text in improved if text is not None), None),
            usage=usage,
            consistency=self._consistency(rankings),
            trimmed=_most_trimmed([result.trimmed for result in ranked.values() if result.trimmed is not None]),
        )

    def _failure(self, failures: dict[int, RankingFailure], usage: Usage | None) -> RankingFailure:
        """Return the failure of the panel."""
        broke = [number for number, failure in failures.items() if failure.reason == BUDGET_EXHAUSTED]
        out_of_budget = len(self._members) - len(broke) < self._min_members
        # Of members that fail for a moment and others whose budget is used up, only the latter fail for good.
        first = next(
            number for number, failure in failures.items() if (failure.reason == BUDGET_EXHAUSTED) == out_of_budget
        )
        detail = (
            f"{len(failures)} of {len(self._members)} members failed, and {self._min_members} must rank. "
            f"{ranker_name(self._members[first])}: {failures[first].detail}"
        )
        return RankingFailure(failures[first].reason, detail, usage)

    def _consistency(self, rankings: Sequence[Sequence[int]]) -> float | None:
        """Return the mean of tau over the pairs of members, 0 for pairs with a member that failed."""
        if len(rankings) < 2:
            return 0.0
        tau = mean_tau(rankings)
        return None if tau is None else tau * math.comb(len(rankings), 2) / math.comb(len(self._members), 2)

    def _check_sizes(self, outcomes: Sequence[Outcome], num_completions: int) -> None:
        for member, outcome in zip(self._members, outcomes, strict=True):
            if isinstance(outcome, RankingResult) and len(outcome.order) != num_completions:
                raise ValueError(
                    f"{ranker_name(member)} was shown {num_completions} completions and ranked {len(outcome.order)}."
                )

    def _warn_about(self, failures: dict[int, RankingFailure]) -> None:
        for number, failure in failures.items():
            if failure.reason == CANCELLED:
                continue
            self._once.warning(
                f"{number} {failure.reason}",
                "%s has not ranked a request (%s: %r). The jury goes on without its vote, as long as %d of %d members "
                "rank (`min_members`).%s",
                ranker_name(self._members[number]),
                failure.reason,
                failure.detail,
                self._min_members,
                len(self._members),
                " Raise its cap and resume to ask it again." if failure.reason == BUDGET_EXHAUSTED else "",
            )


def _are_equal(first: Ranker, second: Ranker) -> bool:
    fingerprint = getattr(first, "fingerprint", None)
    return first is second or (fingerprint is not None and fingerprint == getattr(second, "fingerprint", None))


def _with_known_cost(total: Usage, parts: Sequence[Usage]) -> Usage:
    """Return the sum of usages with an unknown cost if the cost of one that took tokens is unknown."""
    counted = [usage for usage in parts if usage.cached == total.cached and usage.prompt_tokens]
    return replace(total, cost=None) if any(usage.cost is None for usage in counted) else total


def _most_trimmed(trimmed: Sequence[Trimmed]) -> Trimmed | None:
    """Return the most that a member did not see."""
    if not trimmed:
        return None
    return Trimmed(max(part.demonstrations for part in trimmed), max(part.completions for part in trimmed))
