"""Answers that were paid for, in SQLite: texts under keys, each kept from the moment it arrives."""

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

_APPLICATION_ID = 0x43414C4E  # "CALN": tells our databases from anybody else's
_SCHEMA_VERSION = 1
_BUSY_TIMEOUT = 30.0  # seconds


def digest(value: object) -> bytes:
    """A hash that is the same on every machine and in every process, unlike `hash`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()


class AnswerStore:
    """Texts under keys, in a database of its own and in view of others. Any number of threads may use it.

    Args:
        path: The database; made where it is missing.
        also_read: Databases to look into as well, such as those of the other processes of a run. Nothing is added to
            them, and files that do not exist are passed over.

    Raises:
        RankerError: If a file is no database of this class, or is damaged.
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
        """Yields what the databases hold under the key, the own one first."""
        for database in self._databases:
            value = database.get(key)
            if value is not None:
                yield value

    def put(self, key: str, value: str) -> None:
        """Stores a text, in place of what was under the key before."""
        self._own.put(key, value)

    def close(self) -> None:
        """Closes the databases."""
        for database in self._databases:
            database.close()


class _Database:
    """One file of keys and values, safe to share between threads.

    It keeps SQLite's rollback journal: the write-ahead log needs shared memory, which network disks do not give.
    """

    def __init__(self, path: Path, *, query_only: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        # A file left by a process that was killed may first have to be rolled back, which SQLite refuses to do for
        # `mode=ro`: `query_only` forbids everything but that.
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
        """Checks that the file is ours, or makes it ours if it is new. Returns whether it is new and to stay so."""
        if query_only:
            self._connection.execute("PRAGMA query_only = ON")
        else:
            # Two processes may both find the file new: one of them waits here, and then finds it made.
            self._connection.execute("BEGIN IMMEDIATE")
        new = self._pragma("schema_version") == 0
        if not new and (self._pragma("application_id"), self._pragma("user_version")) != (
            _APPLICATION_ID,
            _SCHEMA_VERSION,
        ):
            raise sqlite3.DatabaseError("it was written by another program, or by another version of this one")
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
                "another path; answers stored there are then paid for again."
            ) from error
