"""DLMA makes the demo's policy better by its own opinion; the same data shuffled does not."""

import runpy
from pathlib import Path

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "dlma_rise.py"))


@pytest.mark.parametrize(
    ("seed", "num_steps"), [(0, 500), *(pytest.param(seed, 800, marks=pytest.mark.slow) for seed in range(3))]
)
def test_dlma_improves_a_policy_without_a_judge(seed, num_steps):
    figures = BENCHMARK["measure"](seed, num_steps, ("DLMA", "shuffled"))
    assert figures["ordering"] >= 0.9
    assert figures["DLMA"] >= 0.2
    assert abs(figures["shuffled"]) < 0.08
