"""The Parquet files of the interaction log: their names, which of them holds a step, and merging small ones.

Each process writes one file per step, and merges its files of 32 steps into one, 32 of those into a larger one, and so
on. A file of fewer steps is never older than a file of more steps that covers them: the parts of a merged file equal
it, until a resumed run replays a step. So the file of the fewest steps holds a step, whatever a crash has left.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .._files import atomic_write

FAN_IN = 32
"""Number of files that are merged into one. Blocks of other sizes would overlap with those of existing logs."""
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?-(\d+)\.parquet")
_ROW_GROUP = 1024  # rows; readers hold one group in memory


@dataclass(frozen=True, slots=True)
class LogFile:
    """A file with the interactions of one process in the steps from `first` to `last`."""

    path: Path
    first: int
    last: int
    process_index: int

    @classmethod
    def of_steps(cls, folder: Path, first: int, last: int, process_index: int) -> LogFile:
        """Return the file of some steps, which need not exist."""
        steps = f"{first:06d}" if first == last else f"{first:06d}-{last:06d}"
        return cls(folder / f"step-{steps}-{process_index}.parquet", first, last, process_index)

    @classmethod
    def from_path(cls, path: Path) -> LogFile | None:
        """Return the file at a path, or `None` if it is not named like a file of the log."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        first, last, process_index = match.groups()
        return cls(path, int(first), int(last or first), int(process_index))


def list_files(folder: Path, process_index: int) -> list[LogFile]:
    """List the files of one process."""
    files = map(LogFile.from_path, folder.glob(f"step-*-{process_index}.parquet"))
    return [file for file in files if file is not None and file.process_index == process_index]


def read_files(paths: Iterable[Path], columns: Sequence[str] | None = None) -> pa.Table:
    """Read files of all processes by step, each step once. A file with another name is read as it is, before these.

    Args:
        paths: The files, at least one.
        columns: Columns to read. `None` reads all.
    """
    with_step = None if columns is None else list(dict.fromkeys([*columns, "step"]))
    files: dict[int, list[LogFile]] = {}
    tables: list[pa.Table] = []
    for path in paths:
        if (file := LogFile.from_path(path)) is None:
            tables.append(_open(path).read(with_step))
        else:
            files.setdefault(file.process_index, []).append(file)
    parts = {index: _read_in_order(own, with_step) for index, own in sorted(files.items())}
    if len(parts) == 1:
        tables += next(iter(parts.values()))
    else:
        steps = ((step, index, part) for index, own in parts.items() for table in own for step, part in _split(table))
        tables += [part for *_, part in sorted(steps, key=lambda entry: entry[:2])]
    table = pa.concat_tables(tables)
    return table if columns is None else table.select(list(columns))


def merge_full_block(folder: Path, step: int, process_index: int) -> None:
    """Merge the files of a process whose block of 32, 1,024, ... steps ends with a step. Other steps merge nothing.

    The merged file appears when it is complete, and its parts are deleted afterwards: a crash in between leaves both.
    """
    size = 1
    while (step + 1) % (size * FAN_IN) == 0:
        size *= FAN_IN
    if size == 1:
        return
    merged = LogFile.of_steps(folder, step + 1 - size, step, process_index)
    own = list_files(folder, process_index)
    parts = [file for file in own if merged.first <= file.first and file.last <= merged.last and file != merged]
    schemas = [_open(file.path).schema_arrow for file in [*parts, *(file for file in own if file == merged)]]
    if not all(schema.equals(schemas[0]) for schema in schemas):
        return  # an earlier version of the package wrote some of them
    with atomic_write(merged.path) as temporary:
        with pq.ParquetWriter(temporary, schemas[0]) as writer:
            for table in _in_groups(_read_in_order(own, None, merged.first, merged.last)):
                writer.write_table(table)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a power failure must not lose what is deleted below
    for part in parts:
        part.path.unlink()


def _read_in_order(
    files: Sequence[LogFile], columns: Sequence[str] | None, first: int = 0, last: int | None = None
) -> Iterator[pa.Table]:
    """Read the steps from `first` to `last` of one process, in order."""
    for start, end, file in _holders(files):
        start, end = max(start, first), end if last is None else min(end, last)
        if start > end:
            continue
        parquet = _open(file.path)
        for group in range(parquet.num_row_groups):
            statistics = parquet.metadata.row_group(group).column(0).statistics
            if statistics.max < start or statistics.min > end:
                continue
            table = parquet.read_row_group(group, columns)
            low, high = np.searchsorted(table["step"].to_numpy(), [start, end + 1])
            yield table.slice(low, high - low)


def _holders(files: Sequence[LogFile]) -> Iterator[tuple[int, int, LogFile]]:
    """Yield, in order, ranges of steps and the file that holds them: the one of the fewest steps.

    The steps of two files of a process are nested or disjoint.
    """
    position = 0
    around: list[LogFile] = []  # files that cover the position, the innermost last
    for file in sorted(files, key=lambda file: (file.first, -file.last)):
        while around and around[-1].last < file.first:
            yield position, around[-1].last, around[-1]
            position = around.pop().last + 1
        if around:
            yield position, file.first - 1, around[-1]
        around.append(file)
        position = file.first
    while around:
        yield position, around[-1].last, around[-1]
        position = around.pop().last + 1


def _split(table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """Split a table that is ordered by step into one part per step."""
    steps = table["step"].to_numpy()
    bounds = [0, *(np.flatnonzero(np.diff(steps)) + 1), len(steps)]
    for start, end in pairwise(bounds):
        if start < end:
            yield int(steps[start]), table.slice(start, end - start)


def _in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate small tables to about `_ROW_GROUP` rows."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= _ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _open(path: Path) -> Any:  # pyarrow.parquet.ParquetFile
    return pq.ParquetFile(path)
