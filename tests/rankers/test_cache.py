"""`CachedRanker`: what is stored, keys, passes, damaged databases, threads and processes."""

import json
import multiprocessing
import os
import shutil
import sqlite3
import threading
from dataclasses import replace

import pytest

from cyclealign_trl.errors import RankerError
from cyclealign_trl.rankers.base import StreamingRanker
from cyclealign_trl.rankers.cache import CachedRanker
from cyclealign_trl.types import Demonstration, RankingFailure, RankingRequest, RankingResult, Trimmed, Usage


class CountingRanker:
    """Rank in reverse order, record the prompts, and fail for those in `failing`."""

    def __init__(self, fingerprint="one", failing=()):
        self.fingerprint = fingerprint
        self.failing = list(failing)
        self.asked = []

    def rank(self, requests):
        self.asked += [request.prompt for request in requests]
        return [self.answer(request) for request in requests]

    def answer(self, request):
        usage = Usage(prompt_tokens=10, completion_tokens=2, cost=0.5, attempts=2)
        if request.prompt in self.failing:
            return RankingFailure("timeout", usage=usage)
        order = tuple(reversed(range(len(request.completions))))
        return RankingResult(order, ranks=order, improved_completion="Better \u2013 \ud83d.", usage=usage)


class StreamingCountingRanker(CountingRanker):
    """Stream outcomes, the last request first, and raise after `max_answers` of them."""

    max_answers = 99

    def stream(self, requests):
        for count, (position, request) in enumerate(reversed(list(enumerate(requests)))):
            if count == self.max_answers:
                raise RankerError("the key expired")
            self.asked.append(request.prompt)
            yield position, self.answer(request)


def make_requests(*prompts, **fields):
    return [RankingRequest(prompt, ("a", "b", "c"), **fields) for prompt in prompts]


@pytest.fixture
def cached(tmp_path):
    """Create rankers with a cache, and close them after the test."""
    opened = []

    def make(ranker, name="rankings-0.sqlite", also_read=()):
        opened.append(CachedRanker(ranker, tmp_path / name, [tmp_path / other for other in also_read]))
        return opened[-1]

    yield make
    for ranker in opened:
        ranker.close()


@pytest.mark.parametrize("make", [CountingRanker, StreamingCountingRanker])
def test_stores_a_ranking(cached, make):
    inner = make()
    [first] = cached(inner).rank(make_requests("x"))
    [again] = cached(inner).rank(make_requests("x"))
    assert inner.asked == ["x"]
    assert not first.usage.cached
    assert again.usage == Usage(prompt_tokens=10, completion_tokens=2, cost=0.5, attempts=2, cached=True)
    assert (again.order, again.ranks, again.improved_completion) == (
        first.order,
        first.ranks,
        first.improved_completion,
    )


@pytest.mark.parametrize("make", [CountingRanker, StreamingCountingRanker])
def test_ranks_only_missing_requests_and_keeps_the_order(cached, make):
    inner = make()
    ranker = cached(inner)
    ranker.rank(make_requests("b"))
    requests = [RankingRequest(name, ("1", "2", "3", "4")[:count]) for name, count in (("a", 2), ("c", 4))]
    outcomes = ranker.rank([requests[0], *make_requests("b"), requests[1]])
    assert [len(outcome.order) for outcome in outcomes] == [2, 3, 4]
    assert [outcome.usage.cached for outcome in outcomes] == [False, True, False]
    assert sorted(inner.asked) == ["a", "b", "c"]


def test_sends_equal_requests_of_one_call_once(cached):
    inner = CountingRanker(failing=["bad"])
    outcomes = cached(inner).rank(make_requests("x", "bad", "x", "bad"))
    assert inner.asked == ["x", "bad"]
    assert [outcome.usage is not None and not outcome.usage.cached for outcome in outcomes] == [
        True,
        True,
        False,
        False,
    ]
    assert outcomes[0].order == outcomes[2].order
    assert outcomes[3].reason == "timeout"


def test_does_not_store_failures(cached):
    inner = CountingRanker(failing=["x"])
    ranker = cached(inner)
    assert ranker.rank(make_requests("x"))[0].reason == "timeout"
    inner.failing.clear()
    assert ranker.rank(make_requests("x"))[0].order == (2, 1, 0)


class ThreePassRanker(StreamingCountingRanker):
    """Make three passes, with the reverse ranking in the second one."""

    num_passes = 3

    def answer(self, request):
        order = super().answer(request).order
        usage = Usage(10, 2, cost=0.5)
        if (request.prompt, request.pass_index) in self.failing:
            return RankingFailure("timeout", usage=usage)
        return RankingResult(order if request.pass_index != 1 else order[::-1], usage=usage)


def test_stores_each_pass(cached):
    inner = ThreePassRanker(failing=[("x", 0), ("x", 2)])
    ranker = cached(inner)
    failed, ranked = ranker.rank(make_requests("x", "y"))
    assert (failed.reason, failed.usage.attempts) == ("timeout", 3)
    assert (ranked.ranks, ranked.consistency, ranked.usage.cost) == ((2, 1, 0), pytest.approx(-1 / 3), 1.5)
    inner.failing.clear()
    inner.asked.clear()
    [retried] = ranker.rank(make_requests("x"))
    assert inner.asked == ["x", "x"]
    assert retried.ranks == (2, 1, 0)
    assert retried.usage == Usage(20, 4, cost=1.0, attempts=2)  # without the stored pass
    [stored] = ranker.rank(make_requests("x"))
    assert len(inner.asked) == 2
    assert stored.usage == Usage(30, 6, cost=1.5, attempts=3, cached=True)


def test_stored_passes_survive_a_crash(cached):
    inner = ThreePassRanker()
    inner.max_answers = 4
    with pytest.raises(RankerError, match="expired"):
        cached(inner).rank(make_requests("x", "y"))
    assert inner.asked == ["y", "y", "y", "x"]
    inner.max_answers = 99
    outcomes = cached(inner).rank(make_requests("x", "y"))
    assert inner.asked[4:] == ["x", "x"]
    assert [outcome.usage.cached for outcome in outcomes] == [False, True]


def test_stores_all_fields_of_a_ranking(cached):
    inner = CountingRanker()
    complete = RankingResult((1, 0, 2), consistency=0.5, trimmed=Trimmed(demonstrations=1), usage=Usage())
    inner.answer = lambda request: complete
    ranker = cached(inner)
    ranker.rank(make_requests("x"))
    assert ranker.rank(make_requests("x")) == [replace(complete, usage=Usage(cached=True))]


def test_different_requests_have_different_keys(cached):
    inner = CountingRanker()
    ranker = cached(inner)
    demonstrations = [Demonstration("d", ("a", "b"), order) for order in ((0, 1), (1, 0))]
    requests = [
        *make_requests("x"),
        *make_requests("y"),
        *make_requests([{"role": "user", "content": "x"}]),
        *(make_requests("x", demonstrations=(demonstration,))[0] for demonstration in demonstrations),
        *make_requests("x", metadata={"answer": 1}),
        *make_requests("x", metadata={"answer": {"set of objects"}}),
        *make_requests("x", num_static=1),
        *make_requests("x", pass_index=1),
        RankingRequest("x", ("b", "a", "c")),
        RankingRequest("x", ("a", "b")),
    ]
    ranker.rank(requests)
    assert len(inner.asked) == len(requests)
    ranker.rank(requests)
    assert len(inner.asked) == len(requests)
    inner.fingerprint = "two"
    ranker.rank(requests)
    assert len(inner.asked) == 2 * len(requests)


def test_stores_each_outcome_when_it_arrives(cached):
    inner = StreamingCountingRanker()
    ranker = cached(inner)
    assert isinstance(ranker, StreamingRanker)
    stream = ranker.stream(make_requests("a", "b", "c"))
    assert next(stream)[0] == 2
    assert next(cached(inner).stream(make_requests("c")))[1].usage.cached

    inner.max_answers = 1
    with pytest.raises(RankerError, match="expired"):
        ranker.rank(make_requests("d", "e"))
    inner.asked.clear()
    inner.max_answers = 99
    ranker.rank(make_requests("d", "e"))
    assert inner.asked == ["d"]


def test_reads_other_databases_without_changing_them(cached, tmp_path):
    cached(CountingRanker(), "rankings-1.sqlite").rank(make_requests("x"))
    (tmp_path / "rankings-2.sqlite").touch()  # as left by a process that was killed early
    before = (tmp_path / "rankings-1.sqlite").read_bytes()
    inner = CountingRanker()
    ranker = cached(inner, also_read=[f"rankings-{index}.sqlite" for index in range(4)])
    assert ranker.rank(make_requests("x", "y"))[0].usage.cached
    assert inner.asked == ["y"]
    assert (tmp_path / "rankings-1.sqlite").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [f"rankings-{index}.sqlite" for index in range(3)]


def test_reads_a_database_whose_process_was_killed_during_a_commit(cached, tmp_path):
    cached(CountingRanker(), "live.sqlite").rank(make_requests("x"))
    connection = sqlite3.connect(tmp_path / "live.sqlite", isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN")
    for index in range(300):  # enough to spill to the file, so that only the journal can undo it
        connection.execute("INSERT INTO rankings VALUES (?, ?)", (str(index), "x" * 1000))
    for suffix in ("", "-journal"):
        shutil.copy(tmp_path / f"live.sqlite{suffix}", tmp_path / f"killed.sqlite{suffix}")
    connection.close()
    inner = CountingRanker()
    assert cached(inner, also_read=["killed.sqlite"]).rank(make_requests("x"))[0].usage.cached
    assert inner.asked == []


def test_does_not_use_a_write_ahead_log(cached, tmp_path):
    cached(CountingRanker()).rank(make_requests("x"))
    connection = sqlite3.connect(tmp_path / "rankings-0.sqlite")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()


@pytest.mark.parametrize(
    "value",
    [
        "not JSON",
        "[]",
        "{}",
        json.dumps({"order": [0, 0, 1], "ranks": None, "improved_completion": None, "usage": None}),
        json.dumps({"order": [0, 1], "ranks": None, "improved_completion": None, "usage": None}),
        json.dumps({"order": [0.0, 1, 2], "ranks": None, "improved_completion": None, "usage": None}),
        json.dumps({"order": [0, 1, 2], "ranks": [0], "improved_completion": None, "usage": None}),
        json.dumps({"order": [0, 1, 2], "ranks": ["0", 1, 2], "improved_completion": None, "usage": None}),
        json.dumps({"order": [0, 1, 2], "ranks": None, "improved_completion": None, "usage": {"price": 1}}),
        json.dumps(
            {"order": [0, 1, 2], "ranks": None, "improved_completion": None, "usage": None, "trimmed": {"x": 1}}
        ),
    ],
)
def test_ranks_again_if_a_stored_row_is_invalid(cached, tmp_path, value):
    inner = CountingRanker()
    cached(inner).rank(make_requests("x"))
    connection = sqlite3.connect(tmp_path / "rankings-0.sqlite", isolation_level=None)
    connection.execute("UPDATE rankings SET value = ?", (value,))
    connection.close()
    ranker = cached(inner)
    assert ranker.rank(make_requests("x"))[0].order == (2, 1, 0)
    assert inner.asked == ["x", "x"]
    assert ranker.rank(make_requests("x"))[0].usage.cached


def write_text(path):
    path.write_text("These are not the bytes of a database. " * 100)


def write_foreign(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE rankings (key TEXT, value TEXT)")
    connection.commit()
    connection.close()


def write_newer(path):
    CachedRanker(CountingRanker(), path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


@pytest.mark.parametrize("write", [write_text, write_foreign, write_newer])
@pytest.mark.parametrize("role", ["own", "also read"])
def test_a_foreign_file_raises_and_is_not_changed(cached, tmp_path, write, role):
    path = tmp_path / "taken.sqlite"
    write(path)
    before = path.read_bytes()
    files = {"name": "taken.sqlite"} if role == "own" else {"also_read": ["taken.sqlite"]}
    with pytest.raises(RankerError, match=r"taken\.sqlite cannot be used: .* move it away"):
        cached(CountingRanker(), **files)
    assert path.read_bytes() == before


def test_a_database_that_is_damaged_later_raises(cached, tmp_path):
    ranker = cached(CountingRanker())
    ranker.rank(make_requests("x"))
    write_text(tmp_path / "rankings-0.sqlite")
    with pytest.raises(RankerError, match="move it away"):
        ranker.rank(make_requests("y"))


def test_creates_missing_folders_and_accepts_special_characters(cached):
    ranker = cached(CountingRanker(), "runs/50% done? #1.sqlite")
    ranker.rank(make_requests("x"))
    assert ranker.rank(make_requests("x"))[0].usage.cached


@pytest.mark.parametrize("fingerprint", [None, ""])
def test_a_ranker_without_a_fingerprint_raises(tmp_path, fingerprint):
    with pytest.raises(ValueError, match="fingerprint"):
        CachedRanker(CountingRanker(fingerprint), tmp_path / "rankings.sqlite")
    assert os.listdir(tmp_path) == []


def test_has_the_fingerprint_of_the_ranker(cached):
    assert cached(CountingRanker("mine")).fingerprint == "mine"


def test_threads_can_share_a_cache(cached):
    inner = CountingRanker()
    ranker = cached(inner)
    outcomes = []

    def work(thread):
        prompts = [str((thread + index) % 16) for index in range(16)]
        outcomes.extend(ranker.rank(make_requests(*prompts)))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 128
    assert {outcome.order for outcome in outcomes} == {(2, 1, 0)}


def open_and_rank(path, prompt):
    ranker = CachedRanker(CountingRanker(), path)
    ranker.rank(make_requests(*(f"{prompt} {index}" for index in range(20))))
    ranker.close()


def test_processes_can_create_and_share_a_database(cached, tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=open_and_rank, args=(tmp_path / "rankings-0.sqlite", name)) for name in ("p", "q")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    inner = CountingRanker()
    cached(inner).rank(make_requests(*(f"{name} {index}" for name in ("p", "q") for index in range(20))))
    assert inner.asked == []
