"""Data types for rankings: requests, results, failures and demonstrations. This module needs neither torch nor I/O.

Throughout the package, an `order` lists indices of completions, best first. The `rank` of a completion is its position
in the order (0 = best).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Prompt = str | list[dict[str, str]]
"""A TRL prompt: plain text (standard format) or a list of `{"role", "content"}` messages (conversational format)."""

ExportType = Literal["preference", "ranked", "prompt-completion"]
"""Format that the interactions of a run are exported in."""

ABSENT = -1
"""Rank of a completion that is absent: padding of a row, or a completion of a failed ranking."""


def as_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """Return a text as a TRL completion in the format of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def with_completion(prompt: list[dict[str, str]], text: str) -> list[dict[str, str]]:
    """Return the messages of a conversational prompt and a completion of it.

    If the prompt ends in an assistant's message (a prefill), the completion continues this message.
    """
    *turns, last = prompt
    if last["role"] == "assistant":
        return [*turns, {**last, "content": last["content"] + text}]
    return [*prompt, {"role": "assistant", "content": text}]


def valid_text(text: str) -> str:
    """Return a text with lone surrogates replaced, which JSON can spell out but no tokenizer and no file accepts."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def prompt_key(prompt: Prompt) -> str:
    """Return a text that identifies a prompt, for use as a dictionary key."""
    return json.dumps(prompt, sort_keys=True)


def ranks_from_scores(scores: Sequence[float]) -> tuple[int, ...]:
    """Return the rank of each score, 0 = highest. Equal scores share a rank.

    Example:
        >>> ranks_from_scores([0.5, 2.0, 0.5, -1.0])
        (1, 0, 1, 2)
    """
    rank_of = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    return tuple(rank_of[score] for score in scores)


def _check_order(order: tuple[int, ...], num_completions: int, owner: str) -> None:
    if sorted(order) != list(range(num_completions)):
        raise ValueError(
            f"The order of a {owner} must name each of its {num_completions} completions once, as indices from 0 to "
            f"{num_completions - 1}, best first; got {list(order)}."
        )


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A ranked example to show to the ranker in context.

    Args:
        prompt: The prompt of the completions.
        completions: At least two completions, in the order in which they are shown.
        order: Indices into `completions`, best first.

    Raises:
        ValueError: If `order` is not a permutation of the completions, or there are fewer than two completions.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        # JSON and YAML give lists, which cannot be hashed.
        object.__setattr__(self, "completions", tuple(self.completions))
        object.__setattr__(self, "order", tuple(self.order))
        if len(self.completions) < 2:
            raise ValueError(f"A demonstration needs at least 2 completions; got {len(self.completions)}.")
        _check_order(self.order, len(self.completions), "demonstration")


@dataclass(frozen=True, slots=True)
class RankingRequest:
    """A request to rank completions of a prompt.

    Args:
        prompt: The prompt, as text or messages.
        completions: The distinct texts to rank, at least one.
        demonstrations: Ranked examples to show before the query, in this order.
        metadata: The other dataset columns of the prompt.
        num_static: Number of static demonstrations, which come first. The others are dynamic, oldest first. If the
            request exceeds the ranker's context window, the ranker omits the oldest dynamic demonstrations first.
        pass_index: Index of a single pass to make, from 0. `None` makes all passes of the ranker and merges them.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    demonstrations: tuple[Demonstration, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    num_static: int = 0
    pass_index: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, cost and calls of one answer of a ranker.

    Args:
        prompt_tokens: Tokens sent, over all attempts.
        completion_tokens: Tokens received, over all attempts.
        cached_tokens: Tokens among `prompt_tokens` that the endpoint read from its prompt cache, at a lower price.
        cost: Cost in US dollars, or `None` if unknown.
        attempts: Number of calls, including retries.
        cached: Whether the answer comes from our own cache, at no cost.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cost: float | None = None
    attempts: int = 1
    cached: bool = False

    def __add__(self, other: Usage) -> Usage:
        """Return the sum of both usages. A cost of `None` counts as 0, unless both are `None`."""
        costs = [usage.cost for usage in (self, other) if usage.cost is not None]
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            cost=sum(costs) if costs else None,
            attempts=self.attempts + other.attempts,
            cached=self.cached and other.cached,
        )


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Parts of a request that the ranker did not see, because they exceeded its context window.

    Args:
        demonstrations: Number of omitted demonstrations.
        completions: Number of truncated completions.
    """

    demonstrations: int = 0
    completions: int = 0


@dataclass(frozen=True, slots=True)
class RankingResult:
    """A valid ranking.

    Args:
        order: Indices of all completions, best first.
        ranks: Rank of each completion, 0 = best, equal for ties. `None` means that there are no ties and the ranks
            follow from `order`.
        improved_completion: A completion that the ranker wrote to be better than the ranked ones, if any.
        usage: Tokens, cost and calls of the answer, if known.
        consistency: Agreement of several passes over the same completions, or of the members of a jury: mean of
            Kendall's tau-b over pairs, from -1 to 1. `None` for a single pass.
        trimmed: Parts of the request that the ranker did not see. `None` means that it saw everything.
        reasoning: What the ranker wrote before its ranking, if anything.

    Raises:
        ValueError: If `order` is not a permutation of its indices, or `ranks` has a different length.
    """

    order: tuple[int, ...]
    ranks: tuple[int, ...] | None = None
    improved_completion: str | None = None
    usage: Usage | None = None
    consistency: float | None = None
    trimmed: Trimmed | None = None
    reasoning: str | None = None

    def __post_init__(self) -> None:
        _check_order(self.order, len(self.order), "ranking")
        if self.ranks is not None and len(self.ranks) != len(self.order):
            raise ValueError(f"A ranking of {len(self.order)} completions came with {len(self.ranks)} ranks.")

    @property
    def resolved_ranks(self) -> tuple[int, ...]:
        """Rank of each completion, 0 = best, from `ranks` or else from `order`."""
        if self.ranks is not None:
            return self.ranks
        ranks = [0] * len(self.order)
        for rank, index in enumerate(self.order):
            ranks[index] = rank
        return tuple(ranks)


@dataclass(frozen=True, slots=True)
class RankingFailure:
    """A failed ranking, and the reason.

    Args:
        reason: Kind of failure, one word to count by (`"timeout"`, `"unparsable"`, ...).
        detail: Details for debugging.
        usage: Tokens, cost and calls of the failed attempts, if known.
    """

    reason: str
    detail: str = ""
    usage: Usage | None = None


@runtime_checkable
class Corrector(Protocol):
    """Protocol of a model that corrects answers, such as an `Aligner`."""

    def correct(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[str]:
        """Return a correction of each of N answers to N prompts. A good answer can be returned unchanged."""
        ...
