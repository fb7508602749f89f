"""Process of `test_distributed.py`: train with all trainers, then with rankers that fail or hang on one process.

python -m tests.cycle.worker FOLDER NUM_PROCESSES [DEEPSPEED_CONFIG]
"""

import gc
import json
import os
import sys
import threading
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from cyclealign_trl import (
    AlignerConfig,
    AlignerTrainer,
    BudgetExhaustedError,
    RankerError,
    RankingConfig,
    RankingFailure,
    RankingTrainer,
    Usage,
)
from cyclealign_trl.chat.budget import Budget, Prices
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import DigestRanker, config, make_trainer, prompts

KINDS = ("deadline", "budget_exhausted")
ROWS = [{"prompt": f"Q{i}:", "completions": ["yes", "maybe", "no" * i], "rewards": [2.0, i, -1.0]} for i in range(8)]
CORRECTIONS = [{"prompt": f"Q{i}", "answer": "no" * i, "correction": "yes"} for i in range(8)]


def train(folder, num_processes, **changes):
    """Train 8 rows in steps of 4 with each trainer, over all processes. Return the trainers."""
    batch_size = {f"per_device_{mode}_batch_size": 2 // num_processes for mode in ("train", "eval")}
    settings = {**batch_size, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, **changes}
    cycle, ahead = (
        make_trainer(
            folder / name,
            DigestRanker(fail=lambda request: "timeout" if request.metadata["topic"] == 3 else None),
            eval_dataset=prompts(12).select(range(8, 12)),
            num_interactions=3,
            demonstration_scope="run",
            stub_generation=True,
            ranking_lookahead=lookahead,
            **settings,
        )
        for name, lookahead in (("cycle", 0), ("ahead", 1))
    )
    rows = Dataset.from_list(ROWS)
    shared = config(folder / "ranked", **settings).to_dict()
    names = RankingConfig.__dataclass_fields__
    ranked = RankingTrainer(
        make_model(),
        RankingConfig(**{name: value for name, value in shared.items() if name in names}),
        rows,
        rows.select(range(4)),
        make_tokenizer(),
    )
    rows = Dataset.from_list(CORRECTIONS)
    aligner = AlignerTrainer(
        make_model(),
        AlignerConfig(
            str(folder / "aligner"), warmup_fraction=0.5, num_train_epochs=2, max_length=128, learning_rate=1e-3,
            logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, **settings,
        ),
        rows,
        rows.select(range(4)),
        make_tokenizer(),
    )  # fmt: skip
    for trainer in (cycle, ahead, ranked, aligner):
        assert trainer.args.world_size == num_processes
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
    return cycle, ahead, ranked, aligner


class FailingRanker(DigestRanker):
    """Raise on the last process."""

    fingerprint = None

    def rank(self, requests):
        if PartialState().is_last_process:
            raise RankerError("wrong key")
        return super().rank(requests)


def fail(folder, **changes):
    """Return the errors of training and evaluation with a ranker that raises on one process, and the steps taken."""
    trainer = make_trainer(
        folder, FailingRanker(), eval_dataset=prompts(2), per_device_train_batch_size=1, per_device_eval_batch_size=1,
        gradient_accumulation_steps=2, stub_generation=True, **changes,
    )  # fmt: skip
    messages = []
    for act in (trainer.train, trainer.evaluate):
        try:
            act()
        except RankerError as error:
            messages.append(str(error))
    return messages, trainer.state.global_step


class HangingRanker(DigestRanker):
    """Hang on the last process, and charge 2 dollars per answer to a budget on the others."""

    def __init__(self):
        super().__init__()
        self.budget = Budget(max_cost=30.0, prices=Prices(1.0, 1.0), num_processes=PartialState().num_processes)

    def rank(self, requests):
        if PartialState().is_last_process:
            threading.Event().wait()
        return [self.answer(request) for request in requests]

    def answer(self, request):
        two_dollars = Usage(2_000_000)
        if not self.budget.reserve(two_dollars):
            return RankingFailure("budget_exhausted")
        self.budget.settle(two_dollars, two_dollars)
        return super().answer(request)


def hang(folder, **changes):
    """Return the error, the steps and the failures of a run whose ranker hangs on one process and has 30 dollars."""
    trainer = make_trainer(
        folder, HangingRanker(), per_device_train_batch_size=1, gradient_accumulation_steps=2, ranking_timeout=1.0,
        max_ranking_failures=1.0, num_interactions=5, dataset=prompts(8), stub_generation=True, **changes,
    )  # fmt: skip
    try:
        trainer.train()
        message = None
    except BudgetExhaustedError as error:
        message = str(error)
    failures = [[log.get(f"failures/{kind}") for kind in KINDS] for log in trainer.state.log_history if "loss" in log]
    return message, trainer.state.global_step, failures


def main(folder, num_processes, deepspeed=None):
    changes = {}
    if deepspeed:
        import deepspeed as library

        # Otherwise, DeepSpeed compiles a faster all-reduce for CPUs, which takes a minute.
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        changes = {"deepspeed": deepspeed}
    trainers = train(Path(folder), int(num_processes), **changes)
    result = {
        "logs": [trainer.state.log_history for trainer in trainers],
        "demonstrations": trainers[0].demonstrations.state_dict(),
        "failing": fail(Path(folder, "failing"), **changes),
        **({} if deepspeed else {"hanging": hang(Path(folder, "hanging"))}),
    }
    Path(folder, f"result-{PartialState().process_index}.json").write_text(json.dumps(result))
    del trainers
    gc.collect()  # frees references to the process group
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch with gloo sometimes aborts at exit


if __name__ == "__main__":
    main(*sys.argv[1:])
