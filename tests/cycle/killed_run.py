"""A run that kills its own process with SIGKILL in a given phase, for `test_killed_runs.py`.

    python -m tests.cycle.killed_run FOLDER [PHASE COUNT]

The run resumes from the last complete checkpoint in FOLDER, if there is one. With PHASE and COUNT, it kills its
process when it has entered the phase COUNT times before.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import transformers

from cyclealign_trl.cycle import log_files
from cyclealign_trl.training import checkpoints
from tests.conftest import make_model
from tests.cycle.stubs import DigestRanker, make_trainer, prompts

SETTINGS = {
    "num_train_epochs": 2,
    "num_interactions": 3,
    "gradient_accumulation_steps": 2,
    "stop_on_agreement": True,
    "demonstration_scope": "run",
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "top_p": 0.9,
}
"""12 optimiser steps on one process: 8 prompts, windows of 4, 3 interactions, 2 epochs."""

PHASES = (
    *("generate", "rank", "backward", "log", "merge", "unlink"),
    *("state", "weights", "optimizer", "rng", "mark", "trainer_state"),
)


class Kill:
    """Kill the process when it has entered a phase a number of times before."""

    def __init__(self, phase: str | None, count: int) -> None:
        self.phase, self.remaining = phase, count

    def __call__(self, phase: str) -> None:
        if phase == self.phase:
            self.remaining -= 1
            if self.remaining < 0:
                os.kill(os.getpid(), signal.SIGKILL)


def before(kill, phase, function):
    """Wrap a function to enter the phase before it runs."""

    def wrapped(*args, **kwargs):
        kill(phase)
        return function(*args, **kwargs)

    return wrapped


def after_half(kill, phase, function, path_of):
    """Wrap a function that writes a file to enter the phase when half of the file is written."""

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        path = path_of(*args, **kwargs)
        if kill.phase == phase and path.exists():
            if kill.remaining == 0:
                os.truncate(path, path.stat().st_size // 2)
            kill(phase)
        return result

    return wrapped


class KilledRanker(DigestRanker):
    """Ranker that enters the phase "rank" before it ranks."""

    def __init__(self, kill):
        super().__init__()
        self.kill = kill

    def rank(self, requests):
        self.kill("rank")
        return super().rank(requests)


def run(folder: str, phase: str | None = None, count: int = 0) -> None:
    """Start or resume the run, and write its final state to `end-R.json` for process R."""
    kill = Kill(phase, count)
    resume = Path(folder).exists() and any(map(checkpoints.is_complete, Path(folder).glob("checkpoint-*")))
    # A resumed run gets other initial weights, because all of its weights must come from the checkpoint.
    trainer = make_trainer(
        folder, KilledRanker(kill), prompts(8), model=make_model(seed=5 if resume else 0), **SETTINGS
    )

    trainer.generation.generate = before(kill, "generate", trainer.generation.generate)
    trainer.accelerator.backward = before(kill, "backward", trainer.accelerator.backward)
    trainer.interaction_log.write = before(kill, "log", trainer.interaction_log.write)
    log_files.FAN_IN = 3  # merges in a short run
    log_files.pq.ParquetWriter.write_table = before(kill, "merge", log_files.pq.ParquetWriter.write_table)
    unlink = Path.unlink

    def unlink_part(path, missing_ok=False):
        if path.suffix == ".parquet":
            kill("unlink")
        unlink(path, missing_ok)

    Path.unlink = unlink_part
    trainer._save_optimizer_and_scheduler = before(kill, "optimizer", trainer._save_optimizer_and_scheduler)
    trainer.save_model = after_half(
        kill, "weights", trainer.save_model, lambda output_dir=None, **_: Path(output_dir) / "model.safetensors"
    )
    rank = trainer.args.process_index if trainer.args.world_size > 1 else None
    rng_name = "rng_state.pth" if rank is None else f"rng_state_{rank}.pth"
    # On the base class, below our override, which marks the checkpoint complete afterwards.
    base = transformers.Trainer
    base._save_rng_state = after_half(
        kill, "rng", base._save_rng_state, lambda self, output_dir: Path(output_dir) / rng_name
    )
    checkpoints.save = before(kill, "state", checkpoints.save)
    checkpoints.mark_complete = before(kill, "mark", checkpoints.mark_complete)
    trainer.state.__class__.save_to_json = after_half(
        kill, "trainer_state", trainer.state.__class__.save_to_json, lambda self, path: Path(path)
    )

    trainer.train(resume_from_checkpoint=resume)
    end = {
        "weights": {
            name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
        },
        "demonstrations": trainer.demonstrations.state_dict(),
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "steps": trainer.state.global_step,
    }
    if trainer.is_world_process_zero():  # the expenses differ, because resumed runs read the cache
        totals = trainer._totals.state_dict()
        end["totals"] = {name: value for name, value in totals.items() if name not in ("billed", "cached")}
    Path(folder, f"end-{trainer.args.process_index}.json").write_text(json.dumps(end))
    trainer.end()


if __name__ == "__main__":
    folder, *when = sys.argv[1:]
    run(folder, *([when[0], int(when[1])] if when else []))
    os._exit(0)  # torch with gloo sometimes aborts at exit
