"""File formats and row formats that trainers and evaluations read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import List, Value
from trl import extract_prompt, is_conversational

from .._files import is_missing_path
from ..types import ABSENT, Prompt, ranks_from_scores

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
        pair = preference_pair(row)
        texts = [completion_text(pair["chosen"]), completion_text(pair["rejected"])]
        return {"prompt": plain_prompt(pair["prompt"]), "completions": texts, "ranks": [0, 1], "rewards": None}
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
    return {"prompt": plain_prompt(row["prompt"]), "completions": texts, "ranks": ranks, "rewards": rewards}


def has_whole_conversations(row: Mapping[str, Any]) -> bool:
    """Return whether `chosen` and `rejected` of a preference pair contain the prompt.

    Some published data sets have a column `prompt`, too, with the text of the first message.
    """
    chosen = row["chosen"]
    return "prompt" not in row or (isinstance(row["prompt"], str) and isinstance(chosen, list) and len(chosen) > 1)


def preference_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preference pair with `prompt`, `chosen` and `rejected`."""
    if not has_whole_conversations(row):
        return dict(row)
    pair: dict[str, Any] = extract_prompt({name: row[name] for name in ("chosen", "rejected")})
    return {**row, **pair}


def completion_text(completion: Any) -> str:
    """Return the text of a completion, which is a string or a list of one assistant message.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(completion, str):
        return completion
    if not (completion and is_conversational({"completion": completion}) and len(completion) == 1):
        raise ValueError(f"A completion must be a text or a list of one assistant message, got {completion!r}.")
    return content_text(completion[0].get("content"))


def plain_prompt(prompt: Any) -> Prompt:
    """Return a prompt, text or messages, whose contents are plain texts.

    Raises:
        ValueError: If it is neither, it is empty, or a content is not text.
    """
    if isinstance(prompt, str):
        return prompt
    if not (isinstance(prompt, list) and prompt):
        raise ValueError(f"A prompt must be a text or a list of messages, got {prompt!r}.")
    return [_plain_message(message) for message in prompt]


def content_text(content: Any) -> str:
    """Return the text of a message's content, which is a string or a list of text parts.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    valid = [text for text in texts if isinstance(text, str)]
    if not parts or len(valid) < len(parts):
        raise ValueError(f"The content of a message must be text, or a list of text parts, got {content!r}.")
    return "".join(valid)


def _plain_message(message: Any) -> dict[str, Any]:
    if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
        raise ValueError(f"A message must have a role and a content, got {message!r}.")
    content = message.get("content")
    if isinstance(content, str):
        return dict(message)
    if content is None and message.get("tool_calls"):  # a call has no text
        return {**message, "content": ""}
    return {**message, "content": content_text(content)}


def text_feature(conversational: bool) -> Any:  # datasets.Value | datasets.List
    """Return the feature of a column of prompts or completions: plain texts, or lists of messages."""
    string = Value("string")
    return List({"role": string, "content": string}) if conversational else string
