"""Anthropic's HH-RLHF (arXiv 2204.05862): published dialogues into TRL's dataset types, and prompts drawn from them.

A row holds two dialogues that share all turns but the last, the assistant's reply: `chosen` was preferred to
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

from ..types import Prompt, prompt_key
from .drop_reports import dropped_rows
from .formats import text_feature

Subset = Literal["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
Split = Literal["train", "test"]
DatasetType = Literal["prompt-only", "preference", "ranked"]
Message = dict[str, str]
DropReason = Literal[
    "no_assistant", "different_turns", "broken_turns", "different_prompts", "empty_reply", "equal_replies"
]
"""Why a row is left out, in the order in which this is checked; see `split_pair`."""

SUBSETS: tuple[Subset, ...] = get_args(Subset)
HUB_ID = "Anthropic/hh-rlhf"

_ROLES = {"Human:": "user", "Assistant:": "assistant"}
_TAGS = {role: tag for tag, role in _ROLES.items()}
_WRITTEN_TAG = re.compile(r"[Hh]uman:|[Aa]ssistant:")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt.

    Args:
        prompt: All turns before the replies, as messages; the last one is the user's.
        chosen: The reply that was preferred.
        rejected: The other reply.
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
    """Loads HH-RLHF, from the Hub or from files.

    Rows without a usable preference are left out (see `split_pair`), and counted in `info.description`: one line per
    subset.

    Args:
        subset: One subset or several. `None` means all four.
        split: `"train"` or `"test"`.
        path: A directory with `<subset>/<split>.jsonl.gz`, as in a clone of the Hub's repository, or
            `<subset>.<split>.jsonl.gz`; either also without `.gz`. Or a file with the rows of one subset. `None` loads
            from the Hub.
        dataset_type: `"prompt-only"`: `prompt` (each distinct one once). `"preference"`: `prompt`, `chosen`,
            `rejected`. `"ranked"`, for `RankingTrainer`: `prompt`, `completions` (chosen, then rejected), `ranks`.
            Each with the column `subset`.
        conversational: Prompts and completions are lists of messages. Otherwise, they are texts: a prompt ends with
            `"\\n\\nAssistant:"`, a completion starts with a space, and both together are the dialogue as published.
        keep_paragraphs: Turns keep their text after a blank line. `False` reads turns as the loader of Open-Assistant
            does; see `split_pair`.

    Raises:
        ValueError: If an argument is none of the values above, or a file does not hold rows of HH-RLHF.
        FileNotFoundError: If a subset's file is not there.

    Example:
        >>> dataset = load_hh_rlhf("harmless-base", "test", "path/to/hh-rlhf")
        >>> dataset.info.description
        'harmless-base/test: 2312 rows, 2308 kept; dropped: empty_reply 4'
    """
    subsets: tuple[Subset, ...]
    subsets = SUBSETS if subset is None else (subset,) if isinstance(subset, str) else tuple(subset)
    if not subsets or len(set(subsets)) < len(subsets) or not set(subsets) <= set(SUBSETS):
        raise ValueError(f"subset must be one of {SUBSETS}, or several of them, each once; got {subset!r}.")
    for name, value, known in (("split", split, Split), ("dataset_type", dataset_type, DatasetType)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}.")
    path = None if path is None else Path(path)
    if path is not None and path.is_file() and len(subsets) != 1:
        raise ValueError(f"{path} is one file, which holds one subset: name it. Got {len(subsets)}: {subsets}.")

    rows: list[dict[str, Any]] = []
    report: list[str] = []
    prompts: set[str] = set()
    for name in subsets:
        published = _read(name, split, path)
        kept_before, dropped = len(rows), Counter[str]()
        for row in published:
            outcome: Pair | str = split_pair(row["chosen"], row["rejected"], keep_paragraphs)
            if isinstance(outcome, Pair) and dataset_type == "prompt-only":
                key = prompt_key(outcome.prompt)
                if key in prompts:
                    outcome = "repeated_prompt"
                prompts.add(key)
            if isinstance(outcome, Pair):
                rows.append(_row(outcome, dataset_type, conversational) | {"subset": name})
            else:
                dropped[outcome] += 1
        kept = len(rows) - kept_before
        report.append(f"{name}/{split}: {len(published)} rows, {kept} kept; {dropped_rows(dropped)}")

    features = _features(dataset_type, conversational)
    columns = {column: [row[column] for row in rows] for column in features}
    return Dataset.from_dict(columns, info=DatasetInfo(description="\n".join(report), features=features))


def split_pair(chosen: str, rejected: str, keep_paragraphs: bool = True) -> Pair | DropReason:
    """Splits a row of HH-RLHF into prompt and replies, or says why it is no use.

    A turn starts with its tag after a blank line. Consecutive turns of one speaker become one, joined by a newline.
    The reasons to leave a row out, the first that applies:

    - `"no_assistant"`: the chosen text does not contain "Assistant".
    - `"different_turns"`: chosen and rejected have different numbers of turns.
    - `"broken_turns"`: a dialogue does not start with the human's turn or does not end with the assistant's.
    - `"different_prompts"`: the dialogues differ before the replies.
    - `"empty_reply"`: chosen or rejected is empty.
    - `"equal_replies"`: chosen and rejected are the same, so neither is better.

    The first two are those of the loader of Open-Assistant (`rank_datasets.py`), which PRO's data preparation uses,
    too.

    Args:
        chosen: The dialogue with the better reply, as published.
        rejected: The dialogue with the worse reply.
        keep_paragraphs: Text after a blank line without a tag belongs to the turn before it. `False` reads turns to
            the letter as Open-Assistant does: such text is lost, and a tag takes the next character with it, space or
            not.

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
    """A prompt as the text that HH-RLHF publishes, up to the tag of the reply, without a space after it.

    Example:
        >>> prompt_text([{"role": "user", "content": "Hi!"}])
        '\\n\\nHuman: Hi!\\n\\nAssistant:'
    """
    turns = (f"\n\n{_TAGS[message['role']]} {message['content']}" for message in prompt)
    return "".join(turns) + f"\n\n{_TAGS['assistant']}"


def truncate_reply(text: str) -> str:
    """The reply alone, where a policy without an end-of-turn token wrote on into the next turns.

    Cuts at the first `Human:`, `human:`, `Assistant:` or `assistant:`, as PRO's evaluation does.

    Example:
        >>> truncate_reply(" You are welcome.\\n\\nHuman: Bye!")
        'You are welcome.'
    """
    return _WRITTEN_TAG.split(text, maxsplit=1)[0].strip()


def sample_prompts(
    dataset: Dataset,
    n: int | None = None,
    per_subset: Literal["equal", "proportional"] | Mapping[str, int] = "equal",
    seed: int = 0,
) -> Dataset:
    """Draws distinct prompts from all subsets, as the prompts of a CycleAlign run.

    The paper (arXiv 2310.16271) takes about 1000 from the four subsets. How many of each is not known to us: equal
    numbers are our default.

    Args:
        dataset: Rows of `prompt` and `subset`, of whatever type. A prompt in several subsets counts for the first.
        n: How many prompts are drawn. `None` means 1000, or what a mapping says.
        per_subset: `"equal"`: the same number from each subset, the first ones giving one more where `n` leaves a
            remainder. `"proportional"`: by the subsets' numbers of distinct prompts, rounded by largest remainder. A
            mapping gives the number for each subset.
        seed: Seed of draw and order. Random states outside are left alone.

    Returns:
        Rows of `prompt` and `subset`, shuffled.

    Raises:
        ValueError: If a subset has too few prompts, `n` contradicts the mapping, or `dataset` has no rows of `prompt`
            and `subset`.
    """
    if not {"prompt", "subset"} <= set(dataset.column_names) or not len(dataset):
        raise ValueError(
            f"Prompts are drawn from rows of 'prompt' and 'subset'; got {len(dataset)} rows of {dataset.column_names}."
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
        raise ValueError(f"Cannot draw {' or '.join(short)}. Ask for other numbers with `n` or `per_subset`.")
    rng = random.Random(seed)  # noqa: S311 (no secret is made here)
    drawn = [index for subset, number in numbers.items() for index in rng.sample(pools.get(subset, []), number)]
    rng.shuffle(drawn)
    return dataset.select_columns(["prompt", "subset"]).select(drawn)


def _numbers(sizes: dict[str, int], n: int | None, per_subset: str | Mapping[str, int]) -> Mapping[str, int]:
    """How many prompts each subset gives, from the subsets' sizes."""
    if not isinstance(per_subset, str):
        if n not in (None, sum(per_subset.values())):
            raise ValueError(f"n={n} contradicts per_subset, whose numbers sum to {sum(per_subset.values())}.")
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
    """The turns of a dialogue; text before the first tag is a turn of nobody."""
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
        {"role": role, "content": "\n".join(text.strip() for _, text in of_one)}
        for role, of_one in groupby(turns, key=lambda turn: turn[0])
    ]


def _is_whole(turns: list[Message]) -> bool:
    # Roles alternate, so this is all that can be wrong.
    return bool(turns) and (turns[0]["role"], turns[-1]["role"]) == ("user", "assistant")


def _row(pair: Pair, dataset_type: DatasetType, conversational: bool) -> dict[str, Any]:
    prompt: Prompt
    replies: list[Any]
    if conversational:
        prompt = pair.prompt
        replies = [[{"role": "assistant", "content": reply}] for reply in (pair.chosen, pair.rejected)]
    else:
        prompt = prompt_text(pair.prompt)
        replies = [f" {reply}" for reply in (pair.chosen, pair.rejected)]
    if dataset_type == "prompt-only":
        return {"prompt": prompt}
    if dataset_type == "preference":
        return {"prompt": prompt, "chosen": replies[0], "rejected": replies[1]}
    return {"prompt": prompt, "completions": replies, "ranks": [0, 1]}


def _features(dataset_type: DatasetType, conversational: bool) -> Features:
    text = text_feature(conversational)
    columns = {
        "prompt-only": {},
        "preference": {"chosen": text, "rejected": text},
        "ranked": {"completions": List(text), "ranks": List(Value("int64"))},
    }
    return Features({"prompt": text, **columns[dataset_type], "subset": Value("string")})


def _parse(line: str, number: int, file: Path) -> dict[str, str]:
    try:
        row: dict[str, str] = json.loads(line)
    except ValueError as error:
        raise ValueError(f"Line {number} of {file} is no JSON: {error}.") from error
    return row


def _read(subset: Subset, split: Split, path: Path | None) -> Sequence[dict[str, str]]:
    """The published rows of a subset."""
    if path is None:
        published: Sequence[dict[str, str]] = load_dataset(HUB_ID, data_dir=subset, split=split)
        return published
    names = [f"{subset}{mark}{split}.jsonl{ending}" for mark in "/." for ending in (".gz", "")]
    file = path if path.is_file() else next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"No {split} rows of {subset!r} in {path}: looked for {', '.join(names)}. Put a clone of "
            f"https://huggingface.co/datasets/{HUB_ID} there, or ask for the subsets and the split that are there."
        )
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            rows = [_parse(line, number, file) for number, line in enumerate(lines, start=1) if line.strip()]
    except gzip.BadGzipFile as error:
        raise ValueError(f"{file} is not compressed. In a clone made without Git LFS, run `git lfs pull`.") from error
    for number, row in enumerate(rows, start=1):
        if not {"chosen", "rejected"} <= row.keys():
            raise ValueError(f"Line {number} of {file} must have 'chosen' and 'rejected'; it has {sorted(row)}.")
    return rows
