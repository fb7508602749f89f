"""One prompt's interaction, without torch or I/O: what is asked, and what follows from the answer.

`open_interaction` turns sampled completions into a request for the ranker; `settle` turns the ranker's answer and the
policy's own scores into what trains, what is remembered and what is logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..types import Demonstration, Prompt, RankingFailure, RankingRequest, RankingResult, Trimmed, Usage
from .agreement import agreement_ranking
from .demonstrations import from_agreement

DUPLICATE_COMPLETIONS = "duplicate_completions"
ALREADY_AGREED = "already_agreed"
SKIPPED = (DUPLICATE_COMPLETIONS, ALREADY_AGREED)
"""Why a prompt is not ranked at all. Listed beside ranking failures in the log, but no failure of the ranker."""


@dataclass(frozen=True, slots=True)
class Interaction:
    """One prompt and its sampled completions, on the way to the ranker.

    Args:
        prompt: The prompt.
        completions: The K sampled texts.
        distinct: For each text that the ranker sees, its first index in `completions`.
        request: What the ranker is asked; `None` if this prompt is not ranked.
        skipped: Why not, one of `SKIPPED`.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    distinct: tuple[int, ...]
    request: RankingRequest | None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Settlement:
    """What follows from one interaction. All indices are into the K sampled completions.

    Args:
        prompt: The prompt.
        completions: The K sampled texts.
        black_box_order: The ranker's order, best first; each distinct text is named once, by its first index.
        white_box_order: The policy's order of the same.
        agreement: What both say, best first.
        ranks: Ranks to train on, K of them; `None` where there is no ranking.
        improved_completion: A better completion, joined to the prompt as the policy's own are.
        corrected: Whether that is a corrector's, and not the ranker's.
        demonstration: The agreed completions, one of each rank, where they are enough to show an order.
        failure: Why there is no ranking; `None` where there is one.
        usage: What the ranker's answer took.
        consistency: How far several passes of the ranker agreed.
        trimmed: What the ranker was not shown, for want of room.
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
        """The completion that the ranker holds to be best, or without it the policy."""
        return self.completions[(self.black_box_order or self.white_box_order)[0]]

    @property
    def fully_agreed(self) -> bool:
        """Whether the policy orders every distinct completion as the ranker does."""
        return self.agreement is not None and self.agreement == self.black_box_order


def open_interaction(
    prompt: Prompt,
    completions: Sequence[str],
    demonstrations: tuple[Demonstration, ...] = (),
    metadata: Mapping[str, Any] | None = None,
    already_agreed: bool = False,
    num_static: int = 0,
) -> Interaction:
    """Prepares the ranking of one prompt's completions. Equal texts are shown, and paid for, once.

    Args:
        prompt: The prompt.
        completions: The K sampled texts.
        demonstrations: What the ranker is shown before them.
        metadata: The prompt's other dataset columns.
        already_agreed: Whether the prompt is left out, as policy and ranker order its completions alike.
        num_static: How many of the demonstrations, from the first on, are static.
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


def settle(
    interaction: Interaction,
    outcome: RankingResult | RankingFailure | None,
    scores: Sequence[float],
    min_agreement: int = 2,
) -> Settlement:
    """Compares the ranker's answer with the policy's scores.

    Args:
        interaction: What was asked.
        outcome: The ranker's answer; `None` if nothing was asked.
        scores: The policy's score of each of the K completions, from before the update. Ties go to the lower index.
        min_agreement: How many completions both sides must order alike to make a demonstration.

    Raises:
        ValueError: If the answer ranks another number of completions than were asked about.
    """
    prompt, completions, distinct = interaction.prompt, interaction.completions, interaction.distinct
    white_box = tuple(sorted(distinct, key=lambda index: (-scores[index], index)))
    if outcome is None or isinstance(outcome, RankingFailure):
        failure = interaction.skipped if outcome is None else outcome.reason
        usage = None if outcome is None else outcome.usage
        return Settlement(prompt, completions, white_box, failure=failure, usage=usage)

    if len(outcome.order) != len(distinct):
        raise ValueError(f"The ranker was shown {len(distinct)} completions and ranked {len(outcome.order)}.")
    black_box = tuple(distinct[position] for position in outcome.order)
    agreement = agreement_ranking(black_box, white_box)
    improved = outcome.improved_completion
    rank_of = {completions[index]: rank for index, rank in zip(distinct, outcome.resolved_ranks, strict=True)}
    # Tied completions stand in the order of their indices, which is nobody's opinion: a demonstration shows the first.
    first_of: dict[int, int] = {}
    for index in agreement:
        first_of.setdefault(rank_of[completions[index]], index)
    ordered = tuple(first_of.values())
    return Settlement(
        prompt,
        completions,
        white_box,
        black_box_order=black_box,
        agreement=agreement,
        ranks=tuple(rank_of[completion] for completion in completions),
        improved_completion=improved if improved is None else _join_like(completions[black_box[0]], improved),
        demonstration=from_agreement(prompt, completions, ordered) if len(ordered) >= min_agreement else None,
        usage=outcome.usage,
        consistency=outcome.consistency,
        trimmed=outcome.trimmed,
    )


def correct(settlement: Settlement, correction: str) -> Settlement:
    """Adds a corrector's version of the best completion, unless that was left as it is."""
    improved = _join_like(settlement.best_completion, correction)
    if improved == settlement.best_completion:
        return settlement
    return replace(settlement, improved_completion=improved, corrected=True)


def _join_like(sampled: str, improved: str) -> str:
    """Gives the improved completion the leading white space that the policy's own have.

    A plain-text prompt is continued by whatever the policy emits first, often a space. Training on a text without it
    would teach another join than the one that sampling uses.
    """
    return sampled[: len(sampled) - len(sampled.lstrip())] + improved.lstrip()
