"""What the log says about a step's interactions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .._compat import print_prompt_completions_sample
from ..chat.budget import BUDGET_EXHAUSTED
from ..chat.replies import printable
from ..types import Prompt
from .interaction import SKIPPED, Settlement

MAX_PRINTED = 8  # prompts in a printed table


@dataclass(frozen=True, slots=True)
class InteractionRecord:
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
        return self.settlement.failure not in (*SKIPPED, BUDGET_EXHAUSTED)


def means(records: Sequence[InteractionRecord]) -> dict[str, float]:
    """Metrics to average over steps. Those of an agreement are there if at least one prompt was ranked."""
    settlements = [record.settlement for record in records]
    lengths = [length for record in records for length in record.lengths]
    values = {
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(record.num_clipped for record in records) / len(lengths),
        "prompts/cut_ratio": fmean(record.prompt_cut for record in records),
    }
    ranked = [record for record in records if record.settlement.agreement is not None]
    if ranked:
        agreed = [len(record.settlement.agreement or ()) for record in ranked]
        shown = [len(record.settlement.white_box_order) for record in ranked]
        values |= {
            "agreement/length": fmean(agreed),
            "agreement/rate": fmean(part / whole for part, whole in zip(agreed, shown, strict=True)),
            "agreement/full": fmean(record.settlement.fully_agreed for record in ranked),
            "improved/ratio": fmean(record.settlement.improved_completion is not None for record in ranked),
            "improved/corrected_ratio": fmean(record.settlement.corrected for record in ranked),
            "improved/cut_ratio": fmean(record.improved_cut for record in ranked),
        }
    consistencies = [settlement.consistency for settlement in settlements if settlement.consistency is not None]
    if consistencies:
        values["ranker/consistency"] = fmean(consistencies)
    return values


def counts(records: Sequence[InteractionRecord]) -> dict[str, float]:
    """Metrics to add up over steps: failures by kind, what the ranker was not shown, and what it took.

    Cached answers take nothing. The cost is there where at least one answer has a price.
    """
    total: defaultdict[str, float] = defaultdict(float)
    for record in records:
        settlement = record.settlement
        if settlement.failure is not None:
            total[f"failures/{settlement.failure}"] += 1
        if settlement.trimmed is not None:
            total["ranker/dropped_demonstrations"] += settlement.trimmed.demonstrations
            total["ranker/cut_completions"] += settlement.trimmed.completions
        if settlement.usage is None:
            continue
        if settlement.usage.cached:
            total["ranker/cached"] += 1
            continue
        total["ranker/requests"] += settlement.usage.attempts
        total["ranker/prompt_tokens"] += settlement.usage.prompt_tokens
        total["ranker/completion_tokens"] += settlement.usage.completion_tokens
        if settlement.usage.cost is not None:
            total["ranker/cost"] += settlement.usage.cost
    return dict(total)


def print_completions(records: Sequence[InteractionRecord], step: int) -> None:
    """Prints a table of up to `MAX_PRINTED` prompts: each completion's place in both rankings, and whether they agree.

    Needs `rich`.
    """
    rows: dict[str, list[Any]] = {"prompt": [], "completion": [], "ranker": [], "policy": [], "agreed": []}
    for record in records[:MAX_PRINTED]:
        settlement = record.settlement
        for place, index in enumerate(settlement.white_box_order, start=1):
            rows["prompt"].append(_printable(settlement.prompt))
            rows["completion"].append(printable(settlement.completions[index]))
            rows["ranker"].append(settlement.failure if settlement.ranks is None else str(settlement.ranks[index] + 1))
            rows["policy"].append(str(place))
            rows["agreed"].append("yes" if index in (settlement.agreement or ()) else "")
    print_prompt_completions_sample(rows.pop("prompt"), rows.pop("completion"), {}, None, step, extra=rows)


def _printable(prompt: Prompt) -> Prompt:
    if isinstance(prompt, str):
        return printable(prompt)
    return [{**message, "content": printable(message["content"])} for message in prompt]
