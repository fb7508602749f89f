"""Several passes as one ranking: shown orders, Borda's count, what fails, and that it helps against a biased judge."""

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


def test_every_second_pass_shows_the_one_before_in_reverse():
    for request in (RankingRequest(f"Question {index}?", ("a", "b", "c", "d")) for index in range(20)):
        orders = [shown_order(in_pass(index, request), seed=0) for index in range(4)]
        assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
        assert (orders[1], orders[3]) == (orders[0][::-1], orders[2][::-1])


def test_two_passes_show_two_completions_both_ways():
    orders = [shown_order(in_pass(index, RankingRequest("Why?", ("a", "b"))), seed=3) for index in range(2)]
    assert sorted(orders) == [[0, 1], [1, 0]]


def test_the_shown_orders_cover_all_orders():
    orders = {tuple(shown_order(in_pass(index), seed)) for index in range(8) for seed in range(30)}
    assert orders == set(permutations(range(4)))


def test_the_first_pass_is_the_only_one_of_a_ranker_without_several():
    assert shown_order(REQUEST, seed=5) == shown_order(in_pass(0), seed=5)


def test_whatever_the_judge_is_shown_decides_the_order():
    demonstration = Demonstration("How?", ("So.", "Thus."), (1, 0))
    others = [
        RankingRequest("Why not?", REQUEST.completions),
        RankingRequest("Why?", ("a", "b", "c", "e")),
        RankingRequest("Why?", REQUEST.completions, (demonstration,)),
    ]
    for other in others:
        assert any(shown_order(other, seed) != shown_order(REQUEST, seed) for seed in range(10))


# Merging


def test_borda_counts_every_rank():
    merged = merge_passes([result(0, 1, 2, 3), result(0, 2, 1, 3), result(1, 0, 2, 3)])
    assert merged.order == (0, 1, 2, 3)
    assert merged.ranks == (0, 1, 2, 3)  # counts 1, 3, 5, 9
    assert merged.consistency == pytest.approx((4 / 6 + 4 / 6 + 2 / 6) / 3)


def test_equal_counts_are_ties_listed_by_index():
    merged = merge_passes([result(2, 0, 1), result(2, 1, 0)])
    assert (merged.order, merged.ranks) == ((2, 0, 1), (1, 1, 0))
    opposite = merge_passes([result(0, 1), result(1, 0)])
    assert (opposite.order, opposite.ranks, opposite.consistency) == ((0, 1), (0, 0), -1.0)


def test_ties_within_a_pass_are_counted_as_such():
    merged = merge_passes([RankingResult((0, 1, 2), ranks=(0, 0, 1)), result(1, 0, 2)])
    assert merged.ranks == (1, 0, 2)


def test_the_merged_order_does_not_depend_on_the_order_of_the_passes():
    rng = random.Random(0)
    for _ in range(200):
        passes = [result(*rng.sample(range(4), 4)) for _ in range(3)]
        merged = {merge_passes(shuffled).ranks for shuffled in permutations(passes)}
        assert len(merged) == 1


def test_equal_passes_agree_entirely():
    merged = merge_passes([result(1, 0, 2)] * 3)
    assert (merged.order, merged.ranks, merged.consistency) == ((1, 0, 2), (1, 0, 2), 1.0)


def test_the_improved_completion_is_of_the_pass_closest_to_the_merged_ranking():
    passes = [result(3, 2, 1, 0, improved="far"), result(0, 1, 2, 3, improved="close"), result(0, 1, 3, 2)]
    assert merge_passes(passes).improved_completion == "close"
    assert merge_passes([result(0, 1, 2), result(0, 1, 2, improved="any")]).improved_completion == "any"
    even = [result(0, 1, improved="first"), result(1, 0, improved="second")]
    assert merge_passes(even).improved_completion == "first"
    assert merge_passes([result(0, 1), result(0, 1)]).improved_completion is None


def test_the_usage_is_that_of_all_passes():
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
def test_more_than_half_of_the_passes_make_a_ranking(num_passes, num_failed, ranked):
    failures = [RankingFailure("refusal", f"no {index}", Usage(1, 1)) for index in range(num_failed)]
    merged = merge_passes([*failures, *[result(1, 0)] * (num_passes - num_failed)])
    if ranked:
        assert merged.order == (1, 0)
    else:
        assert merged.reason == "refusal"
        assert merged.detail == f"{num_failed} of {num_passes} passes failed. The first: no 0"
    assert merged.usage == Usage(num_failed, num_failed, attempts=num_failed)


def test_what_was_trimmed_is_kept():
    trimmed = Trimmed(demonstrations=2)
    assert merge_passes([result(0, 1, trimmed=trimmed)] * 3).trimmed == trimmed


def test_a_single_pass_comes_back_as_it_is():
    for outcome in (result(1, 0), RankingFailure("timeout")):
        assert merge_passes([outcome]) is outcome


# Streaming


def test_each_ranking_comes_with_its_last_pass_whatever_the_order_of_arrival():
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


def test_a_request_for_one_pass_is_that_one_alone():
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


# It helps


def biased_judge(request, merits, rng, bias=0.15, noise=0.15):
    """A judge to whom a place nearer the top is worth something, and who is never quite sure."""
    shown = shown_order(request, seed=0)
    scores = {index: merits[index] - bias * place + rng.gauss(0, noise) for place, index in enumerate(shown)}
    return result(*sorted(shown, key=lambda index: -scores[index]))


def pairwise_accuracy(ranks, merits):
    """Share of pairs that are ordered by merit; a tie is half right."""
    pairs = [(i, j) if merits[i] > merits[j] else (j, i) for i, j in combinations(range(len(merits)), 2)]
    return sum((ranks[i] < ranks[j]) + (ranks[i] == ranks[j]) / 2 for i, j in pairs) / len(pairs)


def test_passes_make_a_biased_judge_more_accurate_and_their_consistency_tells_where():
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
