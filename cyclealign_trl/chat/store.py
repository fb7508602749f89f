"""Persistent store of paid answers: texts by key in SQLite, each committed as it arrives."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

from ..errors import RankerError

_APPLICATION_ID = 0x43414C4E  # "CALN", marks our databases
_SCHEMA_VERSION = 1
_BUSY_TIMEOUT = 30.0  # seconds


def digest(value: object) -> bytes:
    """Hash a JSON-like value. Unlike `hash`, the result is the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()


class AnswerStore:
    """Texts by key, in one database that is written and others that are only read. Safe to use from any thread.

    Args:
        path: Path of the database, created if missing.
        also_read: Paths of databases to read as well, such as those of the other processes of a run. Missing files
            are skipped.

    Raises:
        RankerError: If a file is not a database of this class, or is damaged.
    """

    def __init__(self, path: str | PathLike[str], also_read: Sequence[str | PathLike[str]] = ()) -> None:
        self.path = Path(path)
        others = [other for other in map(Path, also_read) if other.resolve() != self.path.resolve() and other.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._own = _Database(self.path)
        self._databases = [self._own]
        try:
            self._databases += [_Database(other, query_only=True) for other in others]
        except RankerError:
            self.close()
            raise

    def find(self, key: str) -> Iterator[str]:
        """Yield the texts stored under a key, the one of the own database first."""
        for database in self._databases:
            value = database.get(key)
            if value is not None:
                yield value

    def put(self, key: str, value: str) -> None:
        """Store a text under a key, replacing the previous one."""
        self._own.put(key, value)

    def close(self) -> None:
        """Close the databases."""
        for database in self._databases:
            database.close()


class _Database:
    """One SQLite file of keys and values, safe to share between threads.

    It uses SQLite's rollback journal, because a write-ahead log needs shared memory, which network disks lack.
    """

    def __init__(self, path: Path, *, query_only: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        # The file of a killed process may need a rollback first, which SQLite refuses with `mode=ro`. `query_only`
        # forbids all other writes.
        mode = "rw" if query_only else "rwc"
        with self._errors():
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=_BUSY_TIMEOUT,
                isolation_level=None,  # every statement is committed at once
                check_same_thread=False,
            )
        try:
            with self._errors():
                self._empty = self._prepare(query_only)
        except RankerError:
            self._connection.close()
            raise

    def get(self, key: str) -> str | None:
        if self._empty:
            return None
        with self._lock, self._errors():
            row = self._connection.execute("SELECT value FROM rankings WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, value: str) -> None:
        with self._lock, self._errors():
            self._connection.execute("INSERT OR REPLACE INTO rankings VALUES (?, ?)", (key, value))

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _prepare(self, query_only: bool) -> bool:
        """Check that the file is ours, or initialise it if it is new. Return whether it is new and stays empty."""
        if query_only:
            self._connection.execute("PRAGMA query_only = ON")
        else:
            # If two processes open a new file at once, the second one waits here until the first has created it.
            self._connection.execute("BEGIN IMMEDIATE")
        new = self._pragma("schema_version") == 0
        if not new and (self._pragma("application_id"), self._pragma("user_version")) != (
            _APPLICATION_ID,
            _SCHEMA_VERSION,
        ):
            raise sqlite3.DatabaseError("it was written by another program or by another version of this one")
        if query_only:
            return new
        if new:
            self._connection.execute("CREATE TABLE rankings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        self._connection.execute("COMMIT")
        return False

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RankerError(
                f"The cache {self.path} cannot be used: {error}. If it is damaged or not ours, move it away or choose "
                "another path. The answers stored in it are then paid for again."
            ) from error
