"""`LLMRanker` after a fork, and copies of it."""

import copy
import multiprocessing
import pickle
import threading
import warnings
from contextlib import closing

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from cyclealign_trl.demo.loopback import LoopbackEndpoint
from cyclealign_trl.rankers.cache import CachedRanker
from cyclealign_trl.rankers.llm import LLMRanker
from cyclealign_trl.types import RankingRequest
from tests.chat.test_store import in_child
from tests.rankers.llm_stubs import COMPLETIONS, KEY, REQUEST, RIGHT, judge

pytestmark = [pytest.mark.usefixtures("llm_environment"), pytest.mark.timeout(90)]


def number_of(ranker, text):
    return str(ranker.rank([RankingRequest(text, COMPLETIONS)])[0].order)


# Forks


@pytest.mark.parametrize("used", [False, True])
def test_a_child_can_rank(serve, used):
    ranker, _ = serve(judge)
    if used:
        ranker.rank([REQUEST])
    assert in_child(lambda: number_of(ranker, "in the child")) == str(RIGHT)
    assert in_child(lambda: in_child(lambda: number_of(ranker, "in its child"))) == str(RIGHT)
    assert number_of(ranker, "in the parent") == str(RIGHT)


def test_a_child_can_rank_while_the_parent_waits_for_answers(serve):
    """The child inherits open calls, reservations and, possibly, locks that are held."""
    arrived, release = threading.Event(), threading.Event()

    def respond(body):
        if "slow" in str(body):
            arrived.set()
            release.wait(30)
        return judge(body)

    ranker, _ = serve(respond, max_concurrency=1, prices={"input": 1.0, "output": 1.0}, max_run_tokens=2500)
    thread = threading.Thread(target=ranker.rank, args=([RankingRequest("slow", COMPLETIONS)],))
    thread.start()
    arrived.wait(10)
    with ranker.budget._lock:
        answer = in_child(lambda: number_of(ranker, "in the child"))
    release.set()
    thread.join()
    assert answer == str(RIGHT)


def test_a_child_of_a_closed_ranker_stays_closed(serve):
    ranker, _ = serve(judge)
    ranker.rank([REQUEST])
    ranker.close()
    assert "closed" in in_child(lambda: number_of(ranker, "in the child"))


def test_a_child_can_use_a_cached_ranker(serve, tmp_path):
    ranker, endpoint = serve(judge)
    with closing(CachedRanker(ranker, tmp_path / "rankings.sqlite")) as cached:
        cached.rank([REQUEST])
        assert in_child(lambda: number_of(cached, REQUEST.prompt)) == str(RIGHT)
        assert in_child(lambda: number_of(cached, "in the child")) == str(RIGHT)
        assert number_of(cached, "in the child") == str(RIGHT)
    assert len(endpoint.requests) == 2


def test_a_child_that_exits_does_not_disturb_the_parent(serve):
    ranker, _ = serve(judge)
    ranker.rank([REQUEST])
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=ranker.close)
        process.start()
    process.join(20)
    assert process.exitcode == 0
    assert number_of(ranker, "in the parent") == str(RIGHT)


def test_workers_of_a_data_loader_can_rank(serve):
    ranker, _ = serve(judge)
    ranker.rank([REQUEST])

    def collate(indices):
        return [number_of(ranker, f"Question {index}?") for index in indices]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        batches = list(DataLoader(range(4), batch_size=2, num_workers=2, collate_fn=collate, timeout=30))
    assert batches == [[str(RIGHT)] * 2] * 2


def test_a_map_with_two_processes_can_rank(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ranker, _ = serve(judge, api_key=None)
    ranker.rank([REQUEST])
    rows = Dataset.from_dict({"prompt": [f"Question {index}?" for index in range(4)]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mapped = rows.map(lambda row: {"order": number_of(ranker, row["prompt"])}, num_proc=2)
    assert mapped["order"] == [str(RIGHT)] * 4


# Copies


def through_pickle(ranker):
    return pickle.loads(pickle.dumps(ranker))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_ranks_as_the_original(serve, duplicate, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ranker, endpoint = serve(
        judge, api_key=None, required_key=KEY, seed=5, temperature=0.5, extra_body={"top_k": 3}, num_passes=2
    )
    ranker.rank([REQUEST])
    with closing(duplicate(ranker)) as copied, closing(CachedRanker(ranker, tmp_path / "a.sqlite")) as cached:
        assert copied.fingerprint == ranker.fingerprint
        assert copied.rank([REQUEST])[0].order == RIGHT
        with closing(duplicate(cached)) as copied_cache:
            cached.rank([REQUEST])
            assert copied_cache.rank([REQUEST])[0].usage.cached
        assert cached._ranker is ranker
    assert len(endpoint.requests) == 6
    assert endpoint.requests[0] == endpoint.requests[2] or endpoint.requests[0] == endpoint.requests[3]
    assert ranker.rank([REQUEST])[0].order == RIGHT  # closing the copy does not close the original


def test_a_deepcopy_keeps_the_key(serve):
    ranker, _ = serve(judge, required_key=KEY)
    with closing(copy.deepcopy(ranker)) as copied:
        assert copied.rank([REQUEST])[0].order == RIGHT


class Subclass(LLMRanker):
    pass


def test_a_subclass_keeps_its_state(monkeypatch):
    with LoopbackEndpoint(judge) as endpoint:
        ranker = Subclass("a-model", endpoint.base_url)
        ranker.note = "own"
        for copied in (copy.deepcopy(ranker), through_pickle(ranker)):
            assert (type(copied), copied.note, copied.rank([REQUEST])[0].order) == (Subclass, "own", RIGHT)
            copied.close()


@pytest.mark.parametrize("options", [{"api_key": KEY}, {"extra_headers": {"X-Gateway": KEY}}])
def test_a_ranker_with_secrets_says_why_it_cannot_be_pickled(options):
    ranker = LLMRanker("a-model", "http://127.0.0.1:1/v1", **options)
    with pytest.raises(TypeError, match=r"secrets.*OPENAI_API_KEY"):
        pickle.dumps(ranker)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "options", [{"max_run_tokens": 9}, {"max_cost": 1.0, "prices": {"input": 1.0, "output": 1.0}}]
)
def test_a_ranker_with_a_cap_says_why_it_cannot_be_copied(duplicate, options):
    ranker = LLMRanker("a-model", "http://127.0.0.1:1/v1", **options)
    with pytest.raises(TypeError, match="each copy could spend as much"):
        duplicate(ranker)


def test_a_pickle_does_not_contain_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ranker = LLMRanker("a-model", "http://127.0.0.1:1/v1")
    assert KEY.encode() not in pickle.dumps(ranker)
