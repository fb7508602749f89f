"""Ranker over TRL reward functions. It is the smallest ranker of the package, and the file to copy for a new one."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ..errors import RankerError
from ..types import RankingFailure, RankingRequest, as_completion
from .base import Outcome, rank_by_scores

RewardFunction = Callable[..., Any]
"""Function that takes `prompts`, `completions` and dataset columns by keyword, and returns one score or `None` per
completion."""

# TRL does not pass these dataset columns either: they would collide with its own arguments.
_RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids"}


class FunctionRanker:
    """Rank completions by a weighted sum of reward functions, which are called as in TRL's trainers.

    A call of `rank` calls each function once, with all completions of all requests. For every completion, a function
    receives the prompt and the prompt's other dataset columns (`RankingRequest.metadata`). If the prompt is
    conversational, the completion is `[{"role": "assistant", "content": text}]`. Functions can be async, and the async
    functions of one call run concurrently. A function that returns `None` for a completion does not apply to it. Calls
    of `rank` from several threads run one after another, so functions need not be thread-safe.

    A higher score is better. Completions with equal scores share a rank (0, 1, 1, 2), and `order` lists them by index.
    A request becomes `RankingFailure("no_score")` if no function applies to one of its completions, or if a sum of
    scores is not finite.

    Args:
        funcs: One reward function or several.
        weights: One weight per function. `None` weights all functions with 1.

    Raises:
        ValueError: If there is no function, or if the number of weights differs from the number of functions.
    """

    def __init__(
        self, funcs: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None
    ) -> None:
        self._funcs = (funcs,) if callable(funcs) else tuple(funcs)
        self._weights = (1.0,) * len(self._funcs) if weights is None else tuple(weights)
        if not self._funcs:
            raise ValueError("FunctionRanker needs at least 1 function, got 0.")
        if len(self._weights) != len(self._funcs):
            raise ValueError(
                f"FunctionRanker needs one weight per function, got {len(self._weights)} weights for "
                f"{len(self._funcs)} functions."
            )
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    @property
    def name(self) -> str:
        """Names of the functions, separated by commas."""
        return ", ".join(map(_function_name, self._funcs))

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Rank the completions of each request. See `Ranker.rank`.

        Exceptions of the functions are not caught.

        Raises:
            RankerError: If the number of scores that a function returns differs from the number of completions.
        """
        if not requests:
            return []
        arguments = _reward_arguments(requests)
        with self._lock:
            scores_by_function = self._call_functions(arguments)
        scores_by_completion = zip(*scores_by_function, strict=True)
        return [self._rank_one([next(scores_by_completion) for _ in request.completions]) for request in requests]

    def _call_functions(self, arguments: dict[str, list[Any]]) -> list[list[float | None]]:
        """Return the scores of all completions, one list per function."""
        num_completions = len(arguments["completions"])
        # Synchronous functions first: if one raises, no coroutine is left that was never awaited.
        scores: dict[int, Any] = {
            index: func(**arguments) for index, func in enumerate(self._funcs) if not _is_async(func)
        }
        async_funcs = {index: func for index, func in enumerate(self._funcs) if _is_async(func)}
        if async_funcs:
            results = asyncio.run(_gather([func(**arguments) for func in async_funcs.values()]))
            scores.update(zip(async_funcs, results, strict=True))
        return [_check_scores(func, scores[index], num_completions) for index, func in enumerate(self._funcs)]

    def _rank_one(self, scores: Sequence[Sequence[float | None]]) -> Outcome:
        """Rank the completions of one request, given one row per completion with its scores by all functions."""
        totals = []
        for index, row in enumerate(scores):
            terms = [weight * score for weight, score in zip(self._weights, row, strict=True) if score is not None]
            total = math.fsum(terms) if terms else math.nan
            if not math.isfinite(total):
                return RankingFailure("no_score", f"completion {index} has the scores {list(row)}")
            totals.append(total)
        return rank_by_scores(totals)


def _reward_arguments(requests: Sequence[RankingRequest]) -> dict[str, list[Any]]:
    """Return the keyword arguments of a reward function: lists with one item per completion."""
    columns = sorted({name for request in requests for name in request.metadata} - _RESERVED)
    arguments: dict[str, list[Any]] = {name: [] for name in ("prompts", "completions", *columns)}
    for request in requests:
        for text in request.completions:
            arguments["prompts"].append(request.prompt)
            arguments["completions"].append(as_completion(request.prompt, text))
            for name in columns:
                arguments[name].append(request.metadata.get(name))
    return arguments


def _check_scores(func: RewardFunction, scores: Any, num_completions: int) -> list[float | None]:
    """Return the scores as floats, after a check of their number."""
    checked = [None if score is None else float(score) for score in scores]
    if len(checked) != num_completions:
        raise RankerError(
            f"The reward function {_function_name(func)} returned {len(checked)} scores for {num_completions} "
            "completions. It must return one per completion, or `None` for a completion that it does not apply to."
        )
    return checked


async def _gather(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    return await asyncio.gather(*coroutines)


def _is_async(func: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def _function_name(func: RewardFunction) -> str:
    return getattr(func, "__name__", type(func).__name__)
