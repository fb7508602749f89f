"""Several passes: shown orders, merging, failed passes, streaming, and the effect on a biased judge."""

import random
from itertools import combinations, permutations

import pytest

from cyclealign_trl.rankers.passes import merge_passes, shown_order, stream_in_passes
from cyclealign_trl.types import Demonstration, RankingFailure, RankingRequest, RankingResult, Trimmed, Usage

REQUEST = RankingRequest("Why?", ("a", "b", "c", "d"))


def in_pass(index, request=REQUEST):
    return RankingRequest(request.prompt, request.completions, request.demonstrations, pass_index=index)


def result(*order, improved=None, **fields):
    return RankingResult(order, improved_completion=improved, **fields)


# Shown orders


def test_every_second_pass_reverses_the_order_of_the_previous_one():
    for request in (RankingRequest(f"Question {index}?", ("a", "b", "c", "d")) for index in range(20)):
        orders = [shown_order(in_pass(index, request), seed=0) for index in range(4)]
        assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
        assert (orders[1], orders[3]) == (orders[0][::-1], orders[2][::-1])


def test_two_passes_show_two_completions_in_both_orders():
    orders = [shown_order(in_pass(index, RankingRequest("Why?", ("a", "b"))), seed=3) for index in range(2)]
    assert sorted(orders) == [[0, 1], [1, 0]]


def test_shown_orders_cover_all_permutations():
    orders = {tuple(shown_order(in_pass(index), seed)) for index in range(8) for seed in range(30)}
    assert orders == set(permutations(range(4)))


def test_a_request_without_a_pass_index_has_the_order_of_the_first_pass():
    assert shown_order(REQUEST, seed=5) == shown_order(in_pass(0), seed=5)


def test_the_shown_order_depends_on_prompt_completions_and_demonstrations():
    demonstration = Demonstration("How?", ("So.", "Thus."), (1, 0))
    others = [
        RankingRequest("Why not?", REQUEST.completions),
        RankingRequest("Why?", ("a", "b", "c", "e")),
        RankingRequest("Why?", REQUEST.completions, (demonstration,)),
    ]
    for other in others:
        assert any(shown_order(other, seed) != shown_order(REQUEST, seed) for seed in range(10))


# Merging


def test_merges_by_borda_count():
    merged = merge_passes([result(0, 1, 2, 3), result(0, 2, 1, 3), result(1, 0, 2, 3)])
    assert merged.order == (0, 1, 2, 3)
    assert merged.ranks == (0, 1, 2, 3)  # counts 1, 3, 5, 9
    assert merged.consistency == pytest.approx((4 / 6 + 4 / 6 + 2 / 6) / 3)


def test_equal_counts_share_a_rank_and_are_ordered_by_index():
    merged = merge_passes([result(2, 0, 1), result(2, 1, 0)])
    assert (merged.order, merged.ranks) == ((2, 0, 1), (1, 1, 0))
    opposite = merge_passes([result(0, 1), result(1, 0)])
    assert (opposite.order, opposite.ranks, opposite.consistency) == ((0, 1), (0, 0), -1.0)


def test_counts_ties_within_a_pass():
    merged = merge_passes([RankingResult((0, 1, 2), ranks=(0, 0, 1)), result(1, 0, 2)])
    assert merged.ranks == (1, 0, 2)


def test_the_merged_order_does_not_depend_on_the_order_of_the_passes():
    rng = random.Random(0)
    for _ in range(200):
        passes = [result(*rng.sample(range(4), 4)) for _ in range(3)]
        merged = {merge_passes(shuffled).ranks for shuffled in permutations(passes)}
        assert len(merged) == 1


def test_equal_passes_have_a_consistency_of_one():
    merged = merge_passes([result(1, 0, 2)] * 3)
    assert (merged.order, merged.ranks, merged.consistency) == ((1, 0, 2), (1, 0, 2), 1.0)


def test_takes_the_improved_completion_of_the_closest_pass():
    passes = [result(3, 2, 1, 0, improved="far"), result(0, 1, 2, 3, improved="close"), result(0, 1, 3, 2)]
    assert merge_passes(passes).improved_completion == "close"
    assert merge_passes([result(0, 1, 2), result(0, 1, 2, improved="any")]).improved_completion == "any"
    even = [result(0, 1, improved="first"), result(1, 0, improved="second")]
    assert merge_passes(even).improved_completion == "first"
    assert merge_passes([result(0, 1), result(0, 1)]).improved_completion is None


def test_sums_the_usage_of_all_passes():
    paid, stored = Usage(10, 2, cost=0.5, attempts=2), Usage(20, 4, cost=1.0, cached=True)
    failed = RankingFailure("timeout", usage=Usage(3, 0))
    merged = merge_passes([result(0, 1, usage=paid), result(0, 1, usage=paid), failed])
    assert merged.usage == Usage(23, 4, cost=1.0, attempts=5)
    assert merge_passes([result(0, 1, usage=paid), result(0, 1, usage=stored)]).usage == paid
    assert merge_passes([result(0, 1, usage=stored)] * 2).usage == Usage(40, 8, cost=2.0, attempts=2, cached=True)
    assert merge_passes([result(0, 1)] * 2).usage is None


@pytest.mark.parametrize(
    ("num_passes", "num_failed", "ranked"),
    [(2, 1, False), (3, 1, True), (3, 2, False), (4, 1, True), (4, 2, False), (5, 2, True)],
)
def test_needs_more_than_half_of_the_passes(num_passes, num_failed, ranked):
    failures = [RankingFailure("refusal", f"no {index}", Usage(1, 1)) for index in range(num_failed)]
    merged = merge_passes([*failures, *[result(1, 0)] * (num_passes - num_failed)])
    if ranked:
        assert merged.order == (1, 0)
    else:
        assert merged.reason == "refusal"
        assert merged.detail == f"{num_failed} of {num_passes} passes failed. The first: no 0"
    assert merged.usage == Usage(num_failed, num_failed, attempts=num_failed)


def test_keeps_what_was_trimmed():
    trimmed = Trimmed(demonstrations=2)
    assert merge_passes([result(0, 1, trimmed=trimmed)] * 3).trimmed == trimmed


def test_returns_a_single_pass_unchanged():
    for outcome in (result(1, 0), RankingFailure("timeout")):
        assert merge_passes([outcome]) is outcome


# Streaming


def test_yields_each_ranking_when_its_last_pass_arrives():
    asked = []

    def stream(requests):
        asked.extend((request.prompt, request.pass_index) for request in requests)
        for place in (5, 0, 3, 1, 4, 2):
            yield place, result(*((0, 1) if requests[place].pass_index else (1, 0)))

    requests = [RankingRequest(prompt, ("a", "b")) for prompt in ("x", "y")]
    arrivals = list(stream_in_passes(stream, requests, num_passes=3))
    assert asked == [(prompt, index) for prompt in ("x", "y") for index in range(3)]
    assert [position for position, _ in arrivals] == [1, 0]
    assert all(outcome.ranks == (0, 1) and outcome.consistency == pytest.approx(-1 / 3) for _, outcome in arrivals)


def test_a_request_with_a_pass_index_makes_only_that_pass():
    asked = []

    def stream(requests):
        asked.extend(requests)
        yield from ((place, result(0, 1)) for place in range(len(requests)))

    one, whole = in_pass(2), REQUEST
    arrivals = list(stream_in_passes(stream, [one, whole], num_passes=2))
    assert [request.pass_index for request in asked] == [2, 0, 1]
    assert [(position, outcome.consistency) for position, outcome in arrivals] == [(0, None), (1, 1.0)]
    asked.clear()
    assert [position for position, _ in stream_in_passes(stream, [whole], num_passes=1)] == [0]
    assert asked == [whole]


# Effect on a biased judge


def biased_judge(request, merits, rng, bias=0.15, noise=0.15):
    """Rank with noise and with a preference for completions that are shown first."""
    shown = shown_order(request, seed=0)
    scores = {index: merits[index] - bias * place + rng.gauss(0, noise) for place, index in enumerate(shown)}
    return result(*sorted(shown, key=lambda index: -scores[index]))


def pairwise_accuracy(ranks, merits):
    """Return the share of pairs that are ordered by merit. A tie counts half."""
    pairs = [(i, j) if merits[i] > merits[j] else (j, i) for i, j in combinations(range(len(merits)), 2)]
    return sum((ranks[i] < ranks[j]) + (ranks[i] == ranks[j]) / 2 for i, j in pairs) / len(pairs)


def test_more_passes_are_more_accurate_and_consistency_predicts_accuracy():
    accuracy = {}
    by_consistency = []
    for num_passes in (1, 2, 3, 5):
        rng = random.Random(num_passes)
        rankings = []
        for number in range(600):
            merits = [rng.random() for _ in range(4)]
            request = RankingRequest(f"Question {number}?", ("a", "b", "c", "d"))
            passes = [biased_judge(in_pass(index, request), merits, rng) for index in range(num_passes)]
            merged = merge_passes(passes)
            rankings.append(pairwise_accuracy(merged.resolved_ranks, merits))
            if num_passes == 3:
                by_consistency.append((merged.consistency, rankings[-1]))
        accuracy[num_passes] = sum(rankings) / len(rankings)
    assert accuracy[1] + 0.03 < accuracy[2] < accuracy[5]
    assert accuracy[1] + 0.03 < accuracy[3] < accuracy[5]
    by_consistency.sort()
    lower, upper = by_consistency[:300], by_consistency[300:]
    assert sum(right for _, right in upper) > sum(right for _, right in lower) + 300 * 0.05
