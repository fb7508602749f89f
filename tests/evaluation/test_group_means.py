"""Means of groups: the paper's totals, coverage of the intervals, paired differences, missing values."""

import numpy as np
import pytest

from cyclealign_trl.evaluation.intervals import bootstrap_group_means

SIZES = {"a": 120, "b": 80, "c": 60}


def means_of(values, groups, weights=None, n_resamples=500, seed=0):
    values = np.asarray(values, dtype=float)
    return bootstrap_group_means(values.reshape(len(groups), -1), groups, weights, n_resamples, 0.95, seed)


def test_the_totals_of_the_paper_are_sample_weighted_means_of_its_cells(golden):
    counts = golden["evaluation"]["test_counts"]
    rows = golden["evaluation"]["reported_table1"]
    assert len(rows) == 13
    for name, (*cells, total) in rows.items():
        [(micro, _)] = means_of(cells, list(counts), counts, n_resamples=1).micro
        assert micro == pytest.approx(total, abs=0.005), name
        assert micro == pytest.approx(golden["evaluation"]["micro_average"][name], abs=1e-9)
    # The same from the single prompts, all of which have the mean of their subset
    groups = [group for group, count in counts.items() for _ in range(count)]
    columns = np.array([np.repeat(row[:4], list(counts.values())) for row in rows.values()]).T
    totals = [value for value, _ in means_of(columns, groups, n_resamples=1).micro]
    assert totals == pytest.approx([row[4] for row in rows.values()], abs=0.005)


def test_95_percent_intervals_cover_the_truth_in_95_percent_of_simulated_data_sets():
    groups = [name for name, size in SIZES.items() for _ in range(size)]
    rng = np.random.default_rng(0)
    # Rewards of two models, skewed like sigmoids of rewards, which share the difficulty of their prompts
    hits = np.zeros(3)
    for seed in range(1000):
        difficulty = rng.normal(np.repeat([-1.0, 0.0, 1.5], list(SIZES.values())), 1.0)
        first, second = (100 / (1 + np.exp(-difficulty - rng.normal(bias, 1.0, len(groups)))) for bias in (0.0, 0.4))
        estimates = means_of(np.stack([first, second, second - first], 1), groups, SIZES, 400, seed).micro
        hits += [low <= truth <= high for truth, (_, (low, high)) in zip(TRUTH, estimates, strict=True)]
    assert (abs(hits / 1000 - 0.95) <= 0.02).all(), hits


def expected_reward(location):
    """Return the mean of 100 * sigmoid over a normal distribution with the variance of two standard normals."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return 100 * (weights / (1 + np.exp(-location - np.sqrt(2) * nodes))).sum() / weights.sum()


TRUTH = [
    sum(size * expected_reward(mean + bias) for size, mean in zip(SIZES.values(), (-1.0, 0.0, 1.5), strict=True))
    / sum(SIZES.values())
    for bias in (0.0, 0.4)
]
TRUTH.append(TRUTH[1] - TRUTH[0])


def test_paired_differences_are_narrower_than_unpaired_ones():
    rng = np.random.default_rng(1)
    prompts = rng.normal(50, 20, 200)
    first, second = prompts + rng.normal(0, 1, 200), prompts + 1 + rng.normal(0, 1, 200)
    groups = ["x"] * 200
    [(difference, (low, high))] = means_of(second - first, groups).micro
    assert difference == pytest.approx(second.mean() - first.mean())
    assert 0 < low < difference < high < 2
    [(_, wide)] = means_of(first, groups).micro
    assert wide[1] - wide[0] > 10 * (high - low)


def test_groups_are_resampled_alone_and_missing_values_are_left_out():
    values = [[1.0, np.nan], [3.0, 5.0], [7.0, np.nan], [7.0, np.nan]]
    means = means_of(values, ["a", "a", "b", "b"], {"a": 3, "b": 1})
    assert means.groups["a"][0][0] == 2.0
    assert means.groups["a"][1][0] == 5.0
    assert means.groups["b"] == [(7.0, (7.0, 7.0)), (None, None)]
    assert means.micro[0][0] == pytest.approx((3 * 2 + 7) / 4)
    assert means.macro[0][0] == pytest.approx(4.5)
    assert means.micro[1] == means.macro[1] == (None, None)
    assert means_of([1.0, 2.0, 4.0], ["a", "a", "b"]).micro[0][0] == pytest.approx(7 / 3)


def test_the_interval_is_that_of_a_plain_stratified_bootstrap():
    rng = np.random.default_rng(2)
    values, groups = rng.normal(size=100), ["a"] * 70 + ["b"] * 30
    [(_, interval)] = means_of(values, groups, n_resamples=4000).micro
    draws = [np.concatenate([rng.choice(values[:70], 70), rng.choice(values[70:], 30)]).mean() for _ in range(4000)]
    assert interval == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.02)


def test_means_depend_only_on_the_seed_and_need_valid_options():
    values, groups = np.arange(20.0), ["a", "b"] * 10
    assert means_of(values, groups) == means_of(values, groups)
    assert means_of(values, groups).micro != means_of(values, groups, seed=1).micro
    empty = bootstrap_group_means(np.zeros((0, 2)), [], None, 10, 0.95, 0)
    assert (empty.groups, empty.micro, empty.macro) == ({}, [(None, None)] * 2, [(None, None)] * 2)
    for options, message in (((0, 0.95), "n_resamples must be at least 1"), ((10, 95), "between 0 and 1, got 95")):
        with pytest.raises(ValueError, match=message):
            bootstrap_group_means(values[:, None], groups, None, *options, 0)
