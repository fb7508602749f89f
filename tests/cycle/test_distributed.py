"""Two processes match one under DDP and DeepSpeed in losses, metrics, weights, demonstrations and log."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cycle.stubs import read_log
from tests.cycle.worker import train

ROOT = Path(__file__).parents[2]
TIMED = ("time/", "_runtime", "_per_second", "total_flos")  # total_flos counts padding


def launch(*arguments):
    """Run a script or module in two processes, and return its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=280)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    """Train in one process, and return the folder and the trainers."""
    folder = tmp_path_factory.mktemp("one")
    return folder, train(folder, 1)


def untimed(history):
    """Return the logs without metrics that depend on time."""
    return [{name: value for name, value in log.items() if not any(word in name for word in TIMED)} for log in history]


def rows(folder):
    return [
        sorted(
            ({**row, "usage": None} for row in read_log(folder / name)), key=lambda row: (row["step"], row["prompt"])
        )
        for name in ("cycle", "ahead")
    ]


@pytest.mark.parametrize(
    "config",
    [None, "zero2.json", pytest.param("zero3.json", marks=pytest.mark.slow)],
    ids=["ddp", "zero2", "zero3"],
)
def test_two_processes_match_one(tmp_path, single_process, config):
    if config:
        pytest.importorskip("deepspeed")
    launch(
        "-m", "tests.cycle.worker", str(tmp_path), "2", *([f"{ROOT}/examples/deepspeed/{config}"] if config else [])
    )
    results = [json.loads((tmp_path / f"result-{index}.json").read_text()) for index in range(2)]
    folder, trainers = single_process

    for index, trainer in enumerate(trainers):
        first, second = (result["logs"][index] for result in results)
        assert untimed(first) == untimed(second)
        for theirs, ours in zip(untimed(first), untimed(trainer.state.log_history), strict=True):
            assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)
    for name in ("cycle", "ahead", "ranked", "aligner"):
        weights, expected = (load_file(path / name / "model.safetensors") for path in (tmp_path, folder))
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)

    assert [result["demonstrations"] for result in results] == [trainers[0].demonstrations.state_dict()] * 2
    assert rows(tmp_path) == rows(folder)
    written = {path.name for path in (tmp_path / "cycle" / "checkpoint-6").iterdir()}
    assert {"cyclealign-0.json", "cyclealign-1.json", "cyclealign.complete"} <= written

    # A ranker that raises on one process stops both, in training and in evaluation.
    others, own = "The ranker failed on process 1. RankerError: wrong key", "wrong key"
    assert [result["failing"] for result in results] == [[[others] * 2, 0], [[own] * 2, 0]]
    if config is None:
        check_hanging(tmp_path / "hanging", [result["hanging"] for result in results])


def check_hanging(folder, results):
    """Check that a ranker that hangs on one process blocks neither, and leaves most of the budget to the other."""
    assert results[0] == results[1]
    message, num_steps, failures = results[0]
    # Each of the two rankings in a step costs 2 dollars. Before step 7, each process has half of the last 6 dollars.
    assert num_steps == 7
    assert failures == [[2.0, None]] * 6 + [[2.0, 1.0]]
    assert "$26 of max_cost=30" in message
    assert (folder / "checkpoint-7" / "cyclealign.complete").exists()
    assert len((folder / "spent" / "process-0.jsonl").read_text().splitlines()) == 13
    assert (folder / "spent" / "process-1.jsonl").read_text() == ""


FSDP2 = """
import torch
from torch.distributed.fsdp import fully_shard
from cyclealign_trl.models.logps import PLAIN, Scoring, add_scoring, sequence_logps
from cyclealign_trl.models.text_rows import SharedRows
from tests.conftest import make_model

torch.distributed.init_process_group("gloo")
whole, sharded = make_model(), make_model()
add_scoring(whole), add_scoring(sharded)
mesh = torch.distributed.init_device_mesh("cpu", (2,))
for layer in sharded.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)

shared = SharedRows.of(whole.config)
for scoring in (PLAIN, Scoring(fused=True), Scoring(fused=True, shared=shared)):
    for model in (whole, sharded):
        model.zero_grad()
        both = [  # completions and SFT target: two forward passes before one backward pass
            sequence_logps(model, prompts, texts, pad_token_id=0, device=torch.device("cpu"), scoring=scoring)[0]
            for prompts, texts in (
                ([[5, 6, 7], [5, 6, 7], [8, 9]], [[10, 11, 1], [13], [12, 1]]),
                ([[5, 6, 7]], [[20, 1]]),
            )
        ]
        torch.cat(both).sum().backward()
    for one, other in zip(sharded.parameters(), whole.parameters()):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad)
print("equal\\n", end="")
torch.distributed.destroy_process_group()
import os, sys
sys.stdout.flush()
os._exit(0)  # torch with gloo sometimes aborts at exit
"""


@pytest.mark.slow
def test_a_policy_sharded_by_fsdp2_has_the_same_gradients(tmp_path):
    # Without accelerate, which replaces FSDP by DDP on a CPU.
    (tmp_path / "script.py").write_text(FSDP2)
    assert launch(str(tmp_path / "script.py")).count("equal") == 2
