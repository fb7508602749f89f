"""A jury over HTTP: votes, failures, caches, and budgets. Runs with a jury are in `tests/cycle/test_jury_runs.py`."""

import copy
import json
import pickle
import threading
import time
from contextlib import ExitStack, closing

import pytest

from cyclealign_trl import CachedRanker, FunctionRanker, JuryRanker, LLMRanker, evaluate_ranker
from cyclealign_trl.chat import client
from cyclealign_trl.chat.budget import Budget
from cyclealign_trl.chat.joint_budget import JointBudget
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.errors import RankerError
from cyclealign_trl.rankers.cache import with_cache
from cyclealign_trl.types import RankingFailure, RankingRequest, RankingResult, Trimmed, Usage
from tests.rankers.llm_stubs import shown

COMPLETIONS = ("aa", "b", "cccc", "ddd")
REQUEST = RankingRequest("Why?", COMPLETIONS)
USAGE = {"prompt_tokens": 300, "completion_tokens": 50}
PRICES = {"input": 1.0, "output": 4.0}  # 0.0005 dollars per reply
SHORTEST, LONGEST = (1, 0, 3, 2), (2, 3, 0, 1)


def requests(*prompts):
    return [RankingRequest(prompt, COMPLETIONS) for prompt in prompts]


def by_length(sign, improved=None, delay=0.0):
    def respond(body):
        texts = shown(body)
        ranking = sorted(texts, key=lambda label: sign * len(texts[label]))
        return Reply(json.dumps({"ranking": ranking, "improved_response": improved}), delay=delay, usage=USAGE)

    return respond


def broken(body):
    return Reply("no", status=500)


@pytest.fixture
def panel(monkeypatch):
    """Start one endpoint per judge, and return an LLMRanker for each and the endpoints."""
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.001)
    with ExitStack() as stack:

        def start(*judges, **options):
            endpoints = [stack.enter_context(LoopbackEndpoint(judge)) for judge in judges]
            rankers = []
            for index, endpoint in enumerate(endpoints):
                ranker = LLMRanker(f"judge-{index}", endpoint.base_url, "key", max_retries=0, **options)
                rankers.append(stack.enter_context(closing(ranker)))
            return rankers, endpoints

        yield start


class Fixed:
    """Ranker with the same outcome for every request."""

    def __init__(self, outcome, name="fixed"):
        self.outcome, self.name = outcome, name

    def rank(self, requests):
        return [self.outcome for _ in requests]


def result(*order, **fields):
    return RankingResult(order, **fields)


def merged(*outcomes, **options):
    members = [Fixed(outcome, f"member-{index}") for index, outcome in enumerate(outcomes)]
    return JuryRanker(members, **options).rank([RankingRequest("Why?", ("a", "b", "c"))])[0]


# Votes


def test_the_majority_of_three_judges_decides(panel):
    rankers, endpoints = panel(by_length(1, "short"), by_length(-1, "long"), by_length(-1, "longer"))
    (outcome,) = JuryRanker(rankers).rank([REQUEST])
    assert outcome.order == LONGEST
    assert outcome.improved_completion == "short"
    assert outcome.consistency == pytest.approx(-1 / 3)
    assert outcome.usage == Usage(900, 150, attempts=3)
    assert [len(endpoint.requests) for endpoint in endpoints] == [1, 1, 1]


def test_weights_decide_and_ties_stay_ties():
    votes = (result(0, 1, 2), result(2, 1, 0))
    assert merged(*votes).ranks == (0, 0, 0)
    assert merged(*votes, weights=[1, 2]).order == (2, 1, 0)
    tied = result(0, 1, 2, ranks=(0, 0, 1))
    assert merged(tied, result(1, 0, 2)).ranks == (1, 0, 2)


def test_the_improved_completion_is_that_of_the_first_member_that_wrote_one():
    failed = RankingFailure("timeout")
    second, third = result(0, 1, 2, improved_completion="second"), result(2, 1, 0, improved_completion="third")
    assert merged(failed, second, third).improved_completion == "second"
    assert merged(result(0, 1, 2), third, second).improved_completion == "third"


def test_what_a_member_did_not_see_is_reported():
    trimmed = [result(0, 1, 2, trimmed=Trimmed(2, 0)), result(0, 1, 2, trimmed=Trimmed(1, 3)), result(0, 1, 2)]
    assert merged(*trimmed).trimmed == Trimmed(2, 3)
    assert merged(result(0, 1, 2), result(0, 1, 2)).trimmed is None


def test_members_rank_at_the_same_time(panel):
    rankers, _ = panel(*[by_length(1, delay=0.5)] * 4)
    started = time.perf_counter()
    JuryRanker(rankers).rank([REQUEST])
    assert time.perf_counter() - started < 1.0


def test_an_answer_is_yielded_before_slower_ones_arrive(panel):
    slow = threading.Event()

    def wait_for_second(body):
        if "Second" in body["messages"][-1]["content"]:
            slow.wait(10)
        return by_length(1)(body)

    rankers, _ = panel(wait_for_second, by_length(1))
    outcomes = JuryRanker(rankers).stream(requests("Second?", "First?"))
    assert next(outcomes)[0] == 1
    slow.set()
    assert next(outcomes)[0] == 0


# Failures


def test_a_failed_judge_is_left_out_and_the_consistency_says_so(panel):
    rankers, _ = panel(by_length(1), broken, by_length(1))
    (outcome,) = JuryRanker(rankers).rank([REQUEST])
    assert outcome.order == SHORTEST
    assert outcome.consistency == pytest.approx(1 / 3)  # one of three pairs has voted, and agrees


@pytest.mark.parametrize(
    ("num_members", "num_failed", "min_members", "ranked"),
    [(2, 1, 1, True), (2, 1, 2, False), (3, 2, 1, True), (3, 2, 2, False), (3, 1, 2, True), (3, 1, 3, False),
     (3, 3, 1, False)],
)  # fmt: skip
def test_needs_min_members(num_members, num_failed, min_members, ranked):
    outcomes = [RankingFailure("timeout", "late", Usage(1, 0))] * num_failed
    outcomes += [result(1, 0, 2)] * (num_members - num_failed)
    outcome = merged(*outcomes, min_members=min_members)
    assert isinstance(outcome, RankingResult) == ranked
    assert outcome.usage == Usage(num_failed, 0, attempts=num_failed)
    if ranked:
        assert outcome.order == (1, 0, 2)
    else:
        assert outcome.reason == "timeout"
        assert f"{num_failed} of {num_members} members failed" in outcome.detail
        assert "member-0: late" in outcome.detail


def test_the_only_member_that_ranked_is_not_called_consistent():
    assert merged(result(0, 1, 2), RankingFailure("timeout")).consistency == 0.0


def test_a_panel_fails_for_its_budget_only_if_the_budget_alone_prevents_it():
    broke, late = RankingFailure("budget_exhausted"), RankingFailure("timeout")
    assert merged(broke, late, result(0, 1, 2), min_members=2).reason == "timeout"
    assert merged(late, broke, broke, min_members=2).reason == "budget_exhausted"
    assert merged(broke, late, min_members=2).reason == "budget_exhausted"
    assert merged(broke, late).reason == "timeout"
    assert merged(broke, broke).reason == "budget_exhausted"


def test_a_member_that_is_left_out_is_named_once_per_reason(caplog):
    members = [Fixed(RankingFailure("timeout", "no answer\x1b[2J in 60 s"), "slow"), Fixed(result(1, 0, 2))]
    jury = JuryRanker([*members, Fixed(RankingFailure("cancelled"), "stopped")])
    for prompt in ("a", "b"):
        jury.rank([RankingRequest(prompt, ("a", "b", "c"))])
    members[0].outcome = RankingFailure("budget_exhausted", "spent")
    jury.rank([RankingRequest("c", ("a", "b", "c"))])
    late, broke = (record.getMessage() for record in caplog.records)
    assert late.startswith(r"slow has not ranked a request (timeout: 'no answer\x1b[2J in 60 s'). The jury goes on")
    assert late.endswith("as long as 1 of 3 members rank (`min_members`).")
    assert broke.endswith("Raise its cap and resume to ask it again.")


def test_a_wrong_key_raises_after_the_others_have_answered(panel, tmp_path):
    rankers, endpoints = panel(by_length(1, delay=0.3), lambda body: Reply("wrong key", status=401), by_length(1))
    with closing(CachedRanker(JuryRanker(rankers), tmp_path / "a.sqlite")) as cached:
        with pytest.raises(RankerError, match="401"):
            cached.rank([REQUEST])
        assert CachedRanker(rankers[0], tmp_path / "a.sqlite").rank([REQUEST])[0].usage.cached
    assert [len(endpoint.requests) for endpoint in endpoints] == [1, 1, 1]


def test_a_member_that_skips_requests_raises():
    class Skipping(Fixed):
        def rank(self, requests):
            return super().rank(requests[1:])

    jury = JuryRanker([Fixed(result(*range(4))), Skipping(result(*range(4)))])
    with pytest.raises(RankerError, match="given 2 requests and returned 1 answers"):
        jury.rank(requests("a", "b"))
    with pytest.raises(ValueError, match="fixed was shown 4 completions and ranked 2"):
        JuryRanker([Fixed(result(0, 1)), Fixed(result(0, 1))]).rank([REQUEST])


@pytest.mark.parametrize(
    ("members", "options", "error", "message"),
    [
        ([Fixed(result(0, 1))], {}, ValueError, "at least 2 members, got 1"),
        ([Fixed(result(0, 1)), "gpt-5-mini"], {}, TypeError, "LLMRanker"),
        ([Fixed(1), Fixed(1)], {"weights": [1]}, ValueError, "1 weights for 2 members"),
        ([Fixed(1), Fixed(1)], {"weights": [1, 0]}, ValueError, r"positive and finite, got \[1.0, 0.0\]"),
        ([Fixed(1), Fixed(1)], {"weights": [1, float("nan")]}, ValueError, "positive and finite"),
        ([Fixed(1), Fixed(1)], {"min_members": 3}, ValueError, "from 1 to 2, the number of members, got 3"),
        ([Fixed(1), Fixed(1)], {"min_members": 0}, ValueError, "got 0"),
        ([LLMRanker("a", "http://127.0.0.1:1/v1"), LLMRanker("a", "http://127.0.0.1:1/v1")], {}, ValueError,
         "0 and 1 are the same ranker"),
    ],
)  # fmt: skip
def test_wrong_use_raises(members, options, error, message):
    with pytest.raises(error, match=message):
        JuryRanker(members, **options)


# Caches


def count(prompts, completions, **_):
    return [float(len(completion)) for completion in completions]


def test_only_members_that_failed_are_asked_again(panel, tmp_path):
    health = {"status": 500}

    def recovering(body):
        return by_length(-1)(body) if health["status"] == 200 else Reply("no", status=500)

    rankers, endpoints = panel(by_length(1), recovering, by_length(1))
    with closing(CachedRanker(JuryRanker(rankers, min_members=3), tmp_path / "a.sqlite")) as cached:
        assert cached.rank([REQUEST])[0].reason == "server_error"
        health["status"] = 200
        outcome = cached.rank([REQUEST])[0]
        assert outcome.order == SHORTEST
        assert outcome.usage == Usage(300, 50)  # the cached votes are free
        assert cached.rank([REQUEST])[0].usage.cached
    assert [len(endpoint.requests) for endpoint in endpoints] == [1, 2, 1]


def test_members_without_a_fingerprint_do_not_prevent_a_cache(panel, tmp_path, caplog):
    rankers, endpoints = panel(by_length(1))
    jury = JuryRanker([*rankers, FunctionRanker(count)])
    assert jury.fingerprint is None
    for _ in range(2):
        with closing(with_cache(jury, tmp_path, 0)) as cached:
            assert isinstance(cached, CachedRanker)
            assert cached.rank(requests("a", "b"))[1].ranks == (0, 0, 0, 0)
    assert len(endpoints[0].requests) == 2
    assert not caplog.records
    plain = JuryRanker([FunctionRanker(count), Fixed(result(0, 1))])
    assert with_cache(plain, tmp_path, 0) is plain
    with pytest.raises(ValueError, match="fingerprint"):
        CachedRanker(plain, tmp_path / "b.sqlite")


def test_a_changed_panel_pays_for_its_new_member_alone(panel, tmp_path):
    rankers, endpoints = panel(*[by_length(1)] * 3, num_passes=2)
    for members in (rankers[:2], rankers, rankers[::-1]):
        with closing(with_cache(JuryRanker(members), tmp_path, 0)) as cached:
            cached.rank([REQUEST])
    assert [len(endpoint.requests) for endpoint in endpoints] == [2, 2, 2]


def test_an_evaluation_caches_the_members(panel, tmp_path):
    rankers, endpoints = panel(by_length(1), broken, shuffle=False)
    rows = [{"prompt": "Why?", "completions": list(COMPLETIONS), "ranks": [1, 0, 3, 2]}]
    jury = JuryRanker([*rankers, FunctionRanker(count)], [3, 1, 1])
    first, second = (evaluate_ranker(jury, rows, cache_path=tmp_path / "a.sqlite", reverse=False) for _ in range(2))
    assert first.rankings[0].seconds is not None
    assert [len(endpoint.requests) for endpoint in endpoints] == [1, 2]
    for report in (first, second):
        assert [report.rankings[0].shown[index] for index in report.rankings[0].outcome.order] == list(SHORTEST)


def test_the_fingerprint_depends_on_members_and_merging(panel):
    rankers, _ = panel(*[by_length(1)] * 3)
    panels = [
        JuryRanker(rankers),
        JuryRanker(rankers[:2]),
        JuryRanker(rankers, [1, 1, 2]),
        JuryRanker(rankers, min_members=2),
    ]
    assert len({jury.fingerprint for jury in panels}) == 4
    assert JuryRanker(rankers).fingerprint == panels[0].fingerprint
    assert "key" not in json.loads(panels[0].fingerprint)


# Budgets, estimates, copies


def test_each_member_keeps_its_own_cap(panel, caplog):
    rankers, endpoints = panel(by_length(1), by_length(1))
    with LoopbackEndpoint(by_length(-1)) as endpoint:
        poor = LLMRanker("poor", endpoint.base_url, "key", prices=PRICES, max_cost=0.0022, max_tokens=128)
        jury = JuryRanker([poor, *rankers])
        orders = [jury.rank(requests(f"Question {number}?"))[0].consistency for number in range(8)]
        assert len(endpoint.requests) == 4
        poor.close()
    assert [len(endpoint.requests) for endpoint in endpoints] == [8, 8]
    assert orders == [pytest.approx(-1 / 3)] * 4 + [pytest.approx(1 / 3)] * 4
    (message,) = [record.getMessage() for record in caplog.records if record.name.endswith("jury")]
    assert message.startswith("poor has not ranked a request (budget_exhausted: 'The run has spent $0.002 of max_cost")
    assert "poor: $0.002 of max_cost=0.0022" in str(jury.budget)


def test_ledgers_are_kept_apart(tmp_path):
    usage = Usage(100, 0)

    def make(caps=(1000, 500)):
        return [Budget(max_tokens=cap) for cap in caps]

    def joint(budgets):
        return JointBudget([("org/a", budgets[0]), ("org/a", budgets[1])])

    budgets = make()
    joint(budgets).keep_ledger(tmp_path)
    for budget, times in zip(budgets, (3, 1), strict=True):
        for _ in range(times):
            budget.reserve(usage)
            budget.settle(usage, usage)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["org-a", "org-a-2"]
    resumed = make()
    joint(resumed).keep_ledger(tmp_path)
    assert [amount.tokens for amount in joint(resumed).committed] == [300, 100]

    # Another process has committed 500 and 300: 200 of the first cap are left, and 100 of the second.
    other = make()
    for budget, tokens in zip(other, (500, 300), strict=True):
        budget.reserve(Usage(tokens))
    joint(resumed).share_out([joint(resumed).committed, joint(other).committed])
    assert [budget.reserve(Usage(101)) for budget in resumed] == [False, False]
    assert [budget.reserve(Usage(51)) for budget in resumed] == [True, False]


def test_a_jury_shuffles_if_a_member_does(panel):
    (shuffling,), _ = panel(by_length(1))
    (plain,), _ = panel(by_length(1), shuffle=False)
    assert JuryRanker([shuffling, FunctionRanker(count)]).shuffle
    assert not JuryRanker([plain, FunctionRanker(count)]).shuffle


def test_rankers_without_a_budget_make_a_jury_without_one():
    budget = Budget(max_tokens=5)
    members = [Fixed(result(0, 1), "one"), Fixed(result(0, 1), "two")]
    assert JuryRanker(members).budget is None
    for member in members:
        member.budget = budget  # shared, so it counts once
    assert str(JuryRanker(members).budget) == f"one: {budget}"


def test_estimates_and_costs_are_summed_and_unknown_if_one_is_unknown(panel):
    rankers, _ = panel(by_length(1), by_length(1), prices=PRICES)
    unpriced, _ = panel(by_length(1))
    single = rankers[0].estimate(REQUEST)
    functions = FunctionRanker(count)
    assert JuryRanker([*rankers, functions]).estimate(REQUEST) == single + single
    mixed = JuryRanker([*rankers, *unpriced])
    assert mixed.estimate(REQUEST).attempts == 3
    assert mixed.estimate(REQUEST).cost is None
    assert JuryRanker([functions, Fixed(result(0, 1))]).estimate(REQUEST) is None
    assert mixed.rank([REQUEST])[0].usage == Usage(900, 150, attempts=3)
    assert JuryRanker(rankers).rank([REQUEST])[0].usage.cost == pytest.approx(0.001)
    assert JuryRanker(rankers).reasoning_tokens == 0
    assert JuryRanker([functions, Fixed(1)]).reasoning_tokens is None


def test_cancelling_ends_the_calls_of_all_members(panel):
    rankers, endpoints = panel(*[by_length(1, delay=20)] * 2)
    jury = JuryRanker(rankers)
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.extend(jury.rank([REQUEST])))
    thread.start()
    while not all(endpoint.requests for endpoint in endpoints):
        time.sleep(0.01)
    jury.cancel()
    thread.join(5)
    assert [outcome.reason for outcome in outcomes] == ["cancelled"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda jury: pickle.loads(pickle.dumps(jury))])
def test_a_copy_ranks_as_the_original(panel, monkeypatch, duplicate, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    _, endpoints = panel(by_length(1), by_length(-1))
    members = [LLMRanker(f"judge-{index}", endpoint.base_url) for index, endpoint in enumerate(endpoints)]
    jury = JuryRanker(members, [1, 2])
    copied = duplicate(jury)
    assert (copied.fingerprint, copied.rank([REQUEST])[0].order) == (jury.fingerprint, LONGEST)
    with closing(CachedRanker(jury, tmp_path / "a.sqlite")) as cached:
        cached.rank([REQUEST])
        with closing(duplicate(cached)) as copied_cache:
            assert copied_cache.rank([REQUEST])[0].usage.cached
    capped = LLMRanker("capped", endpoints[0].base_url, max_run_tokens=9)
    with pytest.raises(TypeError, match="each copy could spend as much"):
        duplicate(JuryRanker([jury.members[0], capped]))
    for member in (*jury.members, *copied.members, capped):
        member.close()


def test_the_name_lists_the_members_without_folders():
    members = [Fixed(1, "gpt-5-mini"), Fixed(1, "/home/someone/reward"), Fixed(1, "org/c")]
    assert JuryRanker(members).name == "jury of gpt-5-mini, reward and org/c"
