"""The metric `reward_score`: golden values, offline and alone, fed in batches, combined, in several processes."""

import multiprocessing
import shutil
from pathlib import Path

import evaluate
import numpy as np
import pytest

import cyclealign_trl

SCRIPT = Path(cyclealign_trl.__file__).parent / "evaluation" / "metrics" / "reward_score.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A copy of the metric in a folder of its own, with its own caches and without a network."""
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    (tmp_path / "reward_score").mkdir()
    return shutil.copy(SCRIPT, tmp_path / "reward_score" / "reward_score.py")


def load(script, cache, **options):
    return evaluate.load(str(script), cache_dir=str(cache), **options)


def test_figures_equal_the_reference(script, tmp_path, golden):
    case = golden["evaluation"]["sigmoid_aggregate"]
    subsets = case["raw_rewards_per_subset"]
    rewards = [reward for subset in subsets for reward in subset]
    groups = [f"s{index}" for index, subset in enumerate(subsets) for _ in subset]
    metric = load(script, tmp_path / "cache")
    result = metric.compute(predictions=rewards, groups=groups)
    assert [group["mean"] for group in result["groups"].values()] == pytest.approx(case["subset_scores"])
    assert (result["micro"], result["macro"]) == pytest.approx((case["total_micro"], case["total_macro"]))
    assert [group["count"] for group in result["groups"].values()] == [3, 2, 1, 4]
    for figures, name in ((result, "micro"), (result, "macro"), (result["groups"]["s3"], "mean")):
        low, high = figures[f"{name}_interval"]
        assert low < figures[name] < high
    for reward, group in zip(rewards, groups, strict=True):
        metric.add_batch(predictions=[reward], groups=[group])
    assert metric.compute() == result
    raw = metric.compute(predictions=rewards, groups=groups, transform="none")
    assert raw["micro"] == pytest.approx(np.mean(rewards))


def test_extreme_rewards_saturate_and_invalid_ones_raise(script, tmp_path):
    metric = load(script, tmp_path / "cache")
    result = metric.compute(predictions=[-1e4, 1e4], groups=["low", "high"])
    assert [group["mean"] for group in result["groups"].values()] == [0.0, 100.0]
    with pytest.raises(ValueError, match="finite numbers, got nan"):
        metric.compute(predictions=[float("nan")], groups=["x"])
    with pytest.raises(ValueError, match=r"'sigmoid', 'none'.*got 'log'"):
        metric.compute(predictions=[1.0], groups=["x"], transform="log")


def compute_share(script, cache, process_id, shares, results):
    """Compute the metric in one of several processes, each with its share of the predictions."""
    metric = load(script, cache, num_process=len(shares), process_id=process_id, experiment_id="shared")
    rewards, groups = shares[process_id]
    metric.add_batch(predictions=rewards, groups=groups)
    results.put((process_id, metric.compute()))


def test_several_processes_share_a_cache(script, tmp_path):
    rng = np.random.default_rng(0)
    rewards, groups = rng.normal(size=90).tolist(), ["a", "b", "c"] * 30
    alone = load(script, tmp_path / "alone").compute(predictions=rewards, groups=groups)
    shares = [(rewards[start::3], groups[start::3]) for start in range(3)]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=compute_share, args=(script, tmp_path / "cache", index, shares, results))
        for index in range(3)
    ]
    for process in processes:
        process.start()
    by_process = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert by_process[1] is by_process[2] is None
    assert by_process[0]["count"] == 90
    for name in "abc":
        assert by_process[0]["groups"][name]["mean"] == pytest.approx(alone["groups"][name]["mean"])
    assert by_process[0]["micro"] == pytest.approx(alone["micro"])


def test_can_be_combined(script, tmp_path):
    combined = evaluate.combine([load(script, tmp_path / "cache")])
    assert combined.compute(predictions=[0.0], groups=["x"])["micro"] == pytest.approx(50.0)
