"""Two processes match one in contrastive pairs, DLMA, and CycleAlign with a self-reward ranker and an aligner as
corrector.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.cycle.stubs import read_log
from tests.cycle.test_distributed import ROOT, launch, untimed
from tests.dlma.self_reward_worker import train


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, train(folder, 1)


@pytest.mark.parametrize(
    ("config", "precompute"),
    [
        ("", ""),
        pytest.param(f"{ROOT}/examples/deepspeed/zero2.json", "", marks=pytest.mark.slow),
        pytest.param(f"{ROOT}/examples/deepspeed/zero2.json", "yes", marks=pytest.mark.slow),
        pytest.param(f"{ROOT}/examples/deepspeed/zero3.json", "", marks=pytest.mark.slow),
    ],
    ids=["ddp", "zero2", "zero2-precomputed", "zero3"],
)
def test_two_processes_match_one(tmp_path, single_process, config, precompute):
    launch("-m", "tests.dlma.self_reward_worker", str(tmp_path), "2", config, precompute)
    folder, (pairs, *trainers) = single_process
    for index in range(2):
        rows = [json.loads(line) for line in (tmp_path / f"pairs-{index}.jsonl").read_text().splitlines()]
        assert [row["chosen"] for row in rows] == pairs["chosen"][:]
        assert [row["self_reward"] for row in rows] == pytest.approx(pairs["self_reward"][:], abs=1e-3)
        logs = json.loads((tmp_path / f"result-{index}.jsonl").read_text())
        for name, trainer in zip(("dlma", "cycle"), trainers, strict=True):
            for theirs, ours in zip(logs[name], untimed(trainer.state.log_history), strict=True):
                assert {metric: theirs[metric] for metric in ours} == pytest.approx(ours, rel=2e-3, abs=1e-5)
    for name in ("dlma", "cycle"):
        weights, expected = (load_file(path / name / "model.safetensors") for path in (tmp_path, folder))
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=2e-4)
    ours, theirs = (
        sorted(read_log(path / "cycle"), key=lambda row: (row["step"], row["prompt"])) for path in (folder, tmp_path)
    )
    assert ours == theirs
    assert {row["failure"] for row in ours} == {None}
    assert {row["improved_completion"].strip() for row in ours} == {"sorry"}
