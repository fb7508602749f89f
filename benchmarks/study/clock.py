"""Seconds of a block of code, over all starts of a command."""

from __future__ import annotations

import time
from pathlib import Path


class Clock:
    """Add up the seconds that a block takes over all starts, except those that were killed.

    Args:
        path: File of the seconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.total = 0.0

    def __enter__(self) -> Clock:
        self._start = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        before = float(self._path.read_text("utf-8")) if self._path.exists() else 0.0
        self.total = before + time.monotonic() - self._start
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(str(self.total), encoding="utf-8")
