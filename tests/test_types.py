"""Rankings and demonstrations validate their orders."""

import pytest

from cyclealign_trl import Demonstration, RankingResult


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (1, 2, 3), (0, 1, 2, 3)])
def test_a_demonstrations_order_must_be_a_permutation(order):
    with pytest.raises(ValueError, match=r"each of its 3 completions once, as indices from 0 to 2"):
        Demonstration("Q", ("a", "b", "c"), order)


def test_a_demonstration_needs_two_completions():
    with pytest.raises(ValueError, match="at least 2 completions; got 1"):
        Demonstration("Q", ("a",), (0,))


def test_a_demonstration_accepts_lists():
    assert Demonstration("Q", ["a", "b"], [1, 0]) == Demonstration("Q", ("a", "b"), (1, 0))


def test_a_results_order_must_be_a_permutation_with_one_rank_each():
    with pytest.raises(ValueError, match=r"got \[0, 2\]"):
        RankingResult((0, 2))
    with pytest.raises(ValueError, match="2 completions came with 3 ranks"):
        RankingResult((0, 1), ranks=(0, 1, 2))


def test_ranks_default_to_the_order():
    assert RankingResult((2, 0, 1)).resolved_ranks == (1, 2, 0)
    assert RankingResult((2, 0, 1), ranks=(1, 1, 0)).resolved_ranks == (1, 1, 0)
