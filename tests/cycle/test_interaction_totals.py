"""Totals of a run's interactions."""

import json
from statistics import fmean

import pytest

from cyclealign_trl.cycle.interaction_log import InteractionLog
from cyclealign_trl.cycle.interaction_totals import MAX_BINS, Expense, InteractionTotals, RunningTotals, summarize
from tests.cycle.stubs import make_trainer


def row(step, agreement=(0, 1), failure=None, ranks=(0, 1, 2), **usage):
    """Return a row with the columns `SUMMARY_COLUMNS`."""
    default_usage = {"prompt_tokens": 10, "completion_tokens": 5, "cost": None, "attempts": 1, "cached": False}
    return {
        "step": step,
        "black_box_order": None if failure else [0, 1, 2],
        "agreement": None if failure else list(agreement),
        "ranks": None if failure else list(ranks),
        "failure": failure,
        "usage": None if failure == "duplicate_completions" else default_usage | usage,
    }


def test_rankings_failures_and_skipped_prompts_are_counted():
    rows = [
        row(0),
        row(0, agreement=[0, 1, 2]),
        row(1, agreement=[2]),
        row(1, agreement=[0, 1], ranks=[0, 0, 1]),  # a tie gives no order
        row(1, failure="timeout"),
        row(2, failure="timeout"),
        row(2, failure="unparsable"),
        row(3, failure="duplicate_completions"),
    ]
    summary = summarize(rows, min_agreement=2)
    assert (summary.interactions, summary.rankings, summary.agreed) == (8, 4, 2)
    assert summary.failures == {"timeout": 2, "unparsable": 1}
    assert summary.skipped == {"duplicate_completions": 1}
    assert summary.billed == Expense(7, 70, 35)  # failed answers are paid for too
    assert summarize(rows, min_agreement=3).agreed == 1


def test_cached_answers_are_not_billed():
    summary = summarize([row(0, cost=0.5), row(1, cost=0.5, cached=True)], 2)
    assert summary.billed == Expense(1, 10, 5, 0.5, 1)
    assert summary.cached == Expense(1, 10, 5, 0.5, 1)


@pytest.mark.parametrize(
    ("costs", "text"),
    [
        ([None, None], "unpriced"),
        ([0.75, 0.5], "$1.25"),
        ([1000, 234.5], "$1,234.50"),
        ([0.00001, 0.00001], "$2e-05"),
        ([0.0, 0.0], "$0"),
        ([1.5, None], "$1.50 for 1 of 2 answers, the others unpriced"),
    ],
)
def test_an_unknown_cost_is_unpriced_rather_than_zero(costs, text):
    assert summarize([row(0, cost=cost) for cost in costs], 2).billed.cost_text == text


def test_points_of_the_curve_are_means_over_rankings():
    summary = summarize([row(0, [0]), row(0, [0, 1, 2]), row(1, [0, 1, 2]), row(5, [0])], 2)
    assert summary.curve(10) == [(0, pytest.approx(2 / 3)), (1, 1.0), (5, pytest.approx(1 / 3))]
    assert summary.curve(2) == [(1, pytest.approx(7 / 9)), (5, pytest.approx(1 / 3))]
    assert summary.curve(1) == [(5, pytest.approx(2 / 3))]
    assert summarize([row(step) for step in range(1000)], 2).curve(100)[-1] == (999, pytest.approx(2 / 3))
    assert summarize([row(0, failure="timeout")], 2).curve(10) == []


# Size and state


def test_the_totals_of_a_long_run_stay_small_and_exact():
    rates = [[0, 1, 2][: 1 + step % 3] for step in range(3_000)]
    totals = InteractionTotals(2)
    sizes = []
    for step, agreement in enumerate(rates):
        totals.add(step, [row(step, agreement)])
        sizes.append(len(json.dumps(totals.state_dict())))
    assert len(totals.bins) <= MAX_BINS
    assert max(sizes) < 40_000
    assert totals.interactions == 3_000
    curve = totals.curve(100)
    assert 50 <= len(curve) <= 100
    start = 0
    for last, rate in curve:
        assert rate == pytest.approx(fmean((len(agreement) / 3) for agreement in rates[start : last + 1]))
        start = last + 1
    assert start == 3_000


@pytest.mark.parametrize("cut", [0, 1, 399, 400, 401, 1000])
def test_totals_continue_from_their_state(cut):
    rows = [
        row(step, [0, 1, 2][: 1 + step % 3], "timeout" if step % 7 == 0 else None, cost=0.1, cached=step % 5 == 0)
        for step in range(1100)
    ]
    whole, first = InteractionTotals(2), InteractionTotals(2)
    for one in rows:
        whole.add(one["step"], [one])
    for one in rows[:cut]:
        first.add(one["step"], [one])
    continued = InteractionTotals.from_state_dict(json.loads(json.dumps(first.state_dict())))
    for one in rows[cut:]:
        continued.add(one["step"], [one])
    assert continued == whole == summarize(rows, 2)


RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "stub_generation": True}


@pytest.fixture
def reads(monkeypatch):
    """Return the list of what reads the log."""
    reads, read = [], InteractionLog.read
    monkeypatch.setattr(
        InteractionLog, "read", lambda self, columns=None: reads.append(columns) or read(self, columns)
    )
    return reads


def test_the_totals_of_a_run_equal_its_log_without_reading_it(tmp_path, reads):
    trainer = make_trainer(tmp_path, **RUN)
    trainer.train()
    trainer.create_model_card()
    assert reads == []
    assert trainer._totals.current() == summarize(trainer.interaction_log.read().to_pylist(), 2)


@pytest.mark.parametrize("earlier_version", [False, True])
def test_a_resumed_run_ends_with_the_same_totals(tmp_path, reads, earlier_version):
    settings = {**RUN, "cache_rankings": False}
    uninterrupted = make_trainer(tmp_path, **settings)
    uninterrupted.train()
    saved = tmp_path / "checkpoint-2" / "cyclealign-0.json"
    if earlier_version:
        state = json.loads(saved.read_text())
        del state["state"]["totals"]
        saved.write_text(json.dumps(state))
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(reads) == earlier_version  # once, for what came before the checkpoint
    assert resumed._totals.current() == uninterrupted._totals.current()
    assert resumed._totals.current().interactions == 12


def test_a_trainer_that_has_not_trained_describes_the_log_of_its_folder(tmp_path):
    trainer = make_trainer(tmp_path, **RUN)
    trainer.train()
    log = InteractionLog(tmp_path)
    assert RunningTotals(log, 2).current() == trainer._totals.current()
    assert RunningTotals(InteractionLog(tmp_path / "empty"), 2).current() == InteractionTotals(2)
