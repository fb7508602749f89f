"""Data with reference orders in every layout that is common, as one: prompt, completions, ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.formats import ranked_row
from ..data.hh_rlhf import Pair, split_pair
from ..types import ABSENT, Prompt

# What says which completion is better is no business of a ranker; all other columns are shown to one that asks.
_OF_THE_REFERENCE = {
    "prompt", "completions", "ranks", "rewards", "chosen", "rejected", "responses", "scores", "ranking", "has_ties",
    "num_correct", "num_incorrect",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReferenceRanking:
    """A prompt whose completions stand in a known order.

    Args:
        prompt: The prompt.
        completions: Different texts.
        ranks: The rank of each, 0 = best; equal ranks are ties. Not all are equal.
        subset: The part of the data that the row belongs to.
        metadata: The row's columns that do not give the order away.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    subset: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_references(rows: Iterable[Mapping[str, Any]]) -> tuple[list[ReferenceRanking], Counter[str]]:
    """Reads rows of any of these layouts, told apart by their columns:

    - `prompt`, `completions`, and `ranks` (0 = best) or `rewards` (largest = best): TRL-style ranked data.
    - `chosen`, `rejected`: TRL's preference data, standard or conversational, with `prompt` or with the prompt as what
      both begin with.
    - `chosen`, `rejected` as HH-RLHF publishes them: dialogues that start with a blank line and `Human:`.
    - `prompt`, `chosen`, `rejected` with a list of texts each (RewardBench 2): each chosen one is better than each
      rejected one, and that is all that is known.
    - `prompt`, `responses` (records with a `text`), `scores` (largest = best).

    Completions of the same text are one, with the best of their ranks: a ranker could not tell them apart. Rows that
    order nothing are left out, and so are dialogues of HH-RLHF that `split_pair` has no use for.

    Returns:
        The references in the order of the rows, and how many rows were left out for which reason.

    Raises:
        ValueError: If a row has none of these layouts, with its number.
    """
    references: list[ReferenceRanking] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows):
        try:
            outcome = _read(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"Row {number} holds no reference order that can be read: {error}") from error
        if isinstance(outcome, str):
            dropped[outcome] += 1
        else:
            references.append(outcome)
    return references, dropped


def _read(row: Mapping[str, Any]) -> ReferenceRanking | str:
    plain = _plain(row)
    if isinstance(plain, str):
        return plain
    best: dict[str, int] = {}
    for text, rank in zip(plain["completions"], plain["ranks"], strict=True):
        if rank != ABSENT:
            best[text] = min(rank, best.get(text, rank))
    if len(best) < 2:
        return "equal_completions"
    if len(set(best.values())) < 2:
        return "all_tied"
    subset = row.get("subset")
    metadata = {name: value for name, value in row.items() if name not in _OF_THE_REFERENCE}
    return ReferenceRanking(
        plain["prompt"], tuple(best), tuple(best.values()), None if subset is None else str(subset), metadata
    )


def _plain(row: Mapping[str, Any]) -> Mapping[str, Any] | str:
    """The row as prompt, texts and ranks; or why there is none."""
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
    """The text; of a reply such as "True" or "12", a file may have kept the value alone."""
    return str(value) if isinstance(value, bool | int | float) else value
