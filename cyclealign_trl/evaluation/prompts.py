"""Load the prompts that models are evaluated on, in groups."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import Dataset

from ..data import hh_rlhf
from ..data.formats import plain_prompt, preference_pair
from ..data.named_datasets import load_named_splits, select_split
from ..types import Prompt, prompt_key, valid_text

ALL = "all"
"""Group of every prompt of a data set without groups."""


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A prompt to evaluate on.

    Args:
        prompt: Text or messages.
        group: Group whose mean is reported, such as the subset of the data.
    """

    prompt: Prompt
    group: str = ALL

    @property
    def id(self) -> str:
        """Identify the prompt by its content, the same in every run and on every machine."""
        return hashlib.sha256(prompt_key(self.prompt).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in groups.

    Args:
        prompts: Distinct prompts, in the order of the data set.
        group_sizes: Number of prompts of each group in the data set, of which `prompts` can be a sample. The total of
            a report weights the groups by these numbers.
        dropped: Number of dropped rows by reason.
    """

    prompts: tuple[EvaluationPrompt, ...]
    group_sizes: Mapping[str, int]
    dropped: Mapping[str, int]


def load_prompts(
    name: str = hh_rlhf.HUB_ID,
    config: str | None = None,
    split: str = "test",
    *,
    group_column: str = "subset",
    max_samples: int | None = None,
    seed: int = 0,
) -> PromptSet:
    """Load prompts by the name of their data set.

    HH-RLHF, from the Hub or from a folder with its files, is read by `load_hh_rlhf`, and its subsets are the groups.

    Args:
        name: Name on the Hub, folder, or file (JSON, JSON lines, Parquet, CSV), which is read as `split`.
        config: Configuration of the data set. For HH-RLHF, the subset; `None` loads all four.
        split: Split of the data set.
        group_column: As in `read_prompts`.
        max_samples: As in `read_prompts`.
        seed: As in `read_prompts`.

    Raises:
        ValueError: If the data set cannot be read, or has no prompts.
        FileNotFoundError: If a file or folder is missing.
    """
    dataset: Dataset
    if name == hh_rlhf.HUB_ID or _has_hh_rlhf_files(Path(name), split):
        path = None if name == hh_rlhf.HUB_ID else name
        dataset = hh_rlhf.load_hh_rlhf(cast("Any", config), cast("Any", split), path, dataset_type="prompt-only")
    else:
        dataset = select_split(load_named_splits(name, config, split), split, "dataset_split")
        dataset = hh_rlhf.read_published(dataset, "prompt-only", conversational=True)
    return read_prompts(dataset, group_column=group_column, max_samples=max_samples, seed=seed)


def read_prompts(
    rows: Iterable[Mapping[str, Any]],
    *,
    group_column: str = "subset",
    max_samples: int | None = None,
    seed: int = 0,
) -> PromptSet:
    """Read prompts from rows with a column `prompt`, or from preference pairs without one.

    A prompt that occurs several times belongs to the group of its first row.

    Args:
        rows: The rows.
        group_column: Column with the group of each row. Without this column, all prompts are one group.
        max_samples: Number of prompts per group, drawn at random. `None` takes all. A larger number adds prompts to
            those of a smaller one.
        seed: Seed of the sample.

    Raises:
        ValueError: If a row has no readable prompt, there are no rows, or `max_samples` is below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}.")
    prompts: dict[str, EvaluationPrompt] = {}
    groups: dict[str, list[str]] = {}
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows):
        try:
            prompt = _valid(plain_prompt((row if "prompt" in row else preference_pair(row))["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Row {number} has no readable prompt: {error}. Its columns: {sorted(row)}.") from error
        group = row.get(group_column)
        entry = EvaluationPrompt(prompt, ALL if group is None else valid_text(str(group)))
        if entry.id in prompts:
            dropped["repeated_prompt"] += 1
            continue
        prompts[entry.id] = entry
        groups.setdefault(entry.group, []).append(entry.id)
    if not groups:
        raise ValueError("The data set has no prompts to evaluate on.")
    chosen = {prompt_id for ids in groups.values() for prompt_id in _sample(ids, max_samples, seed)}
    return PromptSet(
        tuple(prompt for prompt_id, prompt in prompts.items() if prompt_id in chosen),
        {group: len(ids) for group, ids in groups.items()},
        dict(dropped),
    )


def _valid(prompt: Prompt) -> Prompt:
    """Return a prompt without lone surrogates."""
    if isinstance(prompt, str):
        return valid_text(prompt)
    return [{**message, "content": valid_text(message["content"])} for message in prompt]


def _sample(ids: list[str], number: int | None, seed: int) -> list[str]:
    """Return the ids of some prompts of a group, drawn at random."""
    shuffled = list(ids)
    random.Random(seed).shuffle(shuffled)  # noqa: S311 (not used for security)
    return shuffled[:number]


def _has_hh_rlhf_files(folder: Path, split: str) -> bool:
    return any(
        (folder / f"{subset}{mark}{split}.jsonl{ending}").is_file()
        for subset in hh_rlhf.SUBSETS
        for mark in "/."
        for ending in (".gz", "")
    )
