"""Persistent store of paid answers: texts by key in SQLite, each committed as it arrives."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .._warnings import OnceLogger
from ..errors import RankerError
from . import forks

logger = logging.getLogger(__name__)

_APPLICATION_ID = 0x43414C4E  # "CALN", marks our databases
_SCHEMA_VERSION = 1
_BUSY_TIMEOUT = 30.0  # seconds
_RETRY_TIMEOUT = 0.1  # seconds, for answers that could not be stored within the first timeout
# Another process holds a lock, or the disk is full, read-only or out of reach.
_TEMPORARY = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
)  # fmt: skip
_PUT = "INSERT OR REPLACE INTO rankings VALUES (?, ?)"


def digest(value: object) -> bytes:
    """Hash a JSON-like value. Unlike `hash`, the result is the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()


class AnswerStore:
    """Texts by key, in one database that is written and others that are only read. Safe to use from any thread.

    If a text cannot be written, because another process locks the database or the disk is full, it is kept in memory
    and written later.

    Args:
        path: Path of the database, created if missing.
        also_read: Paths of databases to read as well, such as those of the other processes of a run. Missing files
            are skipped.

    Raises:
        RankerError: If a file is not a database of this class, or is damaged.
    """

    def __init__(self, path: str | PathLike[str], also_read: Sequence[str | PathLike[str]] = ()) -> None:
        self.path = Path(path)
        self._also_read = tuple(also_read)
        others = [other for other in map(Path, also_read) if other.resolve() != self.path.resolve() and other.exists()]
        make_folder(self.path.parent)
        self._own = _Database(self.path)
        self._databases = [self._own]
        try:
            self._databases += [_Database(other, query_only=True) for other in others]
        except RankerError:
            self.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._also_read)

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
    """One SQLite file of keys and values, safe to share between threads, and to use after a fork.

    It uses SQLite's rollback journal, because a write-ahead log needs shared memory, which network disks lack.
    """

    def __init__(self, path: Path, *, query_only: bool = False) -> None:
        self.path = path
        self._query_only = query_only
        self._once = OnceLogger(logger)
        self._unwritten: dict[str, str] = {}
        self._lock = threading.Lock()
        self._open()
        forks.register(self)

    def _open(self) -> None:
        self._stale = self._hurried = False
        # The file of a killed process may need a rollback first, which SQLite refuses with `mode=ro`. `query_only`
        # forbids all other writes.
        mode = "rw" if self._query_only else "rwc"
        with self._errors():
            self._connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=_BUSY_TIMEOUT,
                isolation_level=None,  # every statement is committed at once
                check_same_thread=False,
            )
        try:
            with self._errors():
                self._empty = self._prepare(self._query_only)
                self._version = self._pragma("data_version")
        except RankerError:
            self._connection.close()
            raise
        self._finalizer = weakref.finalize(self, _close, self._connection, self._unwritten, self.path)

    def rebuild_after_fork(self) -> None:
        """Open the file again: SQLite forbids the use of a connection of the parent."""
        self._finalizer.detach()
        forks.keep(self._connection, self._lock)
        self._unwritten = {}  # the parent writes them
        self._stale = True
        self._lock = threading.Lock()

    def get(self, key: str) -> str | None:
        with self._lock, self._errors():
            self._reopen_after_fork()
            if self._empty:
                return None
            if key in self._unwritten:
                return self._unwritten[key]
            row = self._connection.execute("SELECT value FROM rankings WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, value: str) -> None:
        with self._lock, self._errors():
            self._reopen_after_fork()
            self._unwritten[key] = value
            self._write_unwritten()

    def close(self) -> None:
        with self._lock:
            self._finalizer()

    def _reopen_after_fork(self) -> None:
        if self._stale:
            self._open()

    def _set_timeout(self, seconds: float) -> None:
        self._connection.execute(f"PRAGMA busy_timeout = {round(1000 * seconds)}")

    def _write_unwritten(self) -> None:
        """Write the texts that are kept in memory, or wait for the next call if that is not possible now."""
        try:
            self._warn_of_other_writers()
            for key, value in list(self._unwritten.items()):
                self._connection.execute(_PUT, (key, value))
                del self._unwritten[key]
            if self._hurried:
                self._set_timeout(_BUSY_TIMEOUT)
                self._hurried = False
        except sqlite3.OperationalError as error:
            if not _is_temporary(error):
                raise
            self._set_timeout(_RETRY_TIMEOUT)
            self._hurried = True
            self._once.warning(
                "unwritten",
                "An answer cannot be stored in %s now: %s. It is kept in memory and stored as soon as possible. If "
                "another program uses the file, end it.",
                self.path,
                str(error),  # the exception would keep this object alive
            )

    def _warn_of_other_writers(self) -> None:
        version = self._pragma("data_version")  # changes only if another connection writes
        if version != self._version:
            self._version = version
            self._once.warning(
                "writers",
                "Another process stores answers in %s at the same time. Answers that both need are paid for twice. "
                "Stop one of them, or use a folder for each.",
                self.path,
            )

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


def make_folder(folder: Path) -> None:
    """Create the folder of a database if it is missing.

    Raises:
        RankerError: If it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RankerError(
            f"The folder {folder} of the cache cannot be created: {error.strerror}. Choose another folder."
        ) from None


def _is_temporary(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _TEMPORARY


def _close(connection: sqlite3.Connection, unwritten: dict[str, str], path: Path) -> None:
    """Write what is kept in memory, and close the connection."""
    try:
        if unwritten:
            connection.execute(f"PRAGMA busy_timeout = {round(1000 * _BUSY_TIMEOUT)}")
            connection.executemany(_PUT, unwritten.items())
    except sqlite3.Error as error:
        logger.error("%d answers could not be stored in %s, and are lost: %s.", len(unwritten), path, error)
    finally:
        connection.close()
