"""Borda count with weights and ties, agreement and usage."""

import pytest

from cyclealign_trl.rankers.merging import borda_ranks, mean_tau, total_usage
from cyclealign_trl.types import RankingFailure, RankingResult, Usage


def test_a_heavier_ranking_outvotes_two_others():
    rankings = [(0, 1, 2), (2, 1, 0), (2, 1, 0)]
    assert borda_ranks(rankings) == (2, 1, 0)
    assert borda_ranks(rankings, [3, 1, 1]) == (0, 1, 2)
    assert borda_ranks(rankings, [2, 1, 1]) == (0, 0, 0)


def test_tied_completions_share_the_mean_of_their_positions():
    # A ranking with ties gives as many points as one without: 0.5, 0.5, 2.5, 2.5 against 2, 3, 1, 0.
    assert borda_ranks([(0, 0, 1, 1), (2, 3, 1, 0)]) == (0, 1, 1, 0)
    assert borda_ranks([(0, 0, 0), (1, 0, 2)]) == (1, 0, 2)


def test_sums_that_are_equal_as_decimals_are_ties():
    assert 0.1 + 0.2 != 0.3
    assert borda_ranks([(0, 1), (0, 1), (1, 0)], [0.1, 0.2, 0.3]) == (0, 0)
    assert borda_ranks([(0, 1), (0, 1), (1, 0)], [0.1, 0.2, 0.29]) == (0, 1)


def test_agreement_leaves_out_pairs_without_an_order():
    assert mean_tau([(0, 1, 2), (0, 1, 2), (2, 1, 0)]) == pytest.approx(-1 / 3)
    assert mean_tau([(0, 1, 2), (0, 1, 2), (0, 0, 0)]) == 1.0
    assert mean_tau([(0, 0), (0, 1)]) is None
    assert mean_tau([(0, 1)]) is None


def test_failures_are_paid_for_too():
    assert total_usage([RankingResult((0, 1), usage=Usage(3, 1)), RankingFailure("x", usage=Usage(2, 0))]) == Usage(
        5, 1, attempts=2
    )
    assert total_usage([RankingResult((0, 1))]) is None
