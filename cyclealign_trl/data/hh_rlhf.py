"""Load Anthropic's HH-RLHF (arXiv 2204.05862) in TRL's dataset formats, and sample prompts from it.

A published row contains two dialogues that differ in the assistant's last turn: annotators preferred `chosen` to
`rejected`. Turns start with `Human:` or `Assistant:` after a blank line.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

from datasets import Dataset, DatasetInfo, Features, List, Value, load_dataset

from ..types import Prompt, as_completion, prompt_key
from .drop_reports import dropped_rows
from .formats import text_feature

Subset = Literal["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
Split = Literal["train", "test"]
DatasetType = Literal["prompt-only", "preference", "ranked"]
Message = dict[str, str]
DropReason = Literal[
    "no_assistant", "different_turns", "broken_turns", "different_prompts", "empty_reply", "equal_replies"
]
"""Reasons to drop a row, in the order in which they are checked; see `split_pair`."""

SUBSETS: tuple[Subset, ...] = get_args(Subset)
HUB_ID = "Anthropic/hh-rlhf"

_ROLES = {"Human:": "user", "Assistant:": "assistant"}
_TAGS = {role: tag for tag, role in _ROLES.items()}
_WRITTEN_TAG = re.compile("[Hh]uman:|[Aa]ssistant:")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and two completions of it.

    Args:
        prompt: All turns before the completion, as messages. The last message is the user's.
        chosen: The preferred completion.
        rejected: The other completion.
    """

    prompt: list[Message]
    chosen: str
    rejected: str


def load_hh_rlhf(
    subset: Subset | Sequence[Subset] | None = None,
    split: Split = "train",
    path: str | os.PathLike[str] | None = None,
    *,
    dataset_type: DatasetType = "preference",
    conversational: bool = True,
    keep_paragraphs: bool = True,
) -> Dataset:
    """Load HH-RLHF from the Hub or from files.

    Rows without a usable preference are dropped (see `split_pair`). `info.description` counts them by reason, in one
    line per subset.

    Args:
        subset: One or several subsets. `None` loads all four.
        split: `"train"` or `"test"`.
        path: A folder with files `<subset>/<split>.jsonl.gz` (as in the Hub's repository) or
            `<subset>.<split>.jsonl.gz`, with or without `.gz`; or one file with the rows of one subset. `None` loads
            from the Hub.
        dataset_type: `"prompt-only"` gives the column `prompt`, without duplicates. `"preference"` gives `prompt`,
            `chosen` and `rejected`. `"ranked"`, for `RankingTrainer`, gives `prompt`, `completions` (chosen first) and
            `ranks`. All types have a column `subset`.
        conversational: Whether prompts and completions are lists of messages. If `False`, they are texts: a prompt
            ends in `"\\n\\nAssistant:"`, a completion starts with a space, and both together are the published
            dialogue.
        keep_paragraphs: Whether turns keep their text after a blank line. `False` reads turns like the loader of
            Open-Assistant; see `split_pair`.

    Raises:
        ValueError: If an argument has an unknown value, or a file does not contain rows of HH-RLHF.
        FileNotFoundError: If the file of a subset is missing.

    Example:
        >>> dataset = load_hh_rlhf("harmless-base", "test", "path/to/hh-rlhf")
        >>> dataset.info.description
        'harmless-base/test: 2312 rows, 2308 kept; dropped: empty_reply 4'
    """
    subsets: tuple[Subset, ...]
    subsets = SUBSETS if subset is None else (subset,) if isinstance(subset, str) else tuple(subset)
    if not subsets or len(set(subsets)) < len(subsets) or not set(subsets) <= set(SUBSETS):
        raise ValueError(f"subset must be one of {SUBSETS}, or several without duplicates; got {subset!r}.")
    for name, value, known in (("split", split, Split), ("dataset_type", dataset_type, DatasetType)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}.")
    path = None if path is None else Path(path)
    if path is not None and not path.exists():
        raise FileNotFoundError(f"There is no folder or file {path}. Leave path out to load HH-RLHF from the Hub.")
    if path is not None and path.is_file() and len(subsets) != 1:
        raise ValueError(
            f"{path} is a file, which contains one subset. Pass the subset's name. Got {len(subsets)}: {subsets}."
        )

    rows: list[dict[str, Any]] = []
    report: list[str] = []
    prompts: set[str] = set()
    for name in subsets:
        published = _read(name, split, path)
        pairs, dropped = _split_pairs(published, keep_paragraphs, prompts if dataset_type == "prompt-only" else None)
        rows += (_row(pair, dataset_type, conversational) | {"subset": name} for pair in pairs.values())
        report.append(f"{name}/{split}: {len(published)} rows, {len(pairs)} kept; {dropped_rows(dropped)}")

    features = Features(_features(dataset_type, conversational) | {"subset": Value("string")})
    columns = {column: [row[column] for row in rows] for column in features}
    return Dataset.from_dict(columns, info=DatasetInfo(description="\n".join(report), features=features))


def is_published(dataset: Any) -> bool:
    """Return whether a data set has the rows that HH-RLHF publishes: dialogues as texts, and no prompts."""
    if not isinstance(dataset, Dataset) or "prompt" in dataset.column_names or not len(dataset):
        return False
    if any(dataset.features.get(name) != Value("string") for name in ("chosen", "rejected")):
        return False
    rows = dataset.select_columns(["chosen", "rejected"]).with_format(None)[:1000]
    starts = [str(text).startswith("\n\nHuman:") for name in ("chosen", "rejected") for text in rows[name]]
    return sum(starts) >= 0.9 * len(starts)  # a few published dialogues are broken


def read_published(dataset: Dataset, dataset_type: DatasetType, conversational: bool) -> Dataset:
    """Convert published rows as `load_hh_rlhf` does, and keep their other columns. Return any other data set as it is.

    Args:
        dataset: The data set, which `is_published` recognises or not.
        dataset_type: As in `load_hh_rlhf`.
        conversational: As in `load_hh_rlhf`.

    Returns:
        The rows that can be used. `info.description` counts the dropped ones by reason.

    Raises:
        ValueError: If no row can be used.
    """
    if not is_published(dataset):
        return dataset
    published = dataset.with_format(None)
    pairs, dropped = _split_pairs(
        published.select_columns(["chosen", "rejected"]), True, set() if dataset_type == "prompt-only" else None
    )
    report = f"{len(dataset)} rows, {len(pairs)} kept; {dropped_rows(dropped)}"
    if not pairs:
        raise ValueError(f"No dialogue of HH-RLHF can be used: {report}.")
    rows = [_row(pair, dataset_type, conversational) for pair in pairs.values()]
    features = _features(dataset_type, conversational)
    others = published.remove_columns(["chosen", "rejected"]).select([*pairs])
    for name in others.column_names:
        features[name] = others.features[name]
    columns = {name: [row[name] for row in rows] if name in rows[0] else others[name][:] for name in features}
    return Dataset.from_dict(columns, info=DatasetInfo(description=report, features=Features(features)))


def split_pair(chosen: str, rejected: str, keep_paragraphs: bool = True) -> Pair | DropReason:
    """Split a row of HH-RLHF into a prompt and two completions, or return the reason to drop it.

    A turn starts with its tag after a blank line. Consecutive turns of one speaker are joined by a newline. A row is
    dropped for the first of these reasons that applies:

    - `"no_assistant"`: `chosen` does not contain "Assistant".
    - `"different_turns"`: The dialogues have different numbers of turns.
    - `"broken_turns"`: A dialogue does not start with the human's turn or does not end with the assistant's.
    - `"different_prompts"`: The dialogues differ before the last turn.
    - `"empty_reply"`: The last turn of a dialogue is empty.
    - `"equal_replies"`: The dialogues are equal, so neither is better.

    The first two reasons come from the loader of Open-Assistant (`rank_datasets.py`), which PRO uses too.

    Args:
        chosen: The preferred dialogue, as published.
        rejected: The other dialogue.
        keep_paragraphs: Whether text after a blank line without a tag belongs to the turn before it. `False` follows
            Open-Assistant to the letter: such text is lost, and the character after a tag is removed even if it is
            not a space.

    Example:
        >>> split_pair("\\n\\nHuman: Hi!\\n\\nAssistant: Hello!", "\\n\\nHuman: Hi!\\n\\nAssistant: What?")
        Pair(prompt=[{'role': 'user', 'content': 'Hi!'}], chosen='Hello!', rejected='What?')
    """
    if "Assistant" not in chosen:
        return "no_assistant"
    good, bad = _turns(chosen, keep_paragraphs), _turns(rejected, keep_paragraphs)
    if len(good) != len(bad):
        return "different_turns"
    if not (_is_whole(good) and _is_whole(bad)):
        return "broken_turns"
    if good[:-1] != bad[:-1]:
        return "different_prompts"
    pair = Pair(good[:-1], good[-1]["content"], bad[-1]["content"])
    if not (pair.chosen.strip() and pair.rejected.strip()):
        return "empty_reply"
    return "equal_replies" if pair.chosen == pair.rejected else pair


def prompt_text(prompt: Iterable[Message]) -> str:
    """Return a prompt as the text that HH-RLHF publishes, up to the last `Assistant:`, without a space after it.

    Example:
        >>> prompt_text([{"role": "user", "content": "Hi!"}])
        '\\n\\nHuman: Hi!\\n\\nAssistant:'
    """
    turns = (f"\n\n{_TAGS[message['role']]} {message['content']}" for message in prompt)
    return "".join(turns) + f"\n\n{_TAGS['assistant']}"


def cut_at_role_tag(reply: str) -> str:
    """Return a reply up to the first `Human:` or `Assistant:`, capitalised or not, without white space around it.

    A model without a token that ends its turn writes the next turns too. PRO's evaluation cuts them off in this way.

    Example:
        >>> cut_at_role_tag(" You are welcome.\\n\\nHuman: Bye!")
        'You are welcome.'
    """
    return _WRITTEN_TAG.split(reply, maxsplit=1)[0].strip()


def sample_prompts(
    dataset: Dataset,
    n: int | None = None,
    per_subset: Literal["equal", "proportional"] | Mapping[str, int] = "equal",
    seed: int = 0,
) -> Dataset:
    """Sample distinct prompts from all subsets, for a CycleAlign run.

    The paper (arXiv 2310.16271) uses about 1000 prompts from the four subsets. We do not know how many came from each,
    so equal numbers are the default.

    Args:
        dataset: A dataset with columns `prompt` and `subset`. A prompt in several subsets belongs to the first one.
        n: Number of prompts. `None` means 1000, or the sum of a mapping `per_subset`.
        per_subset: `"equal"` samples the same number from each subset (the first subsets give one more if `n` is not
            divisible). `"proportional"` samples by the numbers of distinct prompts, rounded by largest remainder. A
            mapping gives the number for each subset.
        seed: Seed of sample and order. Global random states do not change.

    Returns:
        Rows of `prompt` and `subset`, shuffled.

    Raises:
        ValueError: If a subset has too few prompts, `n` contradicts the mapping, or `dataset` is empty or lacks a
            column.
    """
    if not {"prompt", "subset"} <= set(dataset.column_names) or not len(dataset):
        raise ValueError(
            f"dataset must have rows with 'prompt' and 'subset', got {len(dataset)} rows of {dataset.column_names}."
        )
    pools: dict[str, list[int]] = {subset: [] for subset in dataset.unique("subset")}
    keys: set[str] = set()
    for index, (prompt, subset) in enumerate(zip(dataset["prompt"], dataset["subset"], strict=True)):
        key = prompt_key(prompt)
        if key not in keys:
            keys.add(key)
            pools[subset].append(index)

    numbers = _numbers({subset: len(pool) for subset, pool in pools.items()}, n, per_subset)
    short = [
        f"{number} from {subset!r}, which has {len(pools.get(subset, ()))} distinct prompts"
        for subset, number in numbers.items()
        if not 0 <= number <= len(pools.get(subset, ()))
    ]
    if short:
        raise ValueError(f"Cannot sample {' or '.join(short)}. Change `n` or `per_subset`.")
    rng = random.Random(seed)  # noqa: S311 (not for cryptography)
    sample = [index for subset, number in numbers.items() for index in rng.sample(pools.get(subset, []), number)]
    rng.shuffle(sample)
    return dataset.select_columns(["prompt", "subset"]).select(sample)


def _numbers(sizes: dict[str, int], n: int | None, per_subset: str | Mapping[str, int]) -> Mapping[str, int]:
    """Return the number of prompts to sample from each subset, given the sizes of the subsets."""
    if not isinstance(per_subset, str):
        if n not in (None, sum(per_subset.values())):
            raise ValueError(
                f"n={n} contradicts per_subset, whose numbers sum to {sum(per_subset.values())}. Leave out n."
            )
        return per_subset
    if per_subset not in ("equal", "proportional"):
        raise ValueError(f"per_subset must be 'equal', 'proportional' or a mapping, got {per_subset!r}.")
    wanted = 1000 if n is None else n
    shares = sizes if per_subset == "proportional" else dict.fromkeys(sizes, 1)
    total = sum(shares.values())
    numbers = {subset: wanted * share // total for subset, share in shares.items()}
    by_remainder = sorted(shares, key=lambda subset: wanted * shares[subset] % total, reverse=True)
    for subset in by_remainder[: wanted - sum(numbers.values())]:
        numbers[subset] += 1
    return numbers


def _turns(dialogue: str, keep_paragraphs: bool) -> list[Message]:
    """Return the turns of a dialogue as messages. Text before the first tag becomes a turn with an empty role."""
    turns: list[tuple[str, str]] = []
    for block in dialogue.split("\n\n"):
        tag = next(filter(block.startswith, _ROLES), None)
        if tag:
            turns.append((_ROLES[tag], block[len(tag) if keep_paragraphs else len(tag) + 1 :]))
        elif keep_paragraphs and turns:
            role, text = turns.pop()
            turns.append((role, f"{text}\n\n{block}"))
        elif keep_paragraphs and block.strip():
            turns.append(("", block))
    return [
        {"role": role, "content": "\n".join(text.strip() for _, text in group)}
        for role, group in groupby(turns, key=lambda turn: turn[0])
    ]


def _is_whole(turns: list[Message]) -> bool:
    # Roles alternate because `_turns` joins consecutive turns, so first and last determine the others.
    return bool(turns) and (turns[0]["role"], turns[-1]["role"]) == ("user", "assistant")


def _row(pair: Pair, dataset_type: DatasetType, conversational: bool) -> dict[str, Any]:
    prompt: Prompt
    completions: list[Any]
    if conversational:
        prompt = pair.prompt
        completions = [as_completion(prompt, text) for text in (pair.chosen, pair.rejected)]
    else:
        prompt = prompt_text(pair.prompt)
        completions = [f" {text}" for text in (pair.chosen, pair.rejected)]
    if dataset_type == "prompt-only":
        return {"prompt": prompt}
    if dataset_type == "preference":
        return {"prompt": prompt, "chosen": completions[0], "rejected": completions[1]}
    return {"prompt": prompt, "completions": completions, "ranks": [0, 1]}


def _split_pairs(
    published: Iterable[Mapping[str, Any]], keep_paragraphs: bool, prompts: set[str] | None
) -> tuple[dict[int, Pair], Counter[str]]:
    """Return the usable rows by index, and the number of dropped ones by reason.

    Args:
        published: Rows of `chosen` and `rejected`.
        keep_paragraphs: As in `split_pair`.
        prompts: Keys of prompts to leave out, to which those of the rows are added. `None` keeps repeated prompts.
    """
    pairs, dropped = dict[int, Pair](), Counter[str]()
    for index, row in enumerate(published):
        outcome: Pair | str = split_pair(row["chosen"], row["rejected"], keep_paragraphs)
        if isinstance(outcome, Pair) and prompts is not None:
            key = prompt_key(outcome.prompt)
            if key in prompts:
                outcome = "repeated_prompt"
            prompts.add(key)
        if isinstance(outcome, Pair):
            pairs[index] = outcome
        else:
            dropped[outcome] += 1
    return pairs, dropped


def _features(dataset_type: DatasetType, conversational: bool) -> dict[str, Any]:
    text = text_feature(conversational)
    columns: dict[DatasetType, dict[str, Any]] = {
        "prompt-only": {},
        "preference": {"chosen": text, "rejected": text},
        "ranked": {"completions": List(text), "ranks": List(Value("int64"))},
    }
    return {"prompt": text, **columns[dataset_type]}


def _parse(line: str, number: int, file: Path) -> dict[str, str]:
    try:
        row: dict[str, str] = json.loads(line)
    except ValueError as error:
        raise ValueError(f"Line {number} of {file} is not JSON: {error}.") from error
    return row


def _read(subset: Subset, split: Split, path: Path | None) -> Sequence[dict[str, str]]:
    """Read the published rows of a subset."""
    if path is None:
        published: Sequence[dict[str, str]] = load_dataset(HUB_ID, data_dir=subset, split=split)
        return published
    names = [f"{subset}{mark}{split}.jsonl{ending}" for mark in "/." for ending in (".gz", "")]
    file = path if path.is_file() else next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"No {split} rows of {subset!r} in {path}: looked for {', '.join(names)}. Clone "
            f"https://huggingface.co/datasets/{HUB_ID} there, or choose subsets and a split that the folder contains."
        )
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            rows = [_parse(line, number, file) for number, line in enumerate(lines, start=1) if line.strip()]
    except gzip.BadGzipFile as error:
        raise ValueError(f"{file} is not compressed. If it is a Git LFS pointer, run `git lfs pull`.") from error
    for number, row in enumerate(rows, start=1):
        if not {"chosen", "rejected"} <= row.keys():
            raise ValueError(f"Line {number} of {file} must have 'chosen' and 'rejected'; it has {sorted(row)}.")
    return rows
