"""Metrics of a step's interactions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..chat.budget import BUDGET_EXHAUSTED
from ..types import Usage
from .interaction import SKIPPED, InteractionResult


@dataclass(frozen=True, slots=True)
class InteractionRecord:
    """Result of one prompt's interaction, with the lengths of its texts.

    Args:
        result: The result.
        lengths: Tokens of each of the K sampled completions.
        num_clipped: Number of completions that reached `max_completion_length` before they ended.
        prompt_truncated: Whether the prompt was longer than `max_prompt_length`.
        improved_truncated: Whether the improved completion was longer than `max_completion_length`.
        trains: Whether the prompt's loss is not weighted with 0.
    """

    result: InteractionResult
    lengths: tuple[int, ...]
    num_clipped: int
    prompt_truncated: bool
    improved_truncated: bool
    trains: bool = True

    @property
    def asked(self) -> bool:
        """True if the ranker was asked."""
        return self.result.failure not in (*SKIPPED, BUDGET_EXHAUSTED)


def means(records: Sequence[InteractionRecord]) -> dict[str, float]:
    """Return metrics to average over steps. Those on agreement and improved completions need a ranked prompt."""
    lengths = [length for record in records for length in record.lengths]
    values = {
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(record.num_clipped for record in records) / len(lengths),
        "prompts/cut_ratio": fmean(record.prompt_truncated for record in records),
    }
    ordered = [record for record in records if record.result.agreement is not None]
    if ordered:
        values |= {
            "agreement/length": fmean(len(record.result.agreement or ()) for record in ordered),
            "agreement/rate": fmean(record.result.agreement_rate or 0.0 for record in ordered),
            "agreement/full": fmean(record.result.fully_agreed for record in ordered),
        }
    ranked = [record for record in records if record.result.ranks is not None]
    if ranked:
        values |= {
            "improved/ratio": fmean(record.result.improved_completion is not None for record in ranked),
            "improved/corrected_ratio": fmean(record.result.corrected for record in ranked),
            "improved/cut_ratio": fmean(record.improved_truncated for record in ranked),
        }
    consistencies = [record.result.consistency for record in records if record.result.consistency is not None]
    if consistencies:
        values["ranker/consistency"] = fmean(consistencies)
    return values


def counts(records: Sequence[InteractionRecord]) -> dict[str, float]:
    """Return metrics to add up over steps: failures by reason, ties, truncated requests, and the ranker's usage."""
    total: defaultdict[str, float] = defaultdict(float)
    for record in records:
        result = record.result
        if result.failure is not None:
            total[f"failures/{result.failure}"] += 1
        if result.all_tied:
            total["ranker/all_tied"] += 1
        if result.trimmed is not None:
            total["ranker/dropped_demonstrations"] += result.trimmed.demonstrations
            total["ranker/cut_completions"] += result.trimmed.completions
    return dict(total) | usage_counts("ranker", [record.result.usage for record in records])


def usage_counts(folder: str, usages: Iterable[Usage | None]) -> dict[str, float]:
    """Return calls, tokens, cost and cached answers of a ranker as metrics in a folder.

    Cached answers cost nothing. The cost needs at least one answer with a price.
    """
    total: defaultdict[str, float] = defaultdict(float)
    for usage in usages:
        if usage is None:
            continue
        if usage.cached:
            total[f"{folder}/cached"] += 1
            continue
        total[f"{folder}/requests"] += usage.attempts
        total[f"{folder}/prompt_tokens"] += usage.prompt_tokens
        total[f"{folder}/completion_tokens"] += usage.completion_tokens
        if usage.cost is not None:
            total[f"{folder}/cost"] += usage.cost
    return dict(total)
