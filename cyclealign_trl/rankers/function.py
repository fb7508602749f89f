"""A ranker made of TRL reward functions: rules, scripts, classifiers, whatever scores a completion."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ..errors import RankerError
from ..types import RankingFailure, RankingRequest, as_completion
from .base import Outcome, outcome_of

RewardFunction = Callable[..., Any]
"""Takes `prompts`, `completions` and the dataset's columns by keyword; returns a score or `None` per completion."""

# Arguments of our own, which a dataset's column of the same name must not shadow; TRL leaves them out, too.
_RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids"}


class FunctionRanker:
    """Ranks completions by the weighted sum of reward functions, as TRL's trainers call them.

    One call of `rank` is one call of each function, over all completions of all requests. Each completion comes with
    its prompt and its prompt's other columns (the requests' `metadata`); of a conversational prompt, it comes as
    `[{"role": "assistant", "content": text}]`. A function may be async: such functions of one call run together. A
    score of `None` means that the function does not apply. Calls of `rank` from several threads take turns, so a
    function need not be thread-safe.

    A higher score is better. Completions of equal score share a rank (0, 1, 1, 2), and `order` lists them by index.
    A request with a completion that no function applies to, or whose sum is not finite, is a
    `RankingFailure("no_score")`.

    Args:
        funcs: One reward function, or several.
        weights: One weight per function. `None` means 1 for each.

    Raises:
        ValueError: If there is no function, or another number of weights.
    """

    def __init__(
        self, funcs: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None
    ) -> None:
        self._funcs = (funcs,) if callable(funcs) else tuple(funcs)
        self._weights = (1.0,) * len(self._funcs) if weights is None else tuple(weights)
        if not self._funcs:
            raise ValueError("A `FunctionRanker` takes at least 1 function; got 0.")
        if len(self._weights) != len(self._funcs):
            raise ValueError(
                f"Each function takes a weight: got {len(self._weights)} for {len(self._funcs)} functions."
            )
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    @property
    def name(self) -> str:
        """The functions' names."""
        return ", ".join(map(_name, self._funcs))

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Ranks each request; see `Ranker.rank`. What a function raises is raised here.

        Raises:
            RankerError: If a function returns another number of scores than there are completions.
        """
        if not requests:
            return []
        arguments = _arguments(requests)
        with self._lock:
            columns = self._scores(arguments)
        rows = iter(zip(*columns, strict=True))
        return [self._outcome([next(rows) for _ in request.completions]) for request in requests]

    def _scores(self, arguments: dict[str, list[Any]]) -> list[list[float | None]]:
        """Per function, the scores of all completions."""
        scores: dict[int, Any] = {
            index: func(**arguments) for index, func in enumerate(self._funcs) if not _is_async(func)
        }
        waiting = [index for index in range(len(self._funcs)) if index not in scores]
        if waiting:
            replies = asyncio.run(_gather([self._funcs[index](**arguments) for index in waiting]))
            scores.update(zip(waiting, replies, strict=True))
        return [self._checked(index, scores[index], len(arguments["completions"])) for index in range(len(scores))]

    def _checked(self, index: int, scores: Any, expected: int) -> list[float | None]:
        checked = [None if score is None else float(score) for score in scores]
        if len(checked) != expected:
            raise RankerError(
                f"The reward function {_name(self._funcs[index])} returned {len(checked)} scores for {expected} "
                "completions. It must return one per completion (or `None` where it does not apply)."
            )
        return checked

    def _outcome(self, rows: Sequence[Sequence[float | None]]) -> Outcome:
        """The ranking of one request's completions, from each one's scores by all functions."""
        totals = []
        for index, row in enumerate(rows):
            terms = [weight * score for weight, score in zip(self._weights, row, strict=True) if score is not None]
            total = math.fsum(terms) if terms else math.nan
            if not math.isfinite(total):
                return RankingFailure("no_score", f"completion {index} has the scores {list(row)}")
            totals.append(total)
        return outcome_of(totals)


def _arguments(requests: Sequence[RankingRequest]) -> dict[str, list[Any]]:
    """The keyword arguments of a reward function: flat lists, one item per completion."""
    names = sorted({name for request in requests for name in request.metadata} - _RESERVED)
    arguments: dict[str, list[Any]] = {name: [] for name in ("prompts", "completions", *names)}
    for request in requests:
        for text in request.completions:
            arguments["prompts"].append(request.prompt)
            arguments["completions"].append(as_completion(request.prompt, text))
            for name in names:
                arguments[name].append(request.metadata.get(name))
    return arguments


async def _gather(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    return await asyncio.gather(*coroutines)


def _is_async(func: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def _name(func: RewardFunction) -> str:
    return getattr(func, "__name__", type(func).__name__)
