"""What the rows of a log add up to."""

import pytest

from cyclealign_trl.cycle.interaction_log import Expense, summarize


def row(step, agreement=(0, 1), failure=None, ranks=(0, 1, 2), **usage):
    known = {"prompt_tokens": 10, "completion_tokens": 5, "cost": None, "attempts": 1, "cached": False}
    return {
        "step": step,
        "black_box_order": None if failure else [0, 1, 2],
        "agreement": None if failure else list(agreement),
        "ranks": None if failure else list(ranks),
        "failure": failure,
        "usage": None if failure == "duplicate_completions" else known | usage,
    }


def test_counts():
    rows = [
        row(0),
        row(0, agreement=[0, 1, 2]),
        row(1, agreement=[2]),
        row(1, agreement=[0, 1], ranks=[0, 0, 1]),  # a tie shows no order
        row(1, failure="timeout"),
        row(2, failure="timeout"),
        row(2, failure="unparsable"),
        row(3, failure="duplicate_completions"),
    ]
    summary = summarize(rows, min_agreement=2)
    assert (summary.interactions, summary.rankings, summary.agreed) == (8, 4, 2)
    assert summary.failures == {"timeout": 2, "unparsable": 1}
    assert summary.skipped == {"duplicate_completions": 1}
    assert summary.billed == Expense(7, 70, 35)  # a failed answer is paid for, too
    assert summarize(rows, min_agreement=3).agreed == 1


def test_what_came_from_the_cache_is_not_billed():
    summary = summarize([row(0, cost=0.5), row(1, cost=0.5, cached=True)], 2)
    assert summary.billed == Expense(1, 10, 5, 0.5, 1)
    assert summary.cached == Expense(1, 10, 5, 0.5, 1)


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ([None, None], "unpriced"),
        ([0.75, 0.5], "$1.25"),
        ([1000, 234.5], "$1,234.50"),
        ([0.00001, 0.00001], "$2e-05"),
        ([0.0, 0.0], "$0"),
        ([1.5, None], "$1.50 for 1 of 2 answers, the others unpriced"),
    ],
)
def test_an_unknown_cost_is_never_zero(costs, said):
    assert summarize([row(0, cost=cost) for cost in costs], 2).billed.cost_text == said


def test_the_curve_weighs_rankings_alike():
    summary = summarize([row(0, [0]), row(0, [0, 1, 2]), row(1, [0, 1, 2]), row(5, [0])], 2)
    assert summary.curve(10) == [(0, pytest.approx(2 / 3)), (1, 1.0), (5, pytest.approx(1 / 3))]
    assert summary.curve(2) == [(1, pytest.approx(7 / 9)), (5, pytest.approx(1 / 3))]
    assert summary.curve(1) == [(5, pytest.approx(2 / 3))]
    assert summarize([row(step) for step in range(1000)], 2).curve(100)[-1] == (999, pytest.approx(2 / 3))
    assert summarize([row(0, failure="timeout")], 2).curve(10) == []
