"""What the log says about a step's interactions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .._compat import print_prompt_completions_sample
from ..interaction import SKIPPED, Settlement


@dataclass(frozen=True, slots=True)
class Outcome:
    """One prompt's interaction with the lengths that its texts had for the policy.

    Args:
        settlement: What followed from the ranker's answer.
        lengths: Tokens of each sampled completion, K of them.
        num_clipped: How many of them ran out of room before they ended.
        prompt_cut: Whether the prompt was longer than `max_prompt_length`.
        improved_cut: Whether the improved completion was longer than `max_completion_length`.
    """

    settlement: Settlement
    lengths: tuple[int, ...]
    num_clipped: int
    prompt_cut: bool
    improved_cut: bool

    @property
    def asked(self) -> bool:
        """Whether the ranker was asked at all."""
        return self.settlement.failure not in SKIPPED

    @property
    def failed(self) -> bool:
        """Whether the ranker was asked and gave no ranking."""
        return self.asked and self.settlement.failure is not None


def means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Metrics to average over steps. Those of an agreement are there if at least one prompt was ranked."""
    lengths = [length for outcome in outcomes for length in outcome.lengths]
    values = {
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(outcome.num_clipped for outcome in outcomes) / len(lengths),
        "prompts/cut_ratio": fmean(outcome.prompt_cut for outcome in outcomes),
    }
    ranked = [outcome for outcome in outcomes if outcome.settlement.agreement is not None]
    if ranked:
        agreed = [len(outcome.settlement.agreement or ()) for outcome in ranked]
        shown = [len(outcome.settlement.white_box_order) for outcome in ranked]
        values |= {
            "agreement/length": fmean(agreed),
            "agreement/rate": fmean(part / whole for part, whole in zip(agreed, shown, strict=True)),
            "agreement/full": fmean(outcome.settlement.fully_agreed for outcome in ranked),
            "improved/ratio": fmean(outcome.settlement.improved_completion is not None for outcome in ranked),
            "improved/cut_ratio": fmean(outcome.improved_cut for outcome in ranked),
        }
    return values


def counts(outcomes: Sequence[Outcome]) -> Counter[str]:
    """Metrics to add up over steps: failures by kind, and what the ranker took. Cached answers take nothing."""
    total: Counter[str] = Counter()
    for outcome in outcomes:
        settlement = outcome.settlement
        if settlement.failure is not None:
            total[f"failures/{settlement.failure}"] += 1
        if settlement.usage is None:
            continue
        if settlement.usage.cached:
            total["ranker/cached"] += 1
        else:
            total["ranker/prompt_tokens"] += settlement.usage.prompt_tokens
            total["ranker/completion_tokens"] += settlement.usage.completion_tokens
    return total


def print_completions(outcomes: Iterable[Outcome], step: int) -> None:
    """Prints a table, one row per completion: its place in both rankings, and whether they agree. Needs `rich`."""
    rows: dict[str, list[Any]] = {"prompt": [], "completion": [], "ranker": [], "policy": [], "agreed": []}
    for outcome in outcomes:
        settlement = outcome.settlement
        for index in settlement.white_box_order:
            rows["prompt"].append(settlement.prompt)
            rows["completion"].append(settlement.completions[index])
            rows["ranker"].append(settlement.failure if settlement.ranks is None else str(settlement.ranks[index] + 1))
            rows["policy"].append(str(settlement.white_box_order.index(index) + 1))
            rows["agreed"].append("yes" if index in (settlement.agreement or ()) else "")
    print_prompt_completions_sample(rows.pop("prompt"), rows.pop("completion"), {}, None, step, extra=rows)
