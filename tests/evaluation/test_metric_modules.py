"""Every `evaluate` module: alone, without a network, in batches, and in several processes."""

import multiprocessing
import shutil
from pathlib import Path

import evaluate
import pytest

import cyclealign_trl

FOLDER = Path(cyclealign_trl.__file__).parent / "evaluation" / "metrics"
RANKINGS = [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1], [1, 2, 0], [0, 1, 2]]
REFERENCE = [[0, 1, 2]] * 6
INPUTS = {
    "agreement": {"predictions": RANKINGS, "references": REFERENCE},
    "net_win_rate": {"predictions": ["win", "win", "tie", "lose", "win", "win"]},
    "position_bias": {"predictions": RANKINGS},
    "ranking_agreement": {"predictions": RANKINGS, "references": REFERENCE},
    "reward_score": {"predictions": [-1.2, 0.3, 2.0, 0.0, 0.7, -3.0], "groups": ["a", "a", "a", "b", "b", "b"]},
    "win_rate": {
        "predictions": ["win", "win", "tie", "lose", "win", "win"],
        "length_differences": [3.0, -1.0, 0.0, -7.0, 2.0, 9.0],
        "prompt_ids": ["0", "0", "1", "2", "3", "4"],
    },
}
EXPECTED = {
    "agreement": ("rate", (1 + 1 / 3 + 2 / 3 + 2 / 3 + 2 / 3 + 1) / 6),
    "net_win_rate": ("net_win_rate", 50.0),
    "position_bias": ("earlier_preferred", (1 + 0 + 2 / 3 + 2 / 3 + 1 / 3 + 1) / 6),
    "ranking_agreement": ("pairwise_accuracy", (3 + 0 + 2 + 2 + 1 + 3) / 18),
    "reward_score": ("micro", 48.37),
    "win_rate": ("win_rate", 100 * 4.5 / 6),
}


def test_every_module_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} == set(INPUTS) == set(EXPECTED)


@pytest.fixture
def script(request, tmp_path, monkeypatch):
    """A copy of the module in a folder of its own, with its own caches and without a network."""
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    (tmp_path / request.param).mkdir()
    return shutil.copy(FOLDER / f"{request.param}.py", tmp_path / request.param / f"{request.param}.py")


def compute(script, cache, process_id, inputs, results):
    metric = evaluate.load(
        str(script), cache_dir=str(cache), num_process=2, process_id=process_id, experiment_id="shared"
    )
    results.put((process_id, metric.compute(**inputs)))


@pytest.mark.parametrize("script", sorted(INPUTS), indirect=True)
def test_modules_work_alone_in_batches_and_in_two_processes(script, tmp_path):
    name = Path(script).stem
    inputs = INPUTS[name]
    metric = evaluate.load(str(script), cache_dir=str(tmp_path / "cache"))
    whole = metric.compute(**inputs)
    figure, value = EXPECTED[name]
    assert whole[figure] == pytest.approx(value, abs=0.05)
    for index in range(6):
        metric.add_batch(**{column: [values[index]] for column, values in inputs.items()})
    assert metric.compute() == whole

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    shares = [{column: values[part] for column, values in inputs.items()} for part in (slice(0, 3), slice(3, 6))]
    processes = [
        context.Process(target=compute, args=(script, tmp_path / "shared", index, share, results))
        for index, share in enumerate(shares)
    ]
    for process in processes:
        process.start()
    computed = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    assert computed == {0: whole, 1: None}
