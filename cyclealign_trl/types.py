"""What a ranking is made of. No torch, no I/O: everything here can be built, compared and sent anywhere.

Words used throughout the package: `order` lists the indices of completions, best first; a completion's `rank` is its
position in that order (0 = best).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Prompt = str | list[dict[str, str]]
"""A TRL prompt: plain text (standard format) or a list of `{"role", "content"}` messages (conversational format)."""


def as_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """A text as a TRL completion of the prompt, in the prompt's format."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def with_completion(prompt: list[dict[str, str]], text: str) -> list[dict[str, str]]:
    """Return the messages of a conversational prompt and a completion of it.

    A prompt that ends in an assistant's message is a prefilled reply, which the completion continues.
    """
    *turns, last = prompt
    if last["role"] == "assistant":
        return [*turns, {**last, "content": last["content"] + text}]
    return [*prompt, {"role": "assistant", "content": text}]


def prompt_key(prompt: Prompt) -> str:
    """A text that is the same for equal prompts only."""
    return json.dumps(prompt, sort_keys=True)


def ranks_from_scores(scores: Sequence[float]) -> tuple[int, ...]:
    """Ranks by falling score, 0 = best; equal scores share a rank.

    Example:
        >>> ranks_from_scores([0.5, 2.0, 0.5, -1.0])
        (1, 0, 1, 2)
    """
    rank_of = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    return tuple(rank_of[score] for score in scores)


def _check_permutation(order: tuple[int, ...], num_completions: int, what: str) -> None:
    if sorted(order) != list(range(num_completions)):
        raise ValueError(
            f"The order of a {what} must name each of its {num_completions} completions once, as indices from 0 to "
            f"{num_completions - 1}, best first; got {list(order)}."
        )


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A ranked example that is shown to the ranker in context.

    Args:
        prompt: The prompt that the completions answer.
        completions: The completions, in the order in which they are shown.
        order: Indices into `completions`, best first.

    Raises:
        ValueError: If `order` is no permutation of the completions, or there are fewer than two completions.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        # Lists (from JSON or YAML) are as good as tuples to write down, but not to hash or share.
        object.__setattr__(self, "completions", tuple(self.completions))
        object.__setattr__(self, "order", tuple(self.order))
        if len(self.completions) < 2:
            raise ValueError(
                f"A demonstration shows an order, which takes at least 2 completions; got {len(self.completions)}."
            )
        _check_permutation(self.order, len(self.completions), "demonstration")


@dataclass(frozen=True, slots=True)
class RankingRequest:
    """What a ranker is asked: put `completions` in order of merit as answers to `prompt`.

    Args:
        prompt: The prompt, as text or messages.
        completions: At least one distinct text to rank.
        demonstrations: Ranked examples, to be shown before the query in this order.
        metadata: The prompt's other dataset columns.
        num_static: How many of the demonstrations, from the first on, are static; the others are dynamic, oldest
            first. A ranker that runs out of room leaves out the oldest dynamic one first.
        pass_index: Which one of several passes over the completions to make, from 0. `None` asks for as many as the
            ranker makes, merged.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    demonstrations: tuple[Demonstration, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    num_static: int = 0
    pass_index: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer of a ranker took.

    Args:
        prompt_tokens: Tokens sent, over all attempts.
        completion_tokens: Tokens received, over all attempts.
        cached_tokens: Tokens of those sent that the endpoint had read before, and charges less for.
        cost: Price in US dollars, as far as it is known.
        attempts: Calls that were made, retries included.
        cached: Whether the answer was read back from a cache, at no expense now.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cost: float | None = None
    attempts: int = 1
    cached: bool = False

    def __add__(self, other: Usage) -> Usage:
        """What both took together; the cost is that of what is priced."""
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
    """What a request was shown without, to fit into the ranker's context window.

    Args:
        demonstrations: How many were left out.
        completions: How many lost their end.
    """

    demonstrations: int = 0
    completions: int = 0


@dataclass(frozen=True, slots=True)
class RankingResult:
    """A valid ranking.

    Args:
        order: A permutation of the completions' indices, best first.
        ranks: Per completion its rank, 0 = best, equal where the ranker sees a tie. `None` means that `order` has
            no ties.
        improved_completion: A better completion than those ranked, where the ranker offers one.
        usage: What the answer took, where it is known.
        consistency: How far several passes over the same completions agree: Kendall's tau-b, the mean over pairs of
            passes, from -1 to 1. `None` where there was one pass.
        trimmed: What the ranker was not shown, for want of room. `None` where it was shown everything.

    Raises:
        ValueError: If `order` is no permutation of its own indices, or `ranks` has another length.
    """

    order: tuple[int, ...]
    ranks: tuple[int, ...] | None = None
    improved_completion: str | None = None
    usage: Usage | None = None
    consistency: float | None = None
    trimmed: Trimmed | None = None

    def __post_init__(self) -> None:
        _check_permutation(self.order, len(self.order), "ranking")
        if self.ranks is not None and len(self.ranks) != len(self.order):
            raise ValueError(f"A ranking of {len(self.order)} completions came with {len(self.ranks)} ranks.")

    @property
    def resolved_ranks(self) -> tuple[int, ...]:
        """Per completion its rank, 0 = best: `ranks`, or what `order` says where there are no ties."""
        if self.ranks is not None:
            return self.ranks
        ranks = [0] * len(self.order)
        for rank, index in enumerate(self.order):
            ranks[index] = rank
        return tuple(ranks)


@dataclass(frozen=True, slots=True)
class RankingFailure:
    """No ranking, and why: data, never a made-up order.

    Args:
        reason: The kind of failure, one word to count by (`"timeout"`, `"unparsable"`, ...).
        detail: What a person needs to look into it.
        usage: What the failed attempts took all the same, where it is known.
    """

    reason: str
    detail: str = ""
    usage: Usage | None = None


ABSENT = -1
"""The rank of a completion that is not there: padding, or a ranking that failed."""


@runtime_checkable
class Corrector(Protocol):
    """Anything that corrects answers, such as an `Aligner`."""

    def correct(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[str]:
        """A better answer for each of N answers to N prompts, or the answer itself where it is good enough."""
        ...
