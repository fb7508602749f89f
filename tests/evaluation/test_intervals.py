"""Coverage, resampling and reproducibility of bootstrap intervals."""

import random

import numpy as np
import pytest

from cyclealign_trl.evaluation.intervals import bootstrap_ratios
from tests.evaluation.test_metrics import agreement, random_ranks


def test_interval_of_a_mean_approximates_the_normal_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 1))
    [(mean, (low, high))] = bootstrap_ratios(values, np.ones((400, 1)), 2000, 0.9, 0)
    error = 1.645 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.1 * error)


def test_whole_prompts_are_resampled():
    # 10 prompts with 105 pairs each, all correct or all wrong: the interval is as wide as for 10 values.
    predictions = [list(range(15))] * 5 + [list(range(15))[::-1]] * 5
    low, high = agreement(predictions, [list(range(15))] * 10)["pairwise_accuracy_interval"]
    assert low <= 0.2
    assert high >= 0.8


def test_interval_coverage_matches_the_confidence_level():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        values = rng.binomial(1, 0.7, size=(60, 1)).astype(float)
        [(_, (low, high))] = bootstrap_ratios(values, np.ones((60, 1)), 200, 0.9, seed)
        hits += low <= 0.7 <= high
    assert 0.82 < hits / 200 < 0.97


def test_intervals_depend_only_on_the_seed():
    rng = random.Random(0)
    rows = [[random_ranks(rng, 4), random_ranks(rng, 4, ties=False)] for _ in range(30)]
    predictions, references = zip(*rows, strict=True)
    state = np.random.get_state()[1].copy()
    first = agreement(predictions, references, seed=1)
    assert agreement(predictions, references, seed=1) == first
    other = agreement(predictions, references, seed=2)
    assert other["top_1"] == first["top_1"]
    assert other["kendall_tau_interval"] != first["kendall_tau_interval"]
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize(
    ("options", "message"), [({"confidence_level": 95}, "between 0 and 1, got 95"), ({"n_resamples": 0}, "got 0")]
)
def test_options_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=message):
        agreement([[0, 1]], [[0, 1]], **options)
