"""The metrics against brute force, and as `evaluate` loads, feeds and combines them."""

import itertools
import math
import random
import shutil
import statistics
from pathlib import Path

import evaluate
import numpy as np
import pytest

import cyclealign_trl
from cyclealign_trl.evaluation.intervals import ratios
from cyclealign_trl.evaluation.metrics.position_bias import PositionBias
from cyclealign_trl.evaluation.metrics.ranking_agreement import FIGURES, RankingAgreement

METRICS = Path(cyclealign_trl.__file__).parent / "evaluation" / "metrics"


def agreement(predictions, references, **options):
    metric = RankingAgreement(keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references, **options)


def bias(predictions, **options):
    return PositionBias(keep_in_memory=True).compute(predictions=predictions, **options)


def random_ranks(rng, size, ties=True):
    return [rng.randrange(size) for _ in range(size)] if ties else rng.sample(range(size), size)


def brute_force(predictions, references):
    """The four figures from their definitions, every ordering and every coin toss spelt out."""
    right, pairs, exact, top, taus = 0.0, 0, [], [], []
    for ranks, reference in zip(predictions, references, strict=True):
        strict = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if reference[i] < reference[j]]
        if not strict:
            continue
        pairs += len(strict)
        right += sum((ranks[i] < ranks[j]) + 0.5 * (ranks[i] == ranks[j]) for i, j in strict)
        exact.append(all(ranks[i] < ranks[j] for i, j in strict))
        winners = [i for i in range(len(ranks)) if all(ranks[i] <= other for other in ranks)]
        best = {i for i in range(len(ranks)) if all(reference[i] <= other for other in reference)}
        top.append(len(best.intersection(winners)) / len(winners))
        signs = [
            (np.sign(ranks[i] - ranks[j]), np.sign(reference[i] - reference[j]))
            for i, j in itertools.combinations(range(len(ranks)), 2)
        ]
        if any(one for one, _ in signs):
            norm = math.sqrt(sum(one**2 for one, _ in signs) * sum(other**2 for _, other in signs))
            taus.append(sum(one * other for one, other in signs) / norm)
    return {
        "pairwise_accuracy": right / pairs,
        "exact_match": statistics.fmean(exact),
        "top_1": statistics.fmean(top),
        "kendall_tau": statistics.fmean(taus),
    }


@pytest.mark.parametrize("ties", [True, False])
def test_the_figures_of_agreement_equal_brute_force(ties):
    rng = random.Random(0)
    sizes = [rng.randint(2, 7) for _ in range(60)]
    references = [random_ranks(rng, size) for size in sizes]
    predictions = [
        list(reference) if rng.random() < 0.3 else random_ranks(rng, len(reference), ties) for reference in references
    ]
    result = agreement(predictions, references)
    assert {name: result[name] for name in FIGURES} == pytest.approx(brute_force(predictions, references))
    strict = [len(set(reference)) > 1 for reference in references]
    assert result["num_prompts"] == sum(strict)
    for name in FIGURES:
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high


def test_a_tie_is_worth_half_and_what_the_reference_ties_is_free():
    assert agreement([[0, 0]], [[0, 1]])["pairwise_accuracy"] == 0.5
    assert agreement([[0, 0]], [[0, 1]])["top_1"] == 0.5
    assert agreement([[0, 0]], [[0, 1]])["exact_match"] == 0.0
    free = agreement([[1, 0, 2, 3]], [[0, 0, 1, 1]])
    assert (free["exact_match"], free["top_1"], free["num_pairs"]) == (1.0, 1.0, 4)


@pytest.mark.parametrize(("predictions", "references"), [([], []), ([[0, 1]], [[0, 0]])])
def test_without_an_ordered_pair_there_is_no_figure(predictions, references):
    result = agreement(predictions, references)
    assert (result["num_prompts"], result["num_pairs"]) == (0, 0)
    assert all(result[name] is result[f"{name}_interval"] is None for name in FIGURES)


def test_another_number_of_ranks_than_of_reference_ranks_raises():
    with pytest.raises(ValueError, match="got 2 and 3 ranks"):
        agreement([[0, 1]], [[0, 1, 2]])


# Intervals


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 1))
    [(mean, (low, high))] = ratios(values, np.ones((400, 1)), 2000, 0.9, 0)
    error = 1.645 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.1 * error)


def test_prompts_are_drawn_whole():
    """Ten prompts of a hundred pairs each, all right or all wrong: the interval is that of ten, not of a thousand."""
    predictions = [list(range(15))] * 5 + [list(range(15))[::-1]] * 5
    low, high = agreement(predictions, [list(range(15))] * 10)["pairwise_accuracy_interval"]
    assert low <= 0.2
    assert high >= 0.8


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        values = rng.binomial(1, 0.7, size=(60, 1)).astype(float)
        [(_, (low, high))] = ratios(values, np.ones((60, 1)), 200, 0.9, seed)
        hits += low <= 0.7 <= high
    assert 0.82 < hits / 200 < 0.97


def test_intervals_depend_on_the_seed_alone():
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
    ("options", "said"), [({"confidence_level": 95}, "between 0 and 1, got 95"), ({"n_resamples": 0}, "got 0")]
)
def test_options_out_of_range_raise(options, said):
    with pytest.raises(ValueError, match=said):
        agreement([[0, 1]], [[0, 1]], **options)


# Position bias


def judged(rng, size, share):
    """Ranks by shown position of a judge whose opinion is random; in a share of cases the first one shown wins."""
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
        there = [ranks for ranks in rankings if len(ranks) > position]
        placed = [
            sum((ranks[position] < r) + 0.5 * (ranks[position] == r) for i, r in enumerate(ranks) if i != position)
            / (len(ranks) - 1)
            for ranks in there
        ]
        won = [(ranks[position] == min(ranks)) / ranks.count(min(ranks)) for ranks in there]
        assert result["placement_by_position"][position] == pytest.approx(statistics.fmean(placed))
        assert result["first_place_by_position"][position] == pytest.approx(statistics.fmean(won))
        assert result["expected_by_position"][position] == pytest.approx(
            statistics.fmean(1 / len(ranks) for ranks in there)
        )


def test_the_p_value_is_that_of_all_sign_flips():
    rankings = [[0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [1, 0]]
    # Of 64 equally likely signs, 14 make a sum of 4 or more in size: 2 * (1 + 6).
    assert bias(rankings, n_resamples=20_000)["p_value"] == pytest.approx(14 / 64, abs=0.01)


def test_chance_alone_is_called_bias_as_often_as_it_may_be():
    rng = random.Random(5)
    p_values = [bias([judged(rng, 4, 0.0) for _ in range(50)], n_resamples=200)["p_value"] for _ in range(200)]
    assert sum(p < 0.05 for p in p_values) / 200 < 0.09
    assert sum(p < 0.5 for p in p_values) / 200 > 0.35  # it is no test that never says anything


@pytest.mark.parametrize("size", [2, 3, 5, 8, 34])
def test_a_fifth_of_the_first_places_is_found_out(size):
    rng = random.Random(size)
    result = bias([judged(rng, size, 0.2) for _ in range(400)])
    assert result["p_value"] < 0.01
    assert result["first_place_by_position"][0] > result["expected_by_position"][0] + 0.05


def test_the_last_place_and_a_slight_slope_are_found_out_too():
    rng = random.Random(0)
    last = [judged(rng, 5, 0.2)[::-1] for _ in range(300)]
    assert bias(last)["p_value"] < 0.01
    sloped = [np.argsort(np.argsort([rng.gauss(0, 1) + 0.15 * i for i in range(6)])).tolist() for _ in range(200)]
    result = bias(sloped)
    assert result["p_value"] < 0.01
    assert result["earlier_preferred_interval"][0] > 0.5


def test_opinion_cancels_out_of_two_rankings_of_one_prompt():
    rng = random.Random(0)
    once = [judged(rng, 4, 0.0) for _ in range(30)]
    twice = [ranks for one in once for ranks in (one, one[::-1])]
    ids = [number for number in range(30) for _ in range(2)]
    result = bias(twice, prompt_ids=ids)
    assert (result["earlier_preferred"], result["p_value"]) == (0.5, 1.0)
    # One prompt in ten where the first one shown wins both times is enough to be seen.
    for number in range(0, 30, 3):
        twice[2 * number] = twice[2 * number + 1] = [0, 1, 2, 3]
    assert bias(twice, prompt_ids=ids)["p_value"] < 0.01


def test_a_single_completion_has_no_position():
    with pytest.raises(ValueError, match="at least 2 completions; got 1"):
        bias([[0]])


# As evaluate uses them


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`evaluate.load` of a copy that stands alone in a folder, offline, with caches of its own."""
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")

    def load_copy(name, **options):
        script = tmp_path / name / f"{name}.py"
        script.parent.mkdir(exist_ok=True)
        shutil.copy(METRICS / f"{name}.py", script)
        return evaluate.load(str(script), cache_dir=str(tmp_path / "cache"), **options)

    return load_copy


def test_a_metric_loads_alone_and_takes_batches(load):
    metric = load("ranking_agreement")
    assert "Kendall" in metric.description
    rows = ([[0, 1, 2], [1, 0]], [[0, 2, 1], [0, 1]])
    at_once = metric.compute(predictions=rows[0], references=rows[1])
    for prediction, reference in zip(*rows, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute() == at_once == agreement(*rows)
    metric.add(prediction=rows[0][0], reference=rows[1][0])
    assert metric.compute(confidence_level=0.5)["num_pairs"] == 3


def test_the_metrics_combine(load):
    combined = evaluate.combine([load("ranking_agreement"), load("position_bias")])
    rows = {"predictions": [[0, 1, 2], [1, 0]], "references": [[0, 2, 1], [0, 1]]}
    result = combined.compute(**rows, n_resamples=50)
    assert result == agreement(*rows.values(), n_resamples=50) | bias(rows["predictions"], n_resamples=50)


def test_net_win_rate_is_the_papers(golden):
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
