"""Agreement of two rankings against golden values and brute force, its rate, and its ties."""

from itertools import combinations, permutations

import pytest

from cyclealign_trl import agreement_ranking
from cyclealign_trl.cycle.agreement import agreement_rate, without_ties


def test_agreement_matches_golden_values(golden):
    cases = [case for group in golden["lcs_agreement"].values() for case in group]
    assert len(cases) == 125
    for case in cases:
        for black, white in ((case["black"], case["white"]), (case["black_raw"], case["white_raw"])):
            assert agreement_ranking(black, white) == tuple(case["agreement"]), case


def brute_force(black, white):
    """Return the longest common subsequence with the smallest positions in `black`, by trying all."""
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
def test_agreement_of_every_pair_of_rankings_matches_brute_force(num_completions):
    black = tuple(range(num_completions))
    for white in permutations(black):
        assert agreement_ranking(black, white) == brute_force(black, white)


def test_rankings_that_share_nothing_have_no_agreement():
    assert agreement_ranking([], [0, 1]) == ()
    assert agreement_ranking([0, 1], [2, 3]) == ()


def test_identical_rankings_agree_entirely():
    assert agreement_ranking([2, 0, 1], [2, 0, 1]) == (2, 0, 1)


def test_the_rate_is_the_share_of_the_ranked_completions():
    assert agreement_rate((3, 1), [3, 0, 1, 2]) == 0.5
    assert agreement_rate([2, 0, 1], [2, 0, 1]) == 1.0
    assert agreement_rate((), [0, 1]) == 0.0


@pytest.mark.parametrize(
    ("agreement", "ranks", "expected"),
    [
        ((2, 0, 1), (1, 2, 0), (2, 0, 1)),
        ((0, 1, 2), (0, 0, 1), (0, 2)),
        ((1, 0, 2), (0, 0, 0), (1,)),
        ((3, 1), {1: 4, 3: 2}, (3, 1)),
        ((), (0, 1), ()),
    ],
)
def test_the_first_completion_of_each_rank_remains_without_ties(agreement, ranks, expected):
    assert without_ties(agreement, ranks) == expected
