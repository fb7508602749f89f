"""File formats and row formats that trainers and evaluations read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import List, Value
from trl import is_conversational, maybe_extract_prompt

from .._files import is_missing_path
from ..types import ABSENT, ranks_from_scores

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def file_format(path: str | os.PathLike[str]) -> str | None:
    """Return the format of a data file, as `datasets.load_dataset` names it, or `None` if the suffix is unknown.

    Example:
        >>> file_format("pairs.jsonl.gz")
        'json'
    """
    return _FILE_FORMATS.get(Path(str(path).removesuffix(".gz")).suffix)


def check_data_path(path: str | os.PathLike[str]) -> None:
    """Raise an error if a data set names a local file or folder that cannot be read. Names on the Hub are accepted.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the suffix of the file is not supported.
    """
    name = str(path)
    if file_format(name) is not None:
        if not os.path.isfile(name):
            raise FileNotFoundError(f"There is no file {name}.")
    elif os.path.isfile(name):
        raise ValueError(
            f"{name} is not a supported data file. Convert it to {', '.join(_FILE_FORMATS)}, optionally compressed as "
            ".gz."
        )
    elif is_missing_path(name):
        raise FileNotFoundError(
            f"There is no folder {name}. Check the path, or pass a data file or the name of a data set on the Hub."
        )


def ranked_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of ranked completions or of a preference pair in the one format that is trained on.

    Args:
        row: Either `prompt`, `completions`, and `ranks` or `rewards`; or `chosen`, `rejected`, and `prompt` if it is
            not the common beginning of both.

    Returns:
        `prompt`; `completions` as texts; `ranks`, 0 = best; and `rewards` or `None`.

    Raises:
        ValueError: If ranks or rewards are missing, invalid, or not one per completion.
    """
    if "completions" not in row:
        pair = maybe_extract_prompt(dict(row))
        texts = [completion_text(pair["chosen"]), completion_text(pair["rejected"])]
        return {"prompt": pair["prompt"], "completions": texts, "ranks": [0, 1], "rewards": None}
    texts = [completion_text(completion) for completion in row["completions"]]
    rewards, ranks = row.get("rewards"), row.get("ranks")
    for name, values in (("ranks", ranks), ("rewards", rewards)):
        if values is not None and len(values) != len(texts):
            raise ValueError(f"A row has {len(texts)} completions but {len(values)} {name}.")
    if rewards is not None and not all(
        isinstance(reward, int | float) and math.isfinite(reward) for reward in rewards
    ):
        raise ValueError(f"Rewards must be finite numbers, got {rewards}; the prompt is {row['prompt']!r}.")
    if ranks is None:
        if rewards is None:
            raise ValueError(f"A row has neither ranks nor rewards; its prompt is {row['prompt']!r}.")
        ranks = ranks_from_scores(rewards)
    if not all(isinstance(rank, int) and rank >= ABSENT for rank in ranks):
        raise ValueError(
            f"Ranks must be integers, 0 = best and {ABSENT} = absent, got {ranks}; the prompt is {row['prompt']!r}."
        )
    return {"prompt": row["prompt"], "completions": texts, "ranks": ranks, "rewards": rewards}


def completion_text(completion: Any) -> str:
    """Return the text of a completion, which is a string or a list of one assistant message.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(completion, str):
        return completion
    if not (is_conversational({"completion": completion}) and len(completion) == 1):
        raise ValueError(f"A completion must be a text or a list of one assistant message, got {completion!r}.")
    return str(completion[0]["content"])


def text_feature(conversational: bool) -> Any:  # datasets.Value | datasets.List
    """Return the feature of a column of prompts or completions: plain texts, or lists of messages."""
    string = Value("string")
    return List({"role": string, "content": string}) if conversational else string
