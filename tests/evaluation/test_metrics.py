"""The metrics against brute force, and loaded, fed and combined by `evaluate`."""

import itertools
import random
import shutil
import statistics
from pathlib import Path

import evaluate
import numpy as np
import pytest

import cyclealign_trl
from cyclealign_trl.evaluation.metrics.position_bias import PositionBias
from cyclealign_trl.evaluation.metrics.ranking_agreement import FIGURES, RankingAgreement
from tests.evaluation.stubs import brute_force_agreement

METRICS = Path(cyclealign_trl.__file__).parent / "evaluation" / "metrics"


def agreement(predictions, references, **options):
    metric = RankingAgreement(keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references, **options)


def bias(predictions, **options):
    return PositionBias(keep_in_memory=True).compute(predictions=predictions, **options)


def random_ranks(rng, size, ties=True):
    return [rng.randrange(size) for _ in range(size)] if ties else rng.sample(range(size), size)


@pytest.mark.parametrize("ties", [True, False])
def test_agreement_equals_brute_force(ties):
    rng = random.Random(0)
    sizes = [rng.randint(2, 7) for _ in range(60)]
    references = [random_ranks(rng, size) for size in sizes]
    predictions = [
        list(reference) if rng.random() < 0.3 else random_ranks(rng, len(reference), ties) for reference in references
    ]
    result = agreement(predictions, references)
    assert {name: result[name] for name in FIGURES} == pytest.approx(brute_force_agreement(predictions, references))
    strict = [len(set(reference)) > 1 for reference in references]
    assert result["num_prompts"] == sum(strict)
    for name in FIGURES:
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high


def test_tie_of_the_ranking_counts_half_and_ties_of_the_reference_do_not_count():
    assert agreement([[0, 0]], [[0, 1]])["pairwise_accuracy"] == 0.5
    assert agreement([[0, 0]], [[0, 1]])["top_1"] == 0.5
    assert agreement([[0, 0]], [[0, 1]])["exact_match"] == 0.0
    result = agreement([[1, 0, 2, 3]], [[0, 0, 1, 1]])
    assert (result["exact_match"], result["top_1"], result["num_pairs"]) == (1.0, 1.0, 4)


@pytest.mark.parametrize(("predictions", "references"), [([], []), ([[0, 1]], [[0, 0]])])
def test_figures_are_none_without_an_ordered_pair(predictions, references):
    result = agreement(predictions, references)
    assert (result["num_prompts"], result["num_pairs"]) == (0, 0)
    assert all(result[name] is result[f"{name}_interval"] is None for name in FIGURES)


def test_different_numbers_of_ranks_raise():
    with pytest.raises(ValueError, match="got 2 and 3 ranks"):
        agreement([[0, 1]], [[0, 1, 2]])


def random_judge(rng, size, share):
    """Return random ranks by shown position; in a share of cases, the completion shown first wins."""
    order = rng.sample(range(size), size)
    if rng.random() < share:
        order.remove(0)
        order.insert(0, 0)
    return [order.index(position) for position in range(size)]


def test_figures_by_position_equal_brute_force():
    rng = random.Random(3)
    rankings = [random_ranks(rng, rng.randint(2, 5)) for _ in range(40)]
    result = bias(rankings)
    earlier = [
        statistics.fmean(
            (ranks[i] < ranks[j]) + 0.5 * (ranks[i] == ranks[j])
            for i, j in itertools.combinations(range(len(ranks)), 2)
        )
        for ranks in rankings
    ]
    assert result["earlier_preferred"] == pytest.approx(statistics.fmean(earlier))
    for position in range(5):
        long_enough = [ranks for ranks in rankings if len(ranks) > position]
        placements = [
            sum((ranks[position] < r) + 0.5 * (ranks[position] == r) for i, r in enumerate(ranks) if i != position)
            / (len(ranks) - 1)
            for ranks in long_enough
        ]
        wins = [(ranks[position] == min(ranks)) / ranks.count(min(ranks)) for ranks in long_enough]
        assert result["placement_by_position"][position] == pytest.approx(statistics.fmean(placements))
        assert result["first_place_by_position"][position] == pytest.approx(statistics.fmean(wins))
        assert result["expected_by_position"][position] == pytest.approx(
            statistics.fmean(1 / len(ranks) for ranks in long_enough)
        )


def test_p_value_approximates_all_sign_flips():
    rankings = [[0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [1, 0]]
    # 14 of the 64 equally likely sign patterns have a sum of at least 4 in absolute value: 2 * (1 + 6).
    assert bias(rankings, n_resamples=20_000)["p_value"] == pytest.approx(14 / 64, abs=0.01)


def test_p_values_of_an_unbiased_judge_are_calibrated():
    rng = random.Random(5)
    p_values = [bias([random_judge(rng, 4, 0.0) for _ in range(50)], n_resamples=200)["p_value"] for _ in range(200)]
    assert sum(p < 0.05 for p in p_values) / 200 < 0.09
    assert sum(p < 0.5 for p in p_values) / 200 > 0.35  # the test is not too conservative


@pytest.mark.parametrize("size", [2, 3, 5, 8, 34])
def test_finds_a_judge_that_puts_the_first_shown_on_top_in_a_fifth_of_cases(size):
    rng = random.Random(size)
    result = bias([random_judge(rng, size, 0.2) for _ in range(400)])
    assert result["p_value"] < 0.01
    assert result["first_place_by_position"][0] > result["expected_by_position"][0] + 0.05


def test_finds_preferences_for_the_last_place_and_for_earlier_places():
    rng = random.Random(0)
    last = [random_judge(rng, 5, 0.2)[::-1] for _ in range(300)]
    assert bias(last)["p_value"] < 0.01
    earlier = [np.argsort(np.argsort([rng.gauss(0, 1) + 0.15 * i for i in range(6)])).tolist() for _ in range(200)]
    result = bias(earlier)
    assert result["p_value"] < 0.01
    assert result["earlier_preferred_interval"][0] > 0.5


def test_opinion_cancels_out_in_two_rankings_of_the_same_prompt():
    rng = random.Random(0)
    rankings = [random_judge(rng, 4, 0.0) for _ in range(30)]
    twice = [shown for ranks in rankings for shown in (ranks, ranks[::-1])]
    ids = [number for number in range(30) for _ in range(2)]
    result = bias(twice, prompt_ids=ids)
    assert (result["earlier_preferred"], result["p_value"]) == (0.5, 1.0)
    # It is enough if the completion shown first wins both times for 10 of the 30 prompts.
    for number in range(0, 30, 3):
        twice[2 * number] = twice[2 * number + 1] = [0, 1, 2, 3]
    assert bias(twice, prompt_ids=ids)["p_value"] < 0.01


def test_ranking_of_a_single_completion_raises():
    with pytest.raises(ValueError, match="at least 2 completions; got 1"):
        bias([[0]])


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that loads a copy of a metric from its own folder, offline and with its own caches."""
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")

    def load_copy(name, **options):
        script = tmp_path / name / f"{name}.py"
        script.parent.mkdir(exist_ok=True)
        shutil.copy(METRICS / f"{name}.py", script)
        return evaluate.load(str(script), cache_dir=str(tmp_path / "cache"), **options)

    return load_copy


def test_metric_loads_from_its_file_and_takes_batches(load):
    metric = load("ranking_agreement")
    assert "Kendall" in metric.description
    rows = ([[0, 1, 2], [1, 0]], [[0, 2, 1], [0, 1]])
    at_once = metric.compute(predictions=rows[0], references=rows[1])
    for prediction, reference in zip(*rows, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute() == at_once == agreement(*rows)
    metric.add(prediction=rows[0][0], reference=rows[1][0])
    assert metric.compute(confidence_level=0.5)["num_pairs"] == 3


def test_metrics_can_be_combined(load):
    combined = evaluate.combine([load("ranking_agreement"), load("position_bias")])
    rows = {"predictions": [[0, 1, 2], [1, 0]], "references": [[0, 2, 1], [0, 1]]}
    result = combined.compute(**rows, n_resamples=50)
    assert result == agreement(*rows.values(), n_resamples=50) | bias(rows["predictions"], n_resamples=50)


def test_net_win_rate_equals_the_formula_of_the_paper(golden):
    metric = evaluate.load(str(METRICS / "net_win_rate.py"))
    for case in golden["aligner"]["win_rate_omega"]:
        verdicts = [verdict for verdict in ("win", "tie", "lose") for _ in range(case[verdict])]
        result = metric.compute(predictions=verdicts)
        assert result["net_win_rate"] == pytest.approx(case["omega_percent"])
        low, high = result["net_win_rate_interval"]
        assert low <= result["net_win_rate"] <= high
        assert {verdict: result[verdict] for verdict in ("win", "tie", "lose")} == {
            verdict: case[verdict] for verdict in ("win", "tie", "lose")
        }
    with pytest.raises(ValueError, match="'win', 'tie', 'lose'; got 'draw'"):
        metric.compute(predictions=["win", "draw"])
