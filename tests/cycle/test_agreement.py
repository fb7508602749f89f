"""Golden cases, and every pair of rankings of up to five completions against brute force; tau-b against its sum."""

import math
from collections import Counter
from itertools import combinations, permutations, product

import pytest

from cyclealign_trl import agreement_ranking, kendall_tau


def test_golden(golden):
    cases = [case for group in golden["lcs_agreement"].values() for case in group]
    assert len(cases) == 125
    for case in cases:
        for black, white in ((case["black"], case["white"]), (case["black_raw"], case["white_raw"])):
            assert agreement_ranking(black, white) == tuple(case["agreement"]), case


def brute_force(black, white):
    """All common subsequences of the largest length, by their positions in `black`; the smallest positions win."""
    for length in range(len(black), 0, -1):
        common = [
            positions
            for positions in combinations(range(len(black)), length)
            if [index for index in white if index in {black[p] for p in positions}] == [black[p] for p in positions]
        ]
        if common:
            return tuple(black[position] for position in min(common))
    return ()


@pytest.mark.parametrize("num_completions", [1, 2, 3, 4, 5])
def test_every_pair_of_rankings(num_completions):
    black = tuple(range(num_completions))
    for white in permutations(black):
        assert agreement_ranking(black, white) == brute_force(black, white)


def test_nothing_shared():
    assert agreement_ranking([], [0, 1]) == ()
    assert agreement_ranking([0, 1], [2, 3]) == ()


def test_identical_rankings_agree_entirely():
    assert agreement_ranking([2, 0, 1], [2, 0, 1]) == (2, 0, 1)


# Kendall's tau-b


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 1.0),
        ([0, 1, 2, 3], [3, 2, 1, 0], -1.0),
        ([0, 1, 2, 3], [0, 2, 1, 3], 4 / 6),
        ([0, 1, 2], [1, 2, 0], -1 / 3),
        ([0, 0, 1], [0, 1, 2], 2 / math.sqrt(2 * 3)),
        ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0], -4 / math.sqrt(8 * 9)),  # the example of scipy.stats.kendalltau: -0.47
        ([0, 0, 0], [0, 1, 2], None),
        ([0], [0], None),
        ([], [], None),
    ],
)
def test_kendall_tau(first, second, tau):
    assert kendall_tau(first, second) == pytest.approx(tau)
    assert kendall_tau(second, first) == pytest.approx(tau)


def tau_b(first, second):
    """By the formula of the textbooks: concordant less discordant pairs, with the groups of ties counted."""
    pairs = list(combinations(range(len(first)), 2))
    products = [(first[i] - first[j]) * (second[i] - second[j]) for i, j in pairs]
    difference = sum(value > 0 for value in products) - sum(value < 0 for value in products)
    tied = [sum(math.comb(size, 2) for size in Counter(ranks).values()) for ranks in (first, second)]
    return difference / math.sqrt((len(pairs) - tied[0]) * (len(pairs) - tied[1]))


def test_kendall_tau_of_every_pair_of_rankings_with_ties():
    rankings = [ranks for ranks in product(range(4), repeat=4) if len(set(ranks)) > 1]
    for first in rankings[::3]:
        for second in rankings[::5]:
            assert kendall_tau(first, second) == pytest.approx(tau_b(first, second))


def test_kendall_tau_compares_the_same_completions():
    with pytest.raises(ValueError, match="2 and 3"):
        kendall_tau([0, 1], [0, 1, 2])
