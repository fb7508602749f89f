"""What was spent, line by line, where a crash cannot lose it."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from ..types import Usage

_FIELDS = tuple(field.name for field in fields(Usage) if field.name != "cached")


class Ledger:
    """Appends one line of JSON per call to `process-R.jsonl`.

    A line is handed to the operating system before the next call can follow, so a process that is killed loses none.

    Args:
        folder: Where the ledgers of a run are; made where it is missing.
        process_index: This process, R.
        num_processes: Processes of the run.
    """

    def __init__(self, folder: str | PathLike[str], process_index: int, num_processes: int) -> None:
        self._folder = Path(folder)
        self._process_index = process_index
        self._num_processes = num_processes
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"process-{process_index}.jsonl"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":  # the machine died in the middle of a line
            os.write(self._file, b"\n")

    def write(self, usage: Usage) -> None:
        """Adds what one call took."""
        line = json.dumps({name: getattr(usage, name) for name in _FIELDS}) + "\n"
        os.write(self._file, line.encode())

    def read(self) -> Iterator[Usage]:
        """Yields what stands in this process's ledger, and in its part of those that processes of old left."""
        for path in self._folder.glob("process-*.jsonl"):
            index = path.stem.removeprefix("process-")
            if index.isdecimal() and self._is_ours(int(index)):
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    usage = _parse(line)
                    if usage is not None:
                        yield usage

    def _is_ours(self, index: int) -> bool:
        is_of_old = index >= self._num_processes
        return index == self._process_index or (is_of_old and index % self._num_processes == self._process_index)


def _parse(line: str) -> Usage | None:
    """The entry in a line; `None` where it was not written to its end."""
    try:
        entry: dict[str, Any] = json.loads(line)
        return Usage(**{name: entry[name] for name in _FIELDS})
    except (ValueError, TypeError, KeyError):
        return None
