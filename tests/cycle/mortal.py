"""A run that can be told to kill itself, with SIGKILL, in the middle of what it does; for `test_resume.py`.

    python -m tests.cycle.mortal FOLDER [PHASE COUNT]

Goes on from the last complete checkpoint in FOLDER, if there is one, and dies at occasion COUNT (from 0) of PHASE.
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

PHASES = ("generate", "rank", "backward", "log", "state", "weights", "optimizer", "rng", "mark", "trainer_state")


class Death:
    """Kills the process at one occasion."""

    def __init__(self, phase: str | None, count: int) -> None:
        self.phase, self.left = phase, count

    def __call__(self, phase: str) -> None:
        if phase == self.phase:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


def before(death, phase, function):
    def wrapped(*args, **kwargs):
        death(phase)
        return function(*args, **kwargs)

    return wrapped


def after_half(death, phase, function, path_of):
    """Writes the file, and dies when half of it is there."""

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        path = path_of(*args, **kwargs)
        if death.phase == phase and path.exists():
            if death.left == 0:
                os.truncate(path, path.stat().st_size // 2)
            death(phase)
        return result

    return wrapped


class MortalRanker(DigestRanker):
    def __init__(self, death):
        super().__init__()
        self.death = death

    def rank(self, requests):
        self.death("rank")
        return super().rank(requests)


def run(folder: str, phase: str | None = None, count: int = 0) -> None:
    """Trains, from wherever it is; leaves `end.json`, what a run that was never killed must leave too."""
    death = Death(phase, count)
    resume = Path(folder).exists() and any(map(checkpoints.is_complete, Path(folder).glob("checkpoint-*")))
    # Other initial weights where everything must come from the checkpoint.
    trainer = make_trainer(
        folder, MortalRanker(death), prompts(8), model=make_model(seed=5 if resume else 0), **SETTINGS
    )

    trainer.generation.generate = before(death, "generate", trainer.generation.generate)
    trainer.accelerator.backward = before(death, "backward", trainer.accelerator.backward)
    trainer.interaction_log.write = before(death, "log", trainer.interaction_log.write)
    trainer._save_optimizer_and_scheduler = before(death, "optimizer", trainer._save_optimizer_and_scheduler)
    trainer.save_model = after_half(
        death, "weights", trainer.save_model, lambda output_dir=None, **_: Path(output_dir) / "model.safetensors"
    )
    rank = trainer.args.process_index if trainer.args.world_size > 1 else None
    rng_name = "rng_state.pth" if rank is None else f"rng_state_{rank}.pth"
    # On the class, below our own override, which marks the checkpoint complete.
    base = transformers.Trainer
    base._save_rng_state = after_half(
        death, "rng", base._save_rng_state, lambda self, output_dir: Path(output_dir) / rng_name
    )
    checkpoints.save = before(death, "state", checkpoints.save)
    checkpoints.mark_complete = before(death, "mark", checkpoints.mark_complete)
    trainer.state.__class__.save_to_json = after_half(
        death, "trainer_state", trainer.state.__class__.save_to_json, lambda self, path: Path(path)
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
    Path(folder, f"end-{trainer.args.process_index}.json").write_text(json.dumps(end))
    trainer.end()


if __name__ == "__main__":
    folder, *when = sys.argv[1:]
    run(folder, *([when[0], int(when[1])] if when else []))
    os._exit(0)  # all is done; the exit of torch with gloo has aborted now and then
