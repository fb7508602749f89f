"""Two processes train what one does: same losses, same weights, same demonstrations, one log."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SCRIPT = """
import json, sys
from pathlib import Path
from tests.trainer.stubs import make_trainer
output_dir, num_processes = sys.argv[1], int(sys.argv[2])
trainer = make_trainer(
    output_dir, per_device_train_batch_size=2 // num_processes, gradient_accumulation_steps=2, num_interactions=3,
    demonstration_scope="run", stub_generation=True, save_strategy="steps", save_steps=6,
)
assert trainer.args.world_size == num_processes
trainer.train()
if trainer.is_world_process_zero():
    (Path(output_dir) / "result.json").write_text(json.dumps({
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "weights": [parameter.double().sum().item() for parameter in trainer.model.parameters()],
        "demonstrations": trainer.demonstrations.state_dict(),
    }))
trainer.end()
"""


def run(output_dir, num_processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    script = output_dir / "script.py"
    output_dir.mkdir()
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    finished = subprocess.run(
        [sys.executable, *launcher, str(script), str(output_dir), str(num_processes)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    rows = [row for path in (output_dir / "interactions").iterdir() for row in pq.read_table(path).to_pylist()]
    rows = sorted(rows, key=lambda row: (row["step"], row["prompt"]))
    return json.loads((output_dir / "result.json").read_text()), [{**row, "usage": None} for row in rows]


def test_two_processes_train_what_one_does(tmp_path):
    (one, one_rows), (two, two_rows) = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-3, abs=1e-3)
    assert two["demonstrations"] == one["demonstrations"]
    assert two_rows == one_rows
    checkpoint = tmp_path / "two" / "checkpoint-6"
    assert {"cyclealign-0.json", "cyclealign-1.json", "cyclealign.complete"} <= {
        path.name for path in checkpoint.iterdir()
    }
