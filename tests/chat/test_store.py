"""`AnswerStore` alone. `tests/rankers/test_cache.py` tests it with rankings."""

import gc
import os
import signal
import sqlite3
import warnings
from contextlib import closing, nullcontext

import pytest

from cyclealign_trl.chat import store as store_module
from cyclealign_trl.chat.store import AnswerStore, digest
from cyclealign_trl.errors import RankerError
from cyclealign_trl.rankers.cache import with_cache
from cyclealign_trl.rankers.function import FunctionRanker


def test_the_own_answer_comes_first(tmp_path):
    with closing(AnswerStore(tmp_path / "other.sqlite")) as other:
        other.put("key", "theirs")
    with closing(AnswerStore(tmp_path / "own.sqlite", [tmp_path / "other.sqlite", tmp_path / "none.sqlite"])) as store:
        assert list(store.find("key")) == ["theirs"]
        store.put("key", "ours")
        store.put("key", "ours, later")
        assert list(store.find("key")) == ["ours, later", "theirs"]
        assert list(store.find("another")) == []


def test_a_digest_depends_only_on_the_content():
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


# Databases that cannot be written


@pytest.fixture
def short_timeouts(monkeypatch):
    monkeypatch.setattr(store_module, "_BUSY_TIMEOUT", 0.2)
    monkeypatch.setattr(store_module, "_RETRY_TIMEOUT", 0.01)


def read(path):
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT key, value FROM rankings"))


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
@pytest.mark.parametrize("end", ["put", "close", "garbage collection"])
def test_a_locked_database_loses_no_answer(tmp_path, caplog, lock, end):
    path = tmp_path / "answers.sqlite"
    store = AnswerStore(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(lock)
        for key in "abc":
            store.put(key, f"{key} paid")
        if lock == "BEGIN IMMEDIATE":
            assert list(store.find("b")) == ["b paid"]
        other.execute("COMMIT")
    [record] = caplog.records
    assert "kept in memory" in record.getMessage()
    if end == "put":
        store.put("d", "d paid")
        assert read(path).keys() == set("abcd")
    elif end == "close":
        store.close()
    else:
        del store
        gc.collect()
    assert read(path).items() >= {"a": "a paid", "b": "b paid", "c": "c paid"}.items()


@pytest.mark.usefixtures("short_timeouts")
def test_answers_that_are_lost_at_the_end_are_counted(tmp_path, caplog):
    path = tmp_path / "answers.sqlite"
    store = AnswerStore(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.put("a", "paid")
        store.put("b", "paid")
        store.close()
    assert "2 answers could not be stored" in caplog.text


@pytest.mark.parametrize("also_read", [False, True])
def test_another_writer_is_reported_once(tmp_path, caplog, also_read):
    """Two runs in one folder do not see each other's answers in time."""
    path = tmp_path / "answers.sqlite"
    others = [tmp_path / "other.sqlite"] if also_read else []
    with closing(AnswerStore(path, others)) as first, closing(AnswerStore(path, others)) as second:
        for index in range(3):
            first.put(f"{index}", "paid")
            second.put(f"{index}", "paid")
        records = [record.getMessage() for record in caplog.records]
    assert len(records) == 2  # one in each run
    assert all("paid for twice" in record and str(path) in record for record in records)


def test_reading_the_file_of_another_process_is_not_reported(tmp_path, caplog):
    with (
        closing(AnswerStore(tmp_path / "a.sqlite")) as first,
        closing(AnswerStore(tmp_path / "b.sqlite", [tmp_path / "a.sqlite"])) as second,
    ):
        first.put("1", "paid")
        second.put("2", "paid")
        first.put("3", "paid")
        assert list(second.find("3")) == ["paid"]
    assert not caplog.records


def parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "answers.sqlite"


def ancestor_is_a_file(tmp_path):
    return parent_is_a_file(tmp_path).parent / "deeper" / "answers.sqlite"


def path_is_a_folder(tmp_path):
    (tmp_path / "answers.sqlite").mkdir()
    return tmp_path / "answers.sqlite"


def name_is_too_long(tmp_path):
    return tmp_path / ("x" * 300) / "answers.sqlite"


@pytest.mark.parametrize("make", [parent_is_a_file, ancestor_is_a_file, path_is_a_folder, name_is_too_long])
def test_an_impossible_path_raises_with_the_path(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(RankerError, match=r"cache .*cannot be") as caught:
        AnswerStore(path)
    assert str(path.parent) in str(caught.value)


def test_a_folder_of_a_run_that_is_a_file_raises(tmp_path):
    (tmp_path / "out").write_text("")
    ranker = FunctionRanker([len])
    ranker.fingerprint = "x"
    with pytest.raises(RankerError, match="cannot be created"):
        with_cache(ranker, tmp_path / "out", 0)


# Forks


def in_child(act):
    """Fork, run a function in the child, and return what it returns (a text)."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in a process with threads
        process = os.fork()
    if process == 0:
        signal.alarm(20)  # a child that hangs is killed
        try:
            os.write(writer, act().encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(process, 0)
    return text


@pytest.mark.parametrize("locked", [False, True])
def test_a_child_opens_the_database_again(tmp_path, locked):
    path = tmp_path / "answers.sqlite"
    with closing(AnswerStore(path)) as store:
        store.put("a", "of the parent")

        def act():
            store.put("b", "of the child")
            return next(store.find("a"))

        with store._own._lock if locked else nullcontext():  # held by another thread during the fork
            assert in_child(act) == "of the parent"
        store.put("c", "of the parent")
        assert read(path).keys() == set("abc")
