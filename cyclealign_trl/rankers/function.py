"""Ranker over TRL reward functions. It is the smallest ranker of the package, and the file to copy for a new one."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from ..errors import RankerError
from ..types import RankingFailure, RankingRequest, as_completion
from .base import Outcome, is_model, rank_by_scores

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
        tokenizer: Tokenizer for functions with a required argument `completion_ids`, such as TRL's
            `get_soft_overlong_punishment`. They get the token ids of each completion's text, without special tokens.
            `CycleAlignTrainer` sets the policy's tokenizer if there is none.

    Raises:
        TypeError: If a function is not a function, such as the name of a model.
        ValueError: If there is no function, or if the number of weights differs from the number of functions.
    """

    def __init__(
        self,
        funcs: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        tokenizer: Any = None,  # transformers.PreTrainedTokenizerBase
    ) -> None:
        is_sequence = isinstance(funcs, Iterable) and not callable(funcs) and not isinstance(funcs, str)
        self._funcs: tuple[RewardFunction, ...] = tuple(funcs) if is_sequence else (funcs,)  # type: ignore[arg-type,assignment]
        self._weights = (1.0,) * len(self._funcs) if weights is None else tuple(weights)
        for func in self._funcs:
            _check_function(func)
        if not self._funcs:
            raise ValueError("FunctionRanker needs at least 1 function, got 0.")
        if len(self._weights) != len(self._funcs):
            raise ValueError(
                f"FunctionRanker needs one weight per function, got {len(self._weights)} weights for "
                f"{len(self._funcs)} functions."
            )
        self._needs_ids = [func for func in self._funcs if _requires(func, "completion_ids")]
        self._tokenizer = copy.deepcopy(tokenizer)
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
            RankerError: If the number of scores that a function returns differs from the number of completions, or a
                function needs `completion_ids` and there is no tokenizer.
        """
        if not requests:
            return []
        arguments = _reward_arguments(requests)
        with self._lock:
            if self._needs_ids:
                arguments["completion_ids"] = self._completion_ids(requests)
            scores_by_function = self._call_functions(arguments)
        scores_by_completion = zip(*scores_by_function, strict=True)
        return [self._rank_one([next(scores_by_completion) for _ in request.completions]) for request in requests]

    def set_default_tokenizer(self, tokenizer: Any) -> None:
        """Set the tokenizer for `completion_ids`, if the ranker was created without one and a function needs it."""
        if self._needs_ids and self._tokenizer is None:
            self._tokenizer = copy.deepcopy(tokenizer)

    def _completion_ids(self, requests: Sequence[RankingRequest]) -> list[list[int]]:
        if self._tokenizer is None:
            raise RankerError(
                f"The reward function {_function_name(self._needs_ids[0])} needs completion_ids, the token ids of "
                "completions. Pass a tokenizer: FunctionRanker(..., tokenizer=AutoTokenizer.from_pretrained(...))."
            )
        texts = [text for request in requests for text in request.completions]
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

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


def _check_function(func: object) -> None:
    """Raise `TypeError` with a suggestion if an object is not a reward function."""
    if isinstance(func, str):
        fix = f"Pass RewardModelRanker({func!r}) as the ranker for a reward model, or LLMRanker({func!r}) for an LLM."
        raise TypeError(f"FunctionRanker needs functions, got the text {func!r}. {fix}")
    if isinstance(func, type):
        raise TypeError(f"FunctionRanker needs functions, got the class {func.__name__}. Pass an instance of it.")
    if is_model(func):
        fix = "Pass RewardModelRanker(model) as the ranker."
        raise TypeError(f"FunctionRanker needs functions, got the model {type(func).__name__}. {fix}")
    if not callable(func):
        raise TypeError(f"FunctionRanker needs functions, got {type(func).__name__}, which cannot be called.")


def _requires(func: RewardFunction, name: str) -> bool:
    """Return whether a function has a required parameter of this name."""
    try:
        parameter = inspect.signature(func).parameters.get(name)
    except ValueError:  # a builtin without a signature
        return False
    return parameter is not None and parameter.default is parameter.empty


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
