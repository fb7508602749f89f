"""An evaluation that is killed with SIGKILL at random points and resumed, for `test_evaluate_models.py`.

    python -m tests.evaluation.killed_evaluation FOLDER SEED KILLS

FOLDER contains the models `m0`, `m1`, the adapter `a0` over `m0` and the reward model `rm`. One evaluation is killed
KILLS times and then finished, in a process of its own each time. Another one is never killed. Both write their reports
and `counts.jsonl`: what was generated and scored, and what of it a kill has lost.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import peft  # noqa: F401  (imported once, before the processes)
import torch

from cyclealign_trl import ModelUpstream, ReplySettings, RewardScorer, evaluate_models, read_prompts
from cyclealign_trl.evaluation import row_file

NUM_PROMPTS = 22
PROMPTS = [
    {"prompt": [{"role": "user", "content": f"Question {index}: {'why? ' * (index % 7)}"}], "subset": "ab"[index % 2]}
    for index in range(NUM_PROMPTS)
]


def run(folder: Path, name: str, kill_at: int) -> None:
    """Evaluate, and kill the process at an event: before a batch is written, or when half of it is."""
    remaining = kill_at
    counts = (folder / f"{name}-counts.jsonl").open("a")

    def count(what: str, number: int) -> None:
        counts.write(json.dumps({what: number}) + "\n")
        counts.flush()

    def counting(what, method, size):
        def wrapped(self, *args, **kwargs):
            count(what, size(args))
            return method(self, *args, **kwargs)

        return wrapped

    ModelUpstream.__call__ = counting("generated", ModelUpstream.__call__, lambda args: len(args[0]))
    RewardScorer.score = counting("scored", RewardScorer.score, lambda args: len(args[0]))
    append = row_file.RowFile.append

    def append_or_die(self, rows):
        nonlocal remaining
        rows = list(rows)
        what = "lost_scored" if "score" in rows[0] else "lost_generated"
        if remaining == 0:
            count(what, len(rows))
            os.kill(os.getpid(), signal.SIGKILL)
        if remaining == 1:
            data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            half = data[: len(data) // 2]
            with self.path.open("ab") as file:
                file.write(half)
            count(what, len(rows) - half.count(b"\n"))
            os.kill(os.getpid(), signal.SIGKILL)
        remaining -= 2
        append(self, rows)

    row_file.RowFile.append = append_or_die
    report = evaluate_models(
        {"base": f"{folder}/m0", "adapter": f"{folder}/a0", "other": f"{folder}/m1"},
        f"{folder}/rm",
        read_prompts(PROMPTS),
        output_dir=folder / name,
        settings=ReplySettings(max_new_tokens=6, max_prompt_length=60, batch_size=5, device="cpu"),
        reward_model_kwargs={"batch_size": 6, "device": "cpu"},
        n_resamples=50,
    )
    report.save(folder / name)


def in_a_process(folder: Path, name: str, kill_at: int) -> int:
    """Run an evaluation in a child process, and return the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(folder, name, kill_at)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return 0
    return os.WTERMSIG(status)


def main(folder: Path, seed: int, kills: int) -> None:
    """Run both evaluations."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    # Three models have 5 batches of replies and 4 of scores each, and every batch has 2 events.
    points = [rng.randrange(2 * 27 // kills) for _ in range(kills)]
    assert in_a_process(folder, "whole", 10**9) == 0
    for point in points:
        assert in_a_process(folder, "killed", point) == signal.SIGKILL
    assert in_a_process(folder, "killed", 10**9) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
