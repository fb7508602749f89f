"""Record of what a run has spent, one line per call, that survives a crash."""

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
    """Append-only file `process-R.jsonl` with one line of JSON per call.

    Each line is handed to the operating system before the next call starts, so a killed process loses none.

    Args:
        folder: Folder of the run's ledgers, created if missing.
        process_index: Index R of this process.
        num_processes: Number of processes in the run.
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
        if size and os.pread(self._file, 1, size - 1) != b"\n":  # the machine went down during a write
            os.write(self._file, b"\n")

    def write(self, usage: Usage) -> None:
        """Append the usage of one call."""
        line = json.dumps({name: getattr(usage, name) for name in _FIELDS}) + "\n"
        os.write(self._file, line.encode())

    def read(self) -> Iterator[Usage]:
        """Yield the entries of this process, and of its share of the ledgers of processes that no longer exist."""
        for path in self._folder.glob("process-*.jsonl"):
            index = path.stem.removeprefix("process-")
            if index.isdecimal() and self._owns(int(index)):
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    usage = _parse(line)
                    if usage is not None:
                        yield usage

    def _owns(self, index: int) -> bool:
        left_over = index >= self._num_processes
        return index == self._process_index or (left_over and index % self._num_processes == self._process_index)


def _parse(line: str) -> Usage | None:
    """Parse an entry. Return `None` for a line that was not completely written."""
    try:
        entry: dict[str, Any] = json.loads(line)
        return Usage(**{name: entry[name] for name in _FIELDS})
    except (ValueError, TypeError, KeyError):
        return None
