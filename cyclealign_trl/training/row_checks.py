"""Check all rows of a data set before a run, so that none of them stops it later.

Arrow checks whole batches of rows at once: a million rows take seconds. Only a batch with something unusual is read
row by row, to find the row and to say what is wrong with it.
"""

from __future__ import annotations

import ast
import heapq
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..data.formats import completion_text, has_whole_conversations, plain_prompt, preference_pair, ranked_row
from ..types import Prompt

_BATCH_SIZE = 20_000
_NUM_LONGEST = 64
_LIST_TEXT = r"^\s*\[\s*(\{|'|\"|\])"


@dataclass(frozen=True, slots=True)
class Column:
    """Check of one column.

    Args:
        read: Reads a value. Raises `ValueError` if it cannot be used.
        is_plain: Returns whether all values of an array are certain to be readable. `False` means unknown.
    """

    read: Callable[[Any], Any]
    is_plain: Callable[[pa.Array], bool]


@dataclass(frozen=True, slots=True)
class RowCheck:
    """Check of the rows of a data set.

    Args:
        columns: Columns to check one by one.
        read: Reads a row, to check what its columns have in common. Raises `ValueError` if it cannot be used.
        collate: Converts rows to token ids. Called on one row of each sequence of roles, which a chat template may
            reject, and on the longest rows, which may not fit into the model.
        is_plain: Returns whether `read` is certain to accept all rows of a table whose columns are plain.
        dialogue: Column of messages or texts that decides on roles and lengths.
        collate_longest: Whether to call `collate` on the longest rows.
    """

    columns: Mapping[str, Column]
    read: Callable[[Mapping[str, Any]], Any]
    collate: Callable[[Sequence[Mapping[str, Any]]], Any]
    is_plain: Callable[[pa.Table], bool] = bool
    dialogue: str = "prompt"
    collate_longest: bool = False


def plain_rows(dataset: Any) -> Any:
    """Return a data set whose rows are Python objects. `with_format("torch")` would change numbers to tensors.

    A data set with a transform of the user's own stays as it is.
    """
    if isinstance(dataset, Mapping):
        return {name: plain_rows(part) for name, part in dataset.items()}
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom"):
        return dataset.with_format(None)
    return dataset


def check_rows(name: str, dataset: Any, check: RowCheck) -> None:
    """Check that a trainer can read all rows of a data set.

    A data set that is no `datasets.Dataset` is checked row by row if it is a list, and else in its first row.

    Args:
        name: Name of the data set, for messages.
        dataset: The data set, with at least one row.
        check: What to check.

    Raises:
        ValueError: If a row cannot be used. The message names data set, row and column.
    """
    rows = _Rows(name, check)
    rows.check(0, dataset[0], collate=True)
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        for index in range(len(dataset)) if isinstance(dataset, Sequence) else ():
            rows.check(index, dataset[index])
        return
    columns = [column for column in check.columns if column in dataset.column_names]
    roles, longest = set[str](), list[tuple[int, int]]()
    for indices, table in _batches(dataset, columns):
        if not _is_plain(table, check):
            batch = dataset.select_columns(columns)[indices]
            for offset, index in enumerate(indices):
                rows.check(int(index), {column: values[offset] for column, values in batch.items()})
        for offset in _new_roles(table[check.dialogue], roles):
            rows.check(int(indices[offset]), dataset[int(indices[offset])], collate=True)
        if check.collate_longest:
            lengths = ((length, int(indices[offset])) for length, offset in _longest(table[check.dialogue]))
            longest = heapq.nlargest(_NUM_LONGEST, [*longest, *lengths])
    for _, index in longest:
        rows.check(index, dataset[index], collate=True)


def _batches(dataset: Dataset, columns: list[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Yield the indices and the columns of some rows at a time, in the order in which Arrow stores them.

    A shuffled data set is a list of indices into a table. Gathering its rows in their own order takes minutes.
    """
    table = dataset.data.table.select(columns)
    mapping = getattr(dataset, "_indices", None)
    stored = np.arange(len(table)) if mapping is None else mapping.column(0).to_numpy()
    order = np.argsort(stored, kind="stable")
    stored = stored[order]
    for start in range(0, len(table), _BATCH_SIZE):
        first, last = np.searchsorted(stored, [start, start + _BATCH_SIZE])
        if first < last:
            batch, positions = table.slice(start, _BATCH_SIZE), stored[first:last] - start
            if len(positions) < len(batch) or (np.diff(positions) != 1).any():
                batch = batch.take(positions)
            yield order[first:last], batch


def check_rewards(name: str, dataset: Any) -> None:
    """Raise `ValueError` if some rows of a data set have rewards and others do not."""
    if not isinstance(dataset, Dataset) or "rewards" not in dataset.column_names:
        return
    missing = [
        index
        for indices, table in _batches(dataset, ["rewards"])
        for index in indices[_array(table["rewards"]).is_null().to_numpy(zero_copy_only=False)].tolist()
    ]
    if 0 < len(missing) < len(dataset):  # the loss of a row must not depend on the other rows of its batch
        raise ValueError(
            f"{len(missing)} of {len(dataset)} rows of {name} have no rewards, for example row {min(missing)}. Give "
            "rewards for all rows, or remove the column 'rewards' to train on ranks."
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Check single rows of a data set, and name the row in messages."""

    name: str
    how: RowCheck
    formats: set[type] = field(default_factory=set)
    roles: set[tuple[str, ...]] = field(default_factory=set)

    def check(self, index: int, row: Mapping[str, Any], collate: bool = False) -> None:
        row_name = f"The first row of {self.name}" if index == 0 else f"Row {index} of {self.name}"
        for name, column in self.how.columns.items():
            if name in row:
                with_column = f"{row_name} cannot be used: column {name!r}: "
                try:
                    _check_list_text(row[name])
                    column.read(row[name])
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{with_column}{error} Correct or remove the row.") from error
        self.formats.add(type(row.get(self.how.dialogue)))
        if len(self.formats) > 1:
            raise ValueError(
                f"{row_name} cannot be used: column {self.how.dialogue!r} has texts in some rows and messages in "
                "others. Pass all of them in one format."
            )
        try:
            self.how.read(row)
            if collate or _is_blank(row.get(self.how.dialogue)) or self._has_new_roles(row):
                self.how.collate([row])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{row_name} cannot be used: {error}") from error

    def _has_new_roles(self, row: Mapping[str, Any]) -> bool:
        messages = row.get(self.how.dialogue)
        roles = tuple(message["role"] for message in messages) if isinstance(messages, list) else ()
        is_new = roles not in self.roles
        self.roles.add(roles)
        return is_new


def read_prompts(prompts: Dataset | Sequence[Any], read: Callable[[Prompt], Any] = plain_prompt) -> list[Prompt]:
    """Return prompts whose contents are texts, after checking all of them.

    Args:
        prompts: Prompts, or a data set with a column `prompt`.
        read: Reads a prompt. Called on one prompt of each sequence of roles. Raises `ValueError` if it cannot be used.

    Raises:
        ValueError: If a prompt cannot be used, or the column is missing.
    """
    if isinstance(prompts, Dataset) and "prompt" not in prompts.column_names:
        raise ValueError(f"prompts needs a column 'prompt'; it has {sorted(prompts.column_names)}.")
    rows = plain_rows(prompts) if isinstance(prompts, Dataset) else [{"prompt": prompt} for prompt in prompts]

    def collate(rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            if _is_blank(row["prompt"]):
                raise ValueError(f"The prompt {row['prompt']!r} has no tokens to continue. Remove it.")
            read(plain_prompt(row["prompt"]))

    check = RowCheck({"prompt": PROMPT}, read=lambda row: plain_prompt(row["prompt"]), collate=collate)
    check_rows("prompts", rows, check)
    return [plain_prompt(row["prompt"]) for row in rows]


def _check_list_text(value: Any) -> None:
    """Raise `ValueError` if a text is a list that a CSV file has turned into text."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return
    parsed = _parse_list(value)
    if parsed and all(isinstance(entry, dict) and "role" in entry for entry in parsed):
        raise ValueError(
            f"The value is the text of a list, not a list: {value[:80]!r}. A CSV file cannot hold lists: load JSON "
            "lines or Parquet, or convert the column with dataset.map and ast.literal_eval."
        )


def _parse_list(text: str) -> list[Any] | None:
    """Return the list that JSON, Python or NumPy has written as a text, or `None`."""
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(text.strip().replace("}\n {", "}, {"))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return parsed if isinstance(parsed, list) else None
    return None


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _is_plain(table: pa.Table, check: RowCheck) -> bool:
    return all(column.is_plain(_array(table[name])) for name, column in check.columns.items()
               if name in table.column_names) and check.is_plain(table)  # fmt: skip


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


# Texts and messages


def _is_text(array: pa.Array) -> bool:
    return bool(pa.types.is_string(array.type) or pa.types.is_large_string(array.type))


def _is_list(array: pa.Array) -> bool:
    return bool(pa.types.is_list(array.type) or pa.types.is_large_list(array.type))


def _are_filled_lists(array: pa.Array) -> bool:
    """Return whether all values are lists with at least one entry."""
    return _is_list(array) and not array.null_count and not _any(pc.equal(pc.list_value_length(array), 0))


def _any(mask: pa.Array) -> bool:
    return bool(pc.any(mask).as_py())


def _plain_texts(array: pa.Array) -> bool:
    return _is_text(array) and not array.null_count and not _any(pc.match_substring_regex(array, _LIST_TEXT))


def _plain_messages(array: pa.Array) -> bool:
    """Return whether all values are non-empty lists of messages with a role and a text."""
    if not _are_filled_lists(array):
        return False
    messages = pc.list_flatten(array)
    if not pa.types.is_struct(messages.type) or messages.null_count:
        return False
    fields = {field.name for field in messages.type}
    if not {"role", "content"} <= fields:
        return False
    role, content = pc.struct_field(messages, "role"), pc.struct_field(messages, "content")
    if not _is_text(role) or role.null_count or content.null_count:
        return False
    return _is_text(content) or _plain_parts(content)


def _plain_parts(array: pa.Array) -> bool:
    """Return whether all values are non-empty lists of text parts."""
    if not _are_filled_lists(array):
        return False
    parts = pc.list_flatten(array)
    if not pa.types.is_struct(parts.type) or parts.null_count:
        return False
    if not {"type", "text"} <= {field.name for field in parts.type}:
        return False
    kind, text = pc.struct_field(parts, "type"), pc.struct_field(parts, "text")
    return (
        _is_text(kind) and _is_text(text) and not kind.null_count and not text.null_count
        and not _any(pc.not_equal(kind, "text"))
    )  # fmt: skip


def _plain_prompts(array: pa.Array) -> bool:
    if _is_text(array):
        return _plain_texts(array) and not _any(pc.equal(pc.utf8_trim_whitespace(array), ""))
    return _plain_messages(array)


def _plain_completions(array: pa.Array) -> bool:
    if _is_text(array):
        return _plain_texts(array)
    return _plain_messages(array) and not _any(pc.not_equal(pc.list_value_length(array), 1))


def _plain_completion_lists(array: pa.Array) -> bool:
    if not _are_filled_lists(array):
        return False
    return _plain_completions(pc.list_flatten(array))


def _plain_integers(array: pa.Array) -> bool:
    return pa.types.is_integer(array.type) and not array.null_count


def _plain_numbers(array: pa.Array) -> bool:
    if array.null_count or not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        return False
    return not _any(pc.invert(pc.is_finite(array)))


def _read_completions(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"Completions must be a list of at least one completion, got {value!r}.")
    return [completion_text(completion) for completion in value]


def _read_number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"Values must be finite numbers, got {value!r}.")
    return value


def _anything(value: Any) -> Any:
    return value


PROMPT = Column(plain_prompt, _plain_prompts)
COMPLETION = Column(completion_text, _plain_completions)
COMPLETIONS = Column(_read_completions, _plain_completion_lists)
RANKS = Column(
    _anything,
    lambda array: _is_list(array) and not array.null_count and _plain_integers(pc.list_flatten(array))
    and not _any(pc.less(pc.list_flatten(array), -1)),
)  # fmt: skip
REWARDS = Column(
    _anything, lambda array: _is_list(array) and not array.null_count and _plain_numbers(pc.list_flatten(array))
)
NUMBER = Column(_read_number, _plain_numbers)


# What columns have in common


def equally_long(*names: str) -> Callable[[pa.Table], bool]:
    """Return a function that checks whether lists in several columns of a table are equally long in each row."""

    def check(table: pa.Table) -> bool:
        lengths = [pc.list_value_length(_array(table[name])) for name in names if name in table.column_names]
        return all(lengths[0].equals(other) for other in lengths[1:])

    return check


def read_pair_without_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a preference pair whose prompt is the common beginning; see `ranked_row`.

    Raises:
        ValueError: If there is no common beginning, or no end of it.
    """
    if row["chosen"] == row["rejected"] and isinstance(row["chosen"], str):
        raise ValueError("'chosen' and 'rejected' are equal, so the prompt has no end. Remove the row.")
    if not preference_pair(row)["prompt"]:
        raise ValueError(
            "'chosen' and 'rejected' have no common beginning to use as the prompt. Add a column 'prompt'."
        )
    return ranked_row(row)


def share_a_prompt(table: pa.Table) -> bool:
    """Return whether `read_pair_without_prompt` is certain to accept all rows."""
    chosen, rejected = _array(table["chosen"]), _array(table["rejected"])
    if chosen.type != rejected.type:
        return False
    if _is_text(chosen):
        # TRL moves a space at the end of the prompt to the completions, so one common character can be too few.
        start = [pc.utf8_slice_codeunits(array, 0, 2) for array in (chosen, rejected)]
        return (
            not _any(pc.not_equal(*start))
            and not _any(pc.less(pc.utf8_length(start[0]), 2))
            and not _any(pc.equal(chosen, rejected))
        )
    lengths = pc.list_value_length(chosen)
    if not lengths.equals(pc.list_value_length(rejected)) or _any(pc.less(lengths, 2)):
        return False
    last = np.cumsum(lengths.to_numpy()) - 1
    differs = np.zeros(last[-1] + 1, dtype=bool)
    for name in ("role", "content"):
        sides = [pc.struct_field(pc.list_flatten(array), name) for array in (chosen, rejected)]
        if not _is_text(sides[0]):
            return False
        differs |= pc.not_equal(*sides).to_numpy(zero_copy_only=False)
    return bool(differs.sum() == differs[last].sum())


def _new_roles(column: pa.ChunkedArray, known: set[str]) -> Iterable[int]:
    """Yield the first row of each sequence of roles that is not known yet."""
    array = _array(column)
    if not _plain_messages(array):
        return
    lengths = pc.list_value_length(array).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    roles = pc.struct_field(pc.list_flatten(array), "role").cast(pa.string())
    sequences = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), roles), " ")
    for sequence in pc.unique(sequences).to_pylist():
        if sequence not in known:
            known.add(sequence)
            yield pc.index(sequences, sequence).as_py()


def _longest(column: pa.ChunkedArray) -> list[tuple[int, int]]:
    """Return the lengths in bytes and the offsets of the longest texts of a batch."""
    array = _array(column)
    if _is_text(array):
        lengths = pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    elif _plain_messages(array) and _is_text(content := pc.struct_field(pc.list_flatten(array), "content")):
        ends = np.cumsum(pc.list_value_length(array).to_numpy())
        total = np.concatenate([[0], np.cumsum(pc.binary_length(content).to_numpy().astype(np.int64))])
        lengths = np.diff(total[np.concatenate([[0], ends])])
    else:
        return []
    number = min(_NUM_LONGEST, len(lengths))
    offsets = np.argpartition(lengths, -number)[-number:]
    return [(int(lengths[offset]), int(offset)) for offset in offsets]


def pair_check(
    first_row: Mapping[str, Any], collate: Callable[[Sequence[Mapping[str, Any]]], Any], collate_longest: bool = False
) -> RowCheck:
    """Return how to check preference pairs in the format of the first one."""
    if has_whole_conversations(first_row):
        return RowCheck(
            {"chosen": PROMPT, "rejected": PROMPT},
            read=read_pair_without_prompt,
            collate=collate,
            is_plain=share_a_prompt,
            dialogue="chosen",
            collate_longest=collate_longest,
        )
    columns = {"prompt": PROMPT, "chosen": COMPLETION, "rejected": COMPLETION}
    return RowCheck(columns, read=ranked_row, collate=collate, collate_longest=collate_longest)
