"""Kendall's tau-b against known values and its definition."""

import math
from collections import Counter
from itertools import combinations, product

import pytest

from cyclealign_trl import kendall_tau


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
    """Return concordant minus discordant pairs, over the geometric mean of the untied pairs."""
    pairs = list(combinations(range(len(first)), 2))
    products = [(first[i] - first[j]) * (second[i] - second[j]) for i, j in pairs]
    difference = sum(value > 0 for value in products) - sum(value < 0 for value in products)
    tied = [sum(math.comb(size, 2) for size in Counter(ranks).values()) for ranks in (first, second)]
    return difference / math.sqrt((len(pairs) - tied[0]) * (len(pairs) - tied[1]))


def test_kendall_tau_of_rankings_with_ties_matches_its_definition():
    rankings = [ranks for ranks in product(range(4), repeat=4) if len(set(ranks)) > 1]
    for first in rankings[::3]:
        for second in rankings[::5]:
            assert kendall_tau(first, second) == pytest.approx(tau_b(first, second))


def test_kendall_tau_of_different_lengths_raises():
    with pytest.raises(ValueError, match="2 and 3"):
        kendall_tau([0, 1], [0, 1, 2])
