"""One prompt's interaction with the ranker, without torch or I/O.

`open_interaction` turns sampled completions into a request. `resolve` turns the ranker's outcome and the policy's
scores into an `InteractionResult`: what the prompt trains on, the demonstration that it adds, and its row in the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..types import Demonstration, Prompt, RankingFailure, RankingRequest, RankingResult, Trimmed, Usage, valid_text
from .agreement import agreement_ranking, agreement_rate
from .demonstrations import from_agreement

DUPLICATE_COMPLETIONS = "duplicate_completions"
ALREADY_AGREED = "already_agreed"
SKIPPED = (DUPLICATE_COMPLETIONS, ALREADY_AGREED)
"""Reasons not to rank a prompt. The log lists them with ranking failures, but the ranker did not fail."""


@dataclass(frozen=True, slots=True)
class Interaction:
    """One prompt with its sampled completions, before the ranker has answered.

    Args:
        prompt: The prompt.
        completions: The K sampled texts.
        distinct: First index in `completions` of each distinct text, in the order of the request.
        request: Request for the ranker. `None` if the prompt is not ranked.
        skipped: Reason why it is not ranked, one of `SKIPPED`.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    distinct: tuple[int, ...]
    request: RankingRequest | None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class InteractionResult:
    """Result of one interaction. All indices refer to the K sampled completions.

    Args:
        prompt: The prompt.
        completions: The K sampled texts.
        white_box_order: The policy's order of the distinct texts, best first, each named by its first index. Empty if
            the prompt was not to be ranked, since its completions are not scored then.
        black_box_order: The ranker's order of the same texts, ties by index. `None` without a ranking.
        agreement: Completions that both orders agree on, best first, at most one of each rank. `None` if the ranker
            prefers none.
        ranks: Rank of each of the K completions by the ranker. `None` without a ranking.
        improved_completion: Completion that is better than those sampled, joined to the prompt as they are.
        corrected: Whether a corrector wrote it, not the ranker.
        demonstration: The agreed completions, one per rank, if there are enough of them to show an order.
        failure: Reason why there is no ranking. `None` with a ranking.
        usage: Tokens and cost of the ranker's answer.
        consistency: Agreement between several passes of the ranker.
        trimmed: Parts of the request that did not fit into the ranker's context window.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    white_box_order: tuple[int, ...]
    black_box_order: tuple[int, ...] | None = None
    agreement: tuple[int, ...] | None = None
    ranks: tuple[int, ...] | None = None
    improved_completion: str | None = None
    corrected: bool = False
    demonstration: Demonstration | None = None
    failure: str | None = None
    usage: Usage | None = None
    consistency: float | None = None
    trimmed: Trimmed | None = None

    @property
    def best_completion(self) -> str:
        """Completion that the ranker orders first, or the policy if there is no ranking."""
        return self.completions[(self.black_box_order or self.white_box_order)[0]]

    @property
    def all_tied(self) -> bool:
        """True if the ranker prefers no completion, so that there is no order to train on or to agree with."""
        return self.ranks is not None and len(set(self.ranks)) < 2

    @property
    def agreement_rate(self) -> float | None:
        """Share of the ranker's ranks that both orders agree on. `None` without an agreement."""
        if self.agreement is None or self.ranks is None:
            return None
        return agreement_rate(self.agreement, self.ranks)

    @property
    def fully_agreed(self) -> bool:
        """True if the policy orders all completions as the ranker does. Tied completions can have any order."""
        if self.ranks is None or self.all_tied:
            return False
        in_policy_order = [self.ranks[index] for index in self.white_box_order]
        return in_policy_order == sorted(in_policy_order)


def open_interaction(
    prompt: Prompt,
    completions: Sequence[str],
    demonstrations: tuple[Demonstration, ...] = (),
    metadata: Mapping[str, Any] | None = None,
    already_agreed: bool = False,
    num_static: int = 0,
) -> Interaction:
    """Prepare the ranking of one prompt's completions. Equal texts are shown, and paid for, once.

    Args:
        prompt: The prompt.
        completions: The K sampled texts.
        demonstrations: Demonstrations to show with the request.
        metadata: The other dataset columns of the prompt.
        already_agreed: Whether to skip the prompt because policy and ranker have ordered its completions alike.
        num_static: Number of static demonstrations, which come first.
    """
    completions = tuple(completions)
    first_index: dict[str, int] = {}
    for index, completion in enumerate(completions):
        first_index.setdefault(completion, index)
    distinct = tuple(first_index.values())

    skipped = None
    if already_agreed:
        skipped = ALREADY_AGREED
    elif len(distinct) < 2:
        skipped = DUPLICATE_COMPLETIONS
    request = None
    if skipped is None:
        request = RankingRequest(prompt, tuple(first_index), demonstrations, metadata or {}, num_static)
    return Interaction(prompt, completions, distinct, request, skipped)


def resolve(
    interaction: Interaction,
    outcome: RankingResult | RankingFailure | None,
    scores: Sequence[float],
    min_agreement: int = 2,
) -> InteractionResult:
    """Compare the ranker's order with the policy's.

    Args:
        interaction: The interaction.
        outcome: The ranker's answer. `None` if the prompt was not ranked.
        scores: The policy's score of each of the K completions, from before the update. Ties are ordered by index.
        min_agreement: Number of completions that both must order alike to make a demonstration.

    Raises:
        ValueError: If the answer ranks another number of completions than the request has.
    """
    prompt, completions, distinct = interaction.prompt, interaction.completions, interaction.distinct
    if outcome is None:
        return InteractionResult(prompt, completions, (), failure=interaction.skipped)
    white_box = tuple(sorted(distinct, key=lambda index: (-scores[index], index)))
    if isinstance(outcome, RankingFailure):
        return InteractionResult(prompt, completions, white_box, failure=outcome.reason, usage=outcome.usage)

    if len(outcome.order) != len(distinct):
        raise ValueError(f"The ranker was shown {len(distinct)} completions and ranked {len(outcome.order)}.")
    black_box = tuple(distinct[position] for position in outcome.order)
    rank_of_text = {completions[index]: rank for index, rank in zip(distinct, outcome.resolved_ranks, strict=True)}
    ranks = tuple(rank_of_text[completion] for completion in completions)
    improved = outcome.improved_completion
    result = InteractionResult(
        prompt,
        completions,
        white_box,
        black_box_order=black_box,
        ranks=ranks,
        improved_completion=improved if improved is None else _join_like(completions[black_box[0]], improved),
        usage=outcome.usage,
        consistency=outcome.consistency,
        trimmed=outcome.trimmed,
    )
    if result.all_tied:
        return result
    agreement = agreement_ranking(black_box, white_box, ranks)
    demonstration = from_agreement(prompt, completions, agreement) if len(agreement) >= min_agreement else None
    return replace(result, agreement=agreement, demonstration=demonstration)


def add_correction(result: InteractionResult, correction: str) -> InteractionResult:
    """Add a corrector's version of the best completion, unless the corrector left it unchanged."""
    improved = _join_like(result.best_completion, correction)
    if improved == result.best_completion:
        return result
    return replace(result, improved_completion=improved, corrected=True)


def _join_like(sampled: str, improved: str) -> str:
    """Give an improved completion the leading white space of a sampled one.

    The policy continues a plain-text prompt with any token, often a space. Training on a text without it would teach
    a different continuation than the one that is sampled.
    """
    return sampled[: len(sampled) - len(sampled.lstrip())] + valid_text(improved).lstrip()
