"""`LLMRanker` over HTTP on loopback: refused parameters, threads, limits and closing."""

import gc
import threading
import time

import pytest

from cyclealign_trl.chat import client
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.errors import RankerError
from cyclealign_trl.rankers.llm import LLMRanker
from cyclealign_trl.types import RankingRequest
from tests.rankers.llm_stubs import COMPLETIONS, REQUEST, RIGHT, ConcurrencyMeter, error, judge

pytestmark = pytest.mark.usefixtures("llm_environment")


# Parameters that an endpoint refuses


def refusing(find_refused, describe=None):
    """Answer with HTTP 400 while `find_refused` returns the name of a parameter in the body, and else rank."""

    def respond(body):
        refused = find_refused(body)
        return error(400, **(describe(refused) if describe else {})) if refused else judge(body)

    return respond


def has_schema(body):
    return "response_format" if body.get("response_format", {}).get("type") == "json_schema" else None


REFUSALS = {
    "temperature": lambda body: "temperature" if "temperature" in body else None,
    "seed": lambda body: "seed" if "seed" in body else None,
    "max_tokens": lambda body: "max_tokens" if "max_tokens" in body else None,
    "json_schema": has_schema,
    "response_format": lambda body: "response_format" if "response_format" in body else None,
    "all": lambda body: next(
        (name for name in ("max_tokens", "temperature", "seed", "response_format") if name in body), None
    ),
}
DESCRIPTIONS = {
    "param": lambda name: {"message": "Unsupported.", "param": name},
    "message": lambda name: {"message": f"Unsupported parameter: '{name}'."},
}


@pytest.mark.parametrize("describe", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
@pytest.mark.parametrize("find_refused", REFUSALS.values(), ids=REFUSALS)
def test_drops_a_refused_parameter_and_warns_once(serve, caplog, find_refused, describe):
    ranker, endpoint = serve(refusing(find_refused, describe))
    [outcome] = ranker.rank([REQUEST])
    assert outcome.order == RIGHT
    negotiated = len(endpoint.requests)
    assert outcome.usage.attempts == negotiated > 1
    others = [RankingRequest(f"Question {index}?", COMPLETIONS) for index in range(4)]
    assert all(outcome.order == RIGHT for outcome in ranker.rank(others))
    assert len(endpoint.requests) == negotiated + 4
    accepted = endpoint.requests[-1]
    # No other parameter was dropped.
    assert (accepted.keys() & {"temperature", "seed"}) == {
        name for name in ("temperature", "seed") if find_refused({name: 0}) is None
    }
    assert accepted.get("max_tokens", accepted.get("max_completion_tokens")) == 1024
    warnings = [record.getMessage() for record in caplog.records if record.name == client.__name__]
    assert len(warnings) == 1
    assert endpoint.base_url in warnings[0]


@pytest.mark.parametrize(
    "find_refused", [REFUSALS[name] for name in ("temperature", "seed", "max_tokens", "json_schema")]
)
def test_tries_one_parameter_at_a_time_if_the_refusal_names_none(serve, find_refused):
    ranker, endpoint = serve(refusing(find_refused))
    assert ranker.rank([REQUEST])[0].order == RIGHT
    assert len(endpoint.requests) <= 5
    first, accepted = endpoint.requests[0], endpoint.requests[-1]
    changed = {name for name in first.keys() | accepted.keys() if first.get(name) != accepted.get(name)}
    assert len(changed - {"max_completion_tokens"}) == 1


def test_finds_the_refused_parameter_despite_a_misleading_message(serve):
    ranker, _ = serve(refusing(REFUSALS["seed"], lambda _: {"message": "Bad request near 'temperature'."}))
    assert ranker.rank([REQUEST])[0].order == RIGHT


def test_concurrent_first_calls_agree_on_a_dialect(serve, caplog):
    ranker, _ = serve(refusing(REFUSALS["all"], DESCRIPTIONS["param"]))
    requests = [RankingRequest(f"Question {index}?", COMPLETIONS) for index in range(16)]
    assert all(outcome.order == RIGHT for outcome in ranker.rank(requests))
    assert len([record for record in caplog.records if record.name == client.__name__]) == 1


def test_does_not_remember_a_dialect_that_never_worked(serve):
    ranker, endpoint = serve(lambda body: error(400) if "failing" in str(body) else judge(body))
    with pytest.raises(RankerError):
        ranker.rank([RankingRequest("failing", COMPLETIONS)])
    assert ranker.rank([REQUEST])[0].order == RIGHT
    assert endpoint.requests[-1].keys() == endpoint.requests[0].keys()


# Threads, limits, closing


def test_limits_calls_in_flight_over_all_threads(serve):
    respond = ConcurrencyMeter(delay=0.05)
    ranker, _ = serve(respond, max_concurrency=3)
    results = []

    def work(thread):
        requests = [RankingRequest(f"Question {thread} {index}?", COMPLETIONS) for index in range(6)]
        results.extend(ranker.rank(requests))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.order for outcome in results] == [RIGHT] * 18
    assert respond.peak == 3


def test_backoff_does_not_occupy_a_slot(serve, monkeypatch):
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.0)
    replies = iter([Reply(status=429, headers={"Retry-After": "1"})])
    ranker, _ = serve(
        lambda body: (next(replies, None) if "slow" in str(body) else None) or judge(body), max_concurrency=1
    )
    arrived = [position for position, _ in ranker.stream([RankingRequest("slow", COMPLETIONS), REQUEST])]
    assert arrived == [1, 0]


def test_closing_ends_open_calls(serve):
    ranker, endpoint = serve([Reply(delay=30.0)])
    errors = []

    def work():
        try:
            ranker.rank([REQUEST])
        except RankerError as caught:
            errors.append(str(caught))

    thread = threading.Thread(target=work)
    thread.start()
    while not endpoint.requests:
        time.sleep(0.01)
    ranker.close()
    thread.join(5)
    assert not thread.is_alive()
    assert "closed" in errors[0]
    ranker.close()
    with pytest.raises(RankerError, match="closed"):
        ranker.rank([REQUEST])


def test_garbage_collection_ends_the_thread():
    before = set(threading.enumerate())  # an earlier test's ranker may still be referenced
    with LoopbackEndpoint(judge) as endpoint:
        ranker = LLMRanker("a-model", endpoint.base_url)
        assert ranker.rank([REQUEST])[0].order == RIGHT
        assert any(thread.name == "cyclealign-chat" for thread in set(threading.enumerate()) - before)
        del ranker
        deadline = time.monotonic() + 30
        while any(thread.name == "cyclealign-chat" for thread in set(threading.enumerate()) - before):
            assert time.monotonic() < deadline
            time.sleep(0.01)
            gc.collect()  # the last task can be part of a reference cycle
