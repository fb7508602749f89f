"""Prices, budgets and ledgers: alone, over HTTP, across processes and after a resume."""

import json
import threading

import pytest

from cyclealign_trl.chat import client
from cyclealign_trl.chat.budget import Amount, Budget, Prices, make_prices
from cyclealign_trl.chat.ledger import Ledger
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.rankers.cache import CachedRanker
from cyclealign_trl.rankers.llm import LLMRanker
from cyclealign_trl.types import RankingFailure, RankingRequest, RankingResult, Usage

PRICES = {"input": 1.0, "cached_input": 0.1, "output": 4.0}
CALL = Usage(800, 50)  # 0.001 dollars
# Reported usage of a request of 1.3 kB and its reply: 0.0005 dollars.
REPLY = Reply('{"ranking": ["A", "B"]}', usage={"prompt_tokens": 300, "completion_tokens": 50})


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)


def make_requests(num):
    return [RankingRequest(f"Question {index}?", ("a", "b")) for index in range(num)]


def spend(budget, num, usage=CALL):
    for _ in range(num):
        assert budget.reserve(usage)
        budget.settle(usage, usage)


# Prices


def test_cached_tokens_have_their_own_price():
    usage = Usage(prompt_tokens=1_000_000, cached_tokens=400_000, completion_tokens=500_000)
    assert Prices(1.0, 4.0, 0.1).cost(usage) == pytest.approx(0.6 + 0.04 + 2.0)
    assert Prices(1.0, 4.0).cost(usage) == pytest.approx(1.0 + 2.0)


@pytest.mark.parametrize(
    "prices", [{"input": 1.0}, {"input": 1.0, "output": 2.0, "image": 3.0}, {"input": -1.0, "output": 2.0}]
)
def test_invalid_prices_raise(prices):
    with pytest.raises(ValueError, match="per million tokens"):
        make_prices(prices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cost": 5.0}, "`max_cost`=5.0 needs the prices"),
        ({"max_cost": 0.0, "prices": PRICES}, "max_cost.*positive.*got 0.0"),
        ({"max_run_tokens": -1}, "max_run_tokens.*positive.*got -1"),
    ],
)
def test_invalid_caps_raise(options, message):
    with pytest.raises(ValueError, match=message):
        LLMRanker("judge", "http://127.0.0.1:1/v1", **options)


# Caps


def test_no_call_is_reserved_beyond_a_cap():
    budget = Budget(max_cost=0.0105, prices=make_prices(PRICES))
    spend(budget, 10)
    assert budget.reserve(CALL) is False
    assert budget.reserve(Usage(450)) is True
    assert budget.committed == pytest.approx(Amount(0.01045, 8950))
    assert str(budget) == "$0.01045 of max_cost=0.0105 and 8,950 tokens"


def test_unused_reservations_are_available_again():
    budget = Budget(max_tokens=2000)
    assert [budget.reserve(Usage(900)) for _ in range(3)] == [True, True, None]
    budget.settle(Usage(900), Usage(100))
    assert budget.reserve(Usage(900)) is True
    for _ in range(2):
        budget.settle(Usage(900), Usage(900))
    assert budget.reserve(Usage(900)) is False
    assert str(budget) == "1,900 of max_run_tokens=2,000 tokens"


def test_processes_share_the_rest_of_a_cap():
    budgets = [Budget(max_tokens=1000, num_processes=2) for _ in range(2)]
    assert [budget.reserve(Usage(501)) for budget in budgets] == [False, False]
    spend(budgets[0], 1, Usage(400))
    committed = [budget.committed for budget in budgets]
    for budget in budgets:
        budget.share_out(committed)
    # 600 tokens are left, 300 for each process.
    assert [budget.reserve(Usage(301)) for budget in budgets] == [False, False]
    assert [budget.reserve(Usage(300)) for budget in budgets] == [True, True]
    assert "700 of max_run_tokens" in str(budgets[0])


def test_many_threads_keep_to_a_cap():
    budget = Budget(max_tokens=5000)
    done = []

    def work():
        for _ in range(200):
            if budget.reserve(Usage(7)):
                budget.settle(Usage(7), Usage(5))
                done.append(5)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 4990 <= sum(done) == budget.committed.tokens <= 5000


# Ledgers


def test_spending_before_a_crash_counts(tmp_path):
    budget = Budget(max_tokens=10_000)
    spend(budget, 2)  # written to the ledger by `keep_ledger`
    budget.keep_ledger(tmp_path)
    spend(budget, 3)
    again = Budget(max_tokens=10_000)
    again.keep_ledger(tmp_path)
    assert again.committed.tokens == 5 * 850 == budget.committed.tokens
    assert [again.reserve(Usage(tokens)) for tokens in (10_000 - 4249, 10_000 - 4250)] == [False, True]


def test_an_incomplete_line_is_skipped(tmp_path):
    budget = Budget()
    budget.keep_ledger(tmp_path)
    spend(budget, 2)
    path = tmp_path / "process-0.jsonl"
    path.write_text(path.read_text()[:-20])
    again = Budget()
    again.keep_ledger(tmp_path)
    assert again.committed.tokens == 850
    spend(again, 1)
    last = Budget()
    last.keep_ledger(tmp_path)
    assert last.committed.tokens == 2 * 850


def test_each_ledger_of_a_run_with_more_processes_counts_once(tmp_path):
    for index in range(5):
        Ledger(tmp_path, index, 5).write(Usage(10**index))
    budgets = [Budget() for _ in range(2)]
    for index, budget in enumerate(budgets):
        budget.keep_ledger(tmp_path, index, 2)
    assert [budget.committed.tokens for budget in budgets] == [10101, 1010]


def test_prices_given_later_apply_to_earlier_spending(tmp_path):
    Budget().keep_ledger(tmp_path)
    unpriced = Budget()
    unpriced.keep_ledger(tmp_path)
    spend(unpriced, 3)
    assert json.loads((tmp_path / "process-0.jsonl").read_text().splitlines()[0])["cost"] is None
    priced = Budget(max_cost=1.0, prices=make_prices(PRICES))
    priced.keep_ledger(tmp_path)
    assert priced.committed.cost == pytest.approx(0.003)


# Over HTTP


def ask(respond, num, **options):
    """Return the outcomes, the ranker's budget and the number of calls at the endpoint."""
    with LoopbackEndpoint(respond if callable(respond) else lambda body: respond) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url, max_tokens=64, **options)
        outcomes = ranker.rank(make_requests(num))
        ranker.close()
    return outcomes, ranker.budget, len(endpoint.requests)


def test_the_endpoint_receives_no_call_beyond_the_cap():
    outcomes, budget, num_calls = ask(REPLY, 60, prices=PRICES, max_cost=0.0102)
    results = [outcome for outcome in outcomes if isinstance(outcome, RankingResult)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, RankingFailure)]
    assert {failure.reason for failure in failures} == {"budget_exhausted"}
    assert {failure.usage for failure in failures} == {None}
    assert "of max_cost=0.0102" in failures[0].detail
    assert 19 <= len(results) == num_calls <= 20
    assert budget.committed.cost == pytest.approx(len(results) * 0.0005)
    assert sum(result.usage.cost for result in results) == pytest.approx(budget.committed.cost)


def test_a_cap_on_tokens_limits_the_calls():
    outcomes, budget, num_calls = ask(REPLY, 30, max_run_tokens=3600)
    assert num_calls in (9, 10)
    assert budget.committed.tokens == num_calls * 350
    assert {outcome.usage.cost for outcome in outcomes if isinstance(outcome, RankingResult)} == {None}


def test_unexpectedly_long_calls_exceed_a_cap_only_by_those_in_flight():
    greedy = Reply('{"ranking": ["A", "B"]}', usage={"prompt_tokens": 5000, "completion_tokens": 50})
    _, budget, num_calls = ask(greedy, 60, max_run_tokens=20_000, max_concurrency=4)
    assert num_calls <= 4 + 4
    assert budget.committed.tokens == num_calls * 5050


def test_large_reservations_fail_no_call_that_the_cap_allows():
    # 32 calls in flight reserve 64 tokens for each reply, which has 1.
    reply = Reply('{"ranking": ["A", "B"]}', usage={"prompt_tokens": 300, "completion_tokens": 1})
    outcomes, _, _ = ask(reply, 64, max_run_tokens=64 * 301 + 400)
    assert all(isinstance(outcome, RankingResult) for outcome in outcomes)


def test_failed_calls_and_retries_count_if_they_are_billed():
    bad = Reply("no ranking", usage={"prompt_tokens": 800, "completion_tokens": 50})
    replies = iter([bad, Reply(status=500), REPLY])
    outcomes, budget, _ = ask(lambda body: next(replies), 1, prices=PRICES)
    assert (outcomes[0].usage.attempts, outcomes[0].usage.prompt_tokens) == (3, 1100)
    assert outcomes[0].usage.cost == pytest.approx(0.0015)
    assert budget.committed.cost == pytest.approx(0.0015)


def test_cached_input_counts_at_its_own_price():
    usage = {"prompt_tokens": 800, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 600}}
    [outcome], budget, _ = ask(Reply('{"ranking": ["A", "B"]}', usage=usage), 1, prices=PRICES)
    assert outcome.usage.cached_tokens == 600
    assert outcome.usage.cost == budget.committed.cost == pytest.approx((200 + 60 + 200) / 1e6)


def test_a_reported_cost_takes_precedence_over_the_prices():
    usage = {"prompt_tokens": 800, "completion_tokens": 50, "cost": 0.5}
    [outcome], budget, _ = ask(Reply('{"ranking": ["A", "B"]}', usage=usage), 1, prices=PRICES)
    assert outcome.usage.cost == 0.5 == budget.committed.cost


@pytest.mark.parametrize(
    ("reply", "options"),
    [
        (Reply(reset=True), {}),
        (Reply(delay=30.0), {"timeout": 0.3}),
        (Reply('{"ranking": ["A", "B"]}', usage={}), {}),
    ],
    ids=["reset", "timeout", "no usage"],
)
def test_calls_with_unknown_usage_count_as_expected(reply, options):
    [outcome], budget, _ = ask(reply, 1, prices=PRICES, max_retries=0, **options)
    assert outcome.usage.cost is None  # unknown
    assert budget.committed.cost > 0.0002


def test_a_call_that_never_reaches_the_endpoint_costs_nothing():
    ranker = LLMRanker("judge", "http://127.0.0.1:1/v1", prices=PRICES, max_retries=1)
    [outcome] = ranker.rank(make_requests(1))
    ranker.close()
    assert (outcome.reason, outcome.usage.cost) == ("connection", 0.0)
    assert ranker.budget.committed == Amount()


@pytest.mark.parametrize("usage", [{"prompt_tokens": "many"}, {"prompt_tokens": -5, "cost": float("nan")}, [1], "x"])
def test_an_invalid_usage_is_unknown(usage):
    reply = {"choices": [{"message": {"content": '{"ranking": ["A", "B"]}'}, "finish_reason": "stop"}], "usage": usage}
    [outcome], budget, _ = ask(Reply(body=json.dumps(reply)), 1, prices=PRICES)
    assert (outcome.usage.prompt_tokens, outcome.usage.cost) == (0, None)
    assert budget.committed.cost > 0


def test_a_cache_exposes_the_budget_of_its_ranker_and_cached_answers_are_free(tmp_path):
    with LoopbackEndpoint(lambda body: REPLY) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url, max_tokens=64, prices=PRICES, max_cost=0.0013)
        cached = CachedRanker(ranker, tmp_path / "rankings.sqlite")
        assert cached.budget is ranker.budget
        first = cached.rank(make_requests(2))
        again = cached.rank(make_requests(4))
        cached.close()
        ranker.close()
    assert [type(outcome).__name__ for outcome in first] == ["RankingResult"] * 2
    assert [getattr(outcome, "reason", None) for outcome in again] == [None, None, *["budget_exhausted"] * 2]


# What endpoints say about costs

TOKENS = {"prompt_tokens": 800, "completion_tokens": 50}  # 0.001 dollars at our prices
COSTS = {
    # usage, cost of the answer, amount that counts against the cap
    "nothing stated": ({}, 0.001, 0.001),
    "stated": ({"cost": 0.5}, 0.5, 0.5),
    "stated below our prices": ({"cost": 0.0004}, 0.0004, 0.001),
    "free": ({"cost": 0}, 0.0, 0.001),
    "own key": ({"cost": 0, "is_byok": True}, 0.001, 0.001),
    "own key with a fee": ({"cost": 0.00005, "is_byok": True}, 0.001, 0.001),
    "own key with a bill": (
        {"cost": 0, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.02}}, 0.02, 0.02
    ),
    "bill and fee": (
        {"cost": 0.001, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.02}}, 0.021, 0.021
    ),
    "bill without a flag": ({"cost": 0.001, "cost_details": {"upstream_inference_cost": 0.02}}, 0.021, 0.021),
    "bill outside of details": ({"cost": 0, "is_byok": True, "upstream_inference_cost": 0.02}, 0.02, 0.02),
    "the gateway's key": (
        {"cost": 0.02, "is_byok": False, "cost_details": {"upstream_inference_cost": 0.02}}, 0.02, 0.02
    ),
    "no bill": ({"cost": 0.5, "is_byok": False, "cost_details": {"upstream_inference_cost": None}}, 0.5, 0.5),
    "cost in parts": ({"cost": {"input_tokens_cost": 0.1, "total_cost": 0.3}}, 0.3, 0.3),
    "text": ({"cost": "0"}, 0.001, 0.001),
    "reasoning outside of the completion": ({"total_tokens": 1100}, 0.002, 0.002),
    "inconsistent total": ({"total_tokens": 3}, 0.001, 0.001),
}  # fmt: skip


@pytest.mark.parametrize(("stated", "cost", "counted"), COSTS.values(), ids=COSTS)
def test_the_larger_of_stated_and_priced_cost_counts_against_a_cap(tmp_path, stated, cost, counted):
    reply = Reply('{"ranking": ["A", "B"]}', usage={**TOKENS, **stated})
    outcomes, budget, _ = ask(reply, 2, prices=PRICES, max_cost=10.0)
    assert [outcome.usage.cost for outcome in outcomes] == pytest.approx([cost] * 2)
    assert budget.committed.cost == pytest.approx(2 * counted)
    budget.keep_ledger(tmp_path)
    assert budget.committed.cost == pytest.approx(2 * counted)


@pytest.mark.parametrize("stated", [{"cost": 0, "is_byok": True}, {"cost": 0.0}, {}])
def test_a_stated_zero_does_not_open_a_cap(stated):
    usage = {"prompt_tokens": 300, "completion_tokens": 50, **stated}  # 0.0005 dollars
    _, budget, num_calls = ask(Reply('{"ranking": ["A", "B"]}', usage=usage), 40, prices=PRICES, max_cost=0.0102)
    assert num_calls == 20
    assert budget.committed.cost == pytest.approx(0.01)


UNKNOWN = {
    "no usage": Reply("no ranking", usage={}),
    "timeout": Reply(delay=5.0),
    "reset": Reply(reset=True),
    "no price": Reply("no ranking", usage=TOKENS),
}


@pytest.mark.parametrize("first", UNKNOWN.values(), ids=UNKNOWN)
def test_the_cost_of_an_answer_is_unknown_if_that_of_an_attempt_is(first):
    replies = iter([first, Reply('{"ranking": ["A", "B"]}', usage={**TOKENS, "cost": 0.5})])
    [outcome], budget, _ = ask(lambda body: next(replies), 1, timeout=0.5)
    assert isinstance(outcome, RankingResult)
    assert (outcome.usage.attempts, outcome.usage.cost) == (2, None)
    assert budget.committed.cost == 0.5


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_call_that_was_not_served_has_no_cost(status):
    replies = iter([Reply(status=status), Reply('{"ranking": ["A", "B"]}', usage={**TOKENS, "cost": 0.5})])
    [outcome], _, _ = ask(lambda body: next(replies), 1)
    assert (outcome.usage.attempts, outcome.usage.cost) == (2, 0.5)
    [failure], _, _ = ask(Reply(status=status), 1, max_retries=1)
    assert failure.usage.cost is None  # nothing is known about prices


# Reservations


@pytest.mark.parametrize("max_concurrency", [1, 4, 32])
@pytest.mark.parametrize(("max_tokens", "needed"), [(1024, 30), (4096, 60), (64, 60)])
def test_a_run_uses_up_its_cap_and_never_exceeds_it(max_tokens, needed, max_concurrency):
    """The endpoint never sends more tokens than it is asked for."""

    def respond(body):
        used = min(needed, body["max_tokens"])
        text = '{"ranking": ["A", "B"]}' if used == needed else ""
        return Reply(text, usage={"prompt_tokens": 300, "completion_tokens": used},
                     finish_reason="stop" if text else "length")  # fmt: skip

    cap = 0.006 + max_tokens * 4e-6
    with LoopbackEndpoint(respond) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url, max_tokens=max_tokens, prices=PRICES, max_cost=cap,
                           max_concurrency=max_concurrency)  # fmt: skip
        outcomes = ranker.rank(make_requests(60))
        ranker.close()
    price = (300 + 4 * needed) / 1e6
    assert ranker.budget.committed.cost <= cap
    assert cap - ranker.budget.committed.cost < 1.5 * price
    assert {type(outcome).__name__ for outcome in outcomes} == {"RankingResult", "RankingFailure"}
    failures = {outcome.reason for outcome in outcomes if isinstance(outcome, RankingFailure)}
    assert failures == {"budget_exhausted"}


@pytest.mark.parametrize("limit", [{"max_tokens": 900}, {"max_completion_tokens": 900}])
def test_a_limit_in_the_extra_body_is_reserved(limit):
    _, _, num_calls = ask(REPLY, 1, extra_body=limit, max_run_tokens=1000)
    assert num_calls == 0
    _, _, num_calls = ask(REPLY, 1, extra_body=limit, max_run_tokens=1700)
    assert num_calls == 1
