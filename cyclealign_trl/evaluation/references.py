"""Read data with reference orders in common formats into one format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.formats import ranked_row
from ..data.hh_rlhf import Pair, split_pair
from ..types import ABSENT, Prompt

# Columns that contain completions or reveal their order. All other columns are passed to the ranker as metadata.
_REFERENCE_COLUMNS = {
    "prompt", "completions", "ranks", "rewards", "chosen", "rejected", "responses", "scores", "ranking", "has_ties",
    "num_correct", "num_incorrect",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReferenceRanking:
    """A prompt and completions whose order is known.

    Args:
        prompt: The prompt.
        completions: Distinct texts.
        ranks: Rank of each completion, 0 = best; equal ranks are ties. At least two ranks differ.
        subset: Name of the part of the data that the row belongs to.
        metadata: Columns of the row that do not reveal the order.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    subset: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_references(rows: Iterable[Mapping[str, Any]]) -> tuple[list[ReferenceRanking], Counter[str]]:
    """Read rows in any of the formats below, which are recognized by their columns.

    - `prompt`, `completions`, and `ranks` (0 = best) or `rewards` (largest = best): ranked data.
    - `chosen`, `rejected`, and optionally `prompt`: TRL's preference data, standard or conversational. Without
      `prompt`, the prompt is the common beginning of both.
    - `chosen`, `rejected` as HH-RLHF publishes them: dialogues that start with a blank line and `Human:`.
    - `prompt`, `chosen`, `rejected` with lists of texts (RewardBench 2): each chosen completion is better than each
      rejected one; nothing else is known about their order.
    - `prompt`, `responses` (records with a `text`), `scores` (largest = best).

    Completions with the same text are merged at the best of their ranks, because a ranker cannot tell them apart. Rows
    without an ordered pair are dropped, and so are HH-RLHF dialogues that `split_pair` cannot use.

    Returns:
        The references in the order of the rows, and the number of dropped rows by reason.

    Raises:
        ValueError: If a row has none of these formats. The message contains its number.
    """
    references: list[ReferenceRanking] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows):
        try:
            outcome = _read_row(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"Row {number} has no readable reference order: {error}") from error
        if isinstance(outcome, str):
            dropped[outcome] += 1
        else:
            references.append(outcome)
    return references, dropped


def _read_row(row: Mapping[str, Any]) -> ReferenceRanking | str:
    """Return the reference of a row, or the reason to drop it."""
    ranked = _to_ranked_row(row)
    if isinstance(ranked, str):
        return ranked
    best_ranks: dict[str, int] = {}
    for text, rank in zip(ranked["completions"], ranked["ranks"], strict=True):
        if rank != ABSENT:
            best_ranks[text] = min(rank, best_ranks.get(text, rank))
    if len(best_ranks) < 2:
        return "equal_completions"
    if len(set(best_ranks.values())) < 2:
        return "all_tied"
    subset = row.get("subset")
    return ReferenceRanking(
        prompt=ranked["prompt"],
        completions=tuple(best_ranks),
        ranks=tuple(best_ranks.values()),
        subset=None if subset is None else str(subset),
        metadata={name: value for name, value in row.items() if name not in _REFERENCE_COLUMNS},
    )


def _to_ranked_row(row: Mapping[str, Any]) -> Mapping[str, Any] | str:
    """Return `prompt`, `completions` as texts, and `ranks`; or the reason to drop the row."""
    if "responses" in row:
        texts = [_text(response["text"]) for response in row["responses"]]
        return ranked_row({"prompt": row["prompt"], "completions": texts, "rewards": row["scores"]})
    if "completions" in row or not {"chosen", "rejected"} <= row.keys():
        if not {"prompt", "completions"} <= row.keys():
            raise ValueError(
                "it needs 'prompt', 'completions', and 'ranks' or 'rewards'; or 'chosen' and 'rejected'; or 'prompt', "
                f"'responses' and 'scores'. It has {sorted(row)}."
            )
        return ranked_row(row)
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], str):
        ranks = [0] * len(chosen) + [1] * len(rejected)
        return ranked_row({"prompt": row["prompt"], "completions": [*chosen, *rejected], "ranks": ranks})
    if row.get("prompt") is None and isinstance(chosen, str) and chosen.startswith("\n\nHuman:"):
        pair = split_pair(chosen, rejected)
        if not isinstance(pair, Pair):
            return pair
        return {"prompt": pair.prompt, "completions": [pair.chosen, pair.rejected], "ranks": [0, 1]}
    return ranked_row({name: value for name, value in row.items() if value is not None})


def _text(value: Any) -> str:
    """Return a response as text; JSON writers can turn responses such as "True" or "12" into bare values."""
    return str(value) if isinstance(value, bool | int | float) else value
