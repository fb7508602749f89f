"""Golden cases, and every pair of rankings of up to five completions against brute force."""

from itertools import combinations, permutations

import pytest

from cyclealign_trl import agreement_ranking


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
