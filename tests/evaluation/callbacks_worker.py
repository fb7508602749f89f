"""Process of `test_callbacks_distributed.py`: train with both callbacks, whole and in parts, and with a broken judge.

python -m tests.evaluation.callbacks_worker FOLDER NUM_PROCESSES [DEEPSPEED_CONFIG]
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from cyclealign_trl import RankerError, RankingAccuracyCallback, RankingConfig, RankingTrainer, WinRateCallback
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import make_trainer, prompts
from tests.evaluation.test_ranking_accuracy_callback import ROWS, Learner
from tests.evaluation.test_win_rate_callback import InterruptAt, Interrupted, Judge, PricedJudge

DEEPSPEED = {}  # settings of all runs
RANKED = [{"prompt": f"Q{i}:", "completions": ["yes", "maybe", "no" * i], "rewards": [2.0, i, -1.0]} for i in range(8)]


def settings(num_processes):
    return {
        **DEEPSPEED,
        "per_device_train_batch_size": 2 // num_processes, "per_device_eval_batch_size": 4 // num_processes,
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip


def train_ranked(folder, num_processes, judge, interrupted_at=None, resume=None, eval_steps=2):
    args = RankingConfig(
        str(folder), max_prompt_length=64, max_completion_length=6, logging_steps=1, learning_rate=0.05, use_cpu=True,
        report_to="none", disable_tqdm=True, num_train_epochs=1, **settings(num_processes),
    )  # fmt: skip
    model = make_model(seed=5 if resume else 0)
    trainer = RankingTrainer(model, args, Dataset.from_list(RANKED), None, make_tokenizer())
    # Five prompts: one process gets one more than the other.
    trainer.add_callback(WinRateCallback(judge, trainer, prompts(5), eval_steps, patience=3))
    trainer.add_callback(InterruptAt(interrupted_at))
    with suppress(Interrupted):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def train_cycle(folder, num_processes):
    trainer = make_trainer(
        folder, Learner(), stub_generation=True, num_interactions=3, max_steps=3,
        **settings(num_processes),
    )  # fmt: skip
    trainer.add_callback(RankingAccuracyCallback(trainer.ranker, trainer, ROWS[:5], 3))
    trainer.train()
    return trainer


class BrokenJudge(Judge):
    """Raise on the last process."""

    fingerprint = None

    def rank(self, requests):
        if PartialState().is_last_process:
            raise RankerError("wrong key")
        return super().rank(requests)


def run(folder, num_processes):
    """Return the logs of all runs, the spending of this process, and the error of the broken judge."""
    judge = PricedJudge(num_processes=num_processes)
    whole = train_ranked(folder / "whole", num_processes, judge)
    train_ranked(folder / "parts", num_processes, Judge(), interrupted_at=3)
    resumed = train_ranked(folder / "parts", num_processes, Judge(), resume=True)
    cycle = train_cycle(folder / "cycle", num_processes)
    try:
        train_ranked(folder / "broken", num_processes, BrokenJudge())
        message = None
    except RankerError as error:
        message = str(error)
    trainers = {"whole": whole, "resumed": resumed, "cycle": cycle}
    logs = {name: trainer.state.log_history for name, trainer in trainers.items()}
    return {"logs": logs, "spent": judge.budget.committed.cost, "error": message}


def main(folder, num_processes, deepspeed=None):
    if deepspeed:
        import deepspeed as library

        # Otherwise, DeepSpeed compiles a faster all-reduce for CPUs, which takes a minute.
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        DEEPSPEED["deepspeed"] = deepspeed
    result = run(Path(folder), int(num_processes))
    Path(folder, f"result-{PartialState().process_index}.json").write_text(json.dumps(result))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch with gloo sometimes aborts at exit


if __name__ == "__main__":
    main(*sys.argv[1:])
