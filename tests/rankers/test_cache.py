"""Answers that are paid for once."""

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
    """Ranks in reverse, tells what it was asked, and fails for the prompts in `failing`."""

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


class Streaming(CountingRanker):
    """Answers one by one, the last request first, and dies after `survives` answers."""

    survives = 99

    def stream(self, requests):
        for count, (position, request) in enumerate(reversed(list(enumerate(requests)))):
            if count == self.survives:
                raise RankerError("the key expired")
            self.asked.append(request.prompt)
            yield position, self.answer(request)


def ask(*prompts, **fields):
    return [RankingRequest(prompt, ("a", "b", "c"), **fields) for prompt in prompts]


@pytest.fixture
def cached(tmp_path):
    """Makes rankers with a cache, and closes them after the test."""
    opened = []

    def make(ranker, name="rankings-0.sqlite", also_read=()):
        opened.append(CachedRanker(ranker, tmp_path / name, [tmp_path / other for other in also_read]))
        return opened[-1]

    yield make
    for ranker in opened:
        ranker.close()


@pytest.mark.parametrize("make", [CountingRanker, Streaming])
def test_an_answer_is_paid_for_once(cached, make):
    inner = make()
    [first] = cached(inner).rank(ask("x"))
    [again] = cached(inner).rank(ask("x"))
    assert inner.asked == ["x"]
    assert not first.usage.cached
    assert again.usage == Usage(prompt_tokens=10, completion_tokens=2, cost=0.5, attempts=2, cached=True)
    assert (again.order, again.ranks, again.improved_completion) == (
        first.order,
        first.ranks,
        first.improved_completion,
    )


@pytest.mark.parametrize("make", [CountingRanker, Streaming])
def test_only_what_is_missing_is_asked_and_the_order_is_kept(cached, make):
    inner = make()
    ranker = cached(inner)
    ranker.rank(ask("b"))
    requests = [RankingRequest(name, ("1", "2", "3", "4")[:count]) for name, count in (("a", 2), ("c", 4))]
    outcomes = ranker.rank([requests[0], *ask("b"), requests[1]])
    assert [len(outcome.order) for outcome in outcomes] == [2, 3, 4]
    assert [outcome.usage.cached for outcome in outcomes] == [False, True, False]
    assert sorted(inner.asked) == ["a", "b", "c"]


def test_equal_requests_of_one_call_are_sent_once_and_paid_for_once(cached):
    inner = CountingRanker(failing=["bad"])
    outcomes = cached(inner).rank(ask("x", "bad", "x", "bad"))
    assert inner.asked == ["x", "bad"]
    assert [outcome.usage is not None and not outcome.usage.cached for outcome in outcomes] == [
        True,
        True,
        False,
        False,
    ]
    assert outcomes[0].order == outcomes[2].order
    assert outcomes[3].reason == "timeout"


def test_failures_are_not_stored(cached):
    inner = CountingRanker(failing=["x"])
    ranker = cached(inner)
    assert ranker.rank(ask("x"))[0].reason == "timeout"
    inner.failing.clear()
    assert ranker.rank(ask("x"))[0].order == (2, 1, 0)


class InPasses(Streaming):
    """Makes three passes, one by one; odd ones see the completions the other way round."""

    num_passes = 3

    def answer(self, request):
        order = super().answer(request).order
        usage = Usage(10, 2, cost=0.5)
        if (request.prompt, request.pass_index) in self.failing:
            return RankingFailure("timeout", usage=usage)
        return RankingResult(order if request.pass_index != 1 else order[::-1], usage=usage)


def test_each_pass_is_stored_by_itself(cached):
    inner = InPasses(failing=[("x", 0), ("x", 2)])
    ranker = cached(inner)
    failed, ranked = ranker.rank(ask("x", "y"))
    assert (failed.reason, failed.usage.attempts) == ("timeout", 3)
    assert (ranked.ranks, ranked.consistency, ranked.usage.cost) == ((2, 1, 0), pytest.approx(-1 / 3), 1.5)
    inner.failing.clear()
    inner.asked.clear()
    [mended] = ranker.rank(ask("x"))
    assert inner.asked == ["x", "x"]
    assert mended.ranks == (2, 1, 0)
    assert mended.usage == Usage(20, 4, cost=1.0, attempts=2)  # what was paid now
    [stored] = ranker.rank(ask("x"))
    assert len(inner.asked) == 2
    assert stored.usage == Usage(30, 6, cost=1.5, attempts=3, cached=True)


def test_passes_that_were_paid_for_survive_a_crash(cached):
    inner = InPasses()
    inner.survives = 4
    with pytest.raises(RankerError, match="expired"):
        cached(inner).rank(ask("x", "y"))
    assert inner.asked == ["y", "y", "y", "x"]
    inner.survives = 99
    outcomes = cached(inner).rank(ask("x", "y"))
    assert inner.asked[4:] == ["x", "x"]
    assert [outcome.usage.cached for outcome in outcomes] == [False, True]


def test_a_stored_answer_is_whole(cached):
    inner = CountingRanker()
    whole = RankingResult((1, 0, 2), consistency=0.5, trimmed=Trimmed(demonstrations=1), usage=Usage())
    inner.answer = lambda request: whole
    ranker = cached(inner)
    ranker.rank(ask("x"))
    assert ranker.rank(ask("x")) == [replace(whole, usage=Usage(cached=True))]


def test_whatever_tells_requests_apart_tells_keys_apart(cached):
    inner = CountingRanker()
    ranker = cached(inner)
    demonstrations = [Demonstration("d", ("a", "b"), order) for order in ((0, 1), (1, 0))]
    requests = [
        *ask("x"),
        *ask("y"),
        *ask([{"role": "user", "content": "x"}]),
        *(ask("x", demonstrations=(demonstration,))[0] for demonstration in demonstrations),
        *ask("x", metadata={"answer": 1}),
        *ask("x", metadata={"answer": {"set of objects"}}),
        *ask("x", num_static=1),
        *ask("x", pass_index=1),
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


def test_each_answer_is_stored_the_moment_it_arrives(cached):
    inner = Streaming()
    ranker = cached(inner)
    assert isinstance(ranker, StreamingRanker)
    stream = ranker.stream(ask("a", "b", "c"))
    assert next(stream)[0] == 2
    assert next(cached(inner).stream(ask("c")))[1].usage.cached

    inner.survives = 1
    with pytest.raises(RankerError, match="expired"):
        ranker.rank(ask("d", "e"))
    inner.asked.clear()
    inner.survives = 99
    ranker.rank(ask("d", "e"))
    assert inner.asked == ["d"]


def test_other_databases_are_read_and_left_alone(cached, tmp_path):
    cached(CountingRanker(), "rankings-1.sqlite").rank(ask("x"))
    (tmp_path / "rankings-2.sqlite").touch()  # its process was killed early
    before = (tmp_path / "rankings-1.sqlite").read_bytes()
    inner = CountingRanker()
    ranker = cached(inner, also_read=[f"rankings-{index}.sqlite" for index in range(4)])
    assert ranker.rank(ask("x", "y"))[0].usage.cached
    assert inner.asked == ["y"]
    assert (tmp_path / "rankings-1.sqlite").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [f"rankings-{index}.sqlite" for index in range(3)]


def test_a_database_whose_process_was_killed_in_a_commit_can_be_read(cached, tmp_path):
    cached(CountingRanker(), "live.sqlite").rank(ask("x"))
    connection = sqlite3.connect(tmp_path / "live.sqlite", isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN")
    for index in range(300):  # enough to spill, so that the journal is needed to undo it
        connection.execute("INSERT INTO rankings VALUES (?, ?)", (str(index), "x" * 1000))
    for suffix in ("", "-journal"):
        shutil.copy(tmp_path / f"live.sqlite{suffix}", tmp_path / f"killed.sqlite{suffix}")
    connection.close()
    inner = CountingRanker()
    assert cached(inner, also_read=["killed.sqlite"]).rank(ask("x"))[0].usage.cached
    assert inner.asked == []


def test_no_write_ahead_log_is_kept(cached, tmp_path):
    cached(CountingRanker()).rank(ask("x"))
    connection = sqlite3.connect(tmp_path / "rankings-0.sqlite")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()


@pytest.mark.parametrize(
    "value",
    [
        "no JSON",
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
def test_a_stored_row_that_does_not_fit_is_asked_anew(cached, tmp_path, value):
    inner = CountingRanker()
    cached(inner).rank(ask("x"))
    connection = sqlite3.connect(tmp_path / "rankings-0.sqlite", isolation_level=None)
    connection.execute("UPDATE rankings SET value = ?", (value,))
    connection.close()
    ranker = cached(inner)
    assert ranker.rank(ask("x"))[0].order == (2, 1, 0)
    assert inner.asked == ["x", "x"]
    assert ranker.rank(ask("x"))[0].usage.cached


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
def test_a_file_that_is_none_of_ours_is_refused_untouched(cached, tmp_path, write, role):
    path = tmp_path / "taken.sqlite"
    write(path)
    before = path.read_bytes()
    files = {"name": "taken.sqlite"} if role == "own" else {"also_read": ["taken.sqlite"]}
    with pytest.raises(RankerError, match=r"taken\.sqlite cannot be used: .* move it away"):
        cached(CountingRanker(), **files)
    assert path.read_bytes() == before


def test_a_database_damaged_under_way_is_refused(cached, tmp_path):
    ranker = cached(CountingRanker())
    ranker.rank(ask("x"))
    write_text(tmp_path / "rankings-0.sqlite")
    with pytest.raises(RankerError, match="move it away"):
        ranker.rank(ask("y"))


def test_missing_folders_and_odd_names_are_fine(cached):
    ranker = cached(CountingRanker(), "runs/50% done? #1.sqlite")
    ranker.rank(ask("x"))
    assert ranker.rank(ask("x"))[0].usage.cached


@pytest.mark.parametrize("fingerprint", [None, ""])
def test_without_a_fingerprint_there_is_no_cache(tmp_path, fingerprint):
    with pytest.raises(ValueError, match="fingerprint"):
        CachedRanker(CountingRanker(fingerprint), tmp_path / "rankings.sqlite")
    assert os.listdir(tmp_path) == []


def test_the_fingerprint_is_the_rankers(cached):
    assert cached(CountingRanker("mine")).fingerprint == "mine"


def test_many_threads_share_one_cache(cached):
    inner = CountingRanker()
    ranker = cached(inner)
    outcomes = []

    def work(thread):
        prompts = [str((thread + index) % 16) for index in range(16)]
        outcomes.extend(ranker.rank(ask(*prompts)))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 128
    assert {outcome.order for outcome in outcomes} == {(2, 1, 0)}


def open_and_rank(path, prompt):
    ranker = CachedRanker(CountingRanker(), path)
    ranker.rank(ask(*(f"{prompt} {index}" for index in range(20))))
    ranker.close()


def test_several_processes_may_make_and_use_one_database(cached, tmp_path):
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
    cached(inner).rank(ask(*(f"{name} {index}" for name in ("p", "q") for index in range(20))))
    assert inner.asked == []
