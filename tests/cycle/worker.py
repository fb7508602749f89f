"""What each process of `test_distributed.py` runs: all trainers, then rankers that fail or hang in one."""

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
    """Trains 8 rows in steps of 4 with each trainer, by as many processes as there are; returns them."""
    batch_size = {f"per_device_{mode}_batch_size": 2 // num_processes for mode in ("train", "eval")}
    settings = {**batch_size, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, **changes}
    cycle = make_trainer(
        folder / "cycle",
        DigestRanker(fail=lambda request: "timeout" if request.metadata["topic"] == 3 else None),
        eval_dataset=prompts(12).select(range(8, 12)),
        num_interactions=3,
        demonstration_scope="run",
        stub_generation=True,
        **settings,
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
    for trainer in (cycle, ranked, aligner):
        assert trainer.args.world_size == num_processes
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
    return cycle, ranked, aligner


class LockedOut(DigestRanker):
    """Cannot be asked on the last process."""

    fingerprint = None

    def rank(self, requests):
        if PartialState().is_last_process:
            raise RankerError("wrong key")
        return super().rank(requests)


def fail(folder, **changes):
    """What each process says of a ranker that fails on one: in training, in evaluation."""
    trainer = make_trainer(
        folder, LockedOut(), eval_dataset=prompts(2), per_device_train_batch_size=1, per_device_eval_batch_size=1,
        gradient_accumulation_steps=2, stub_generation=True, **changes,
    )  # fmt: skip
    said = []
    for act in (trainer.train, trainer.evaluate):
        try:
            act()
        except RankerError as error:
            said.append(str(error))
    return said, trainer.state.global_step


class Hanging(DigestRanker):
    """Never answers on the last process, and takes 2 dollars of a budget of its own for every answer on the others."""

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
    """What each process sees of a ranker that hangs on one, and has 30 dollars to spend."""
    trainer = make_trainer(
        folder, Hanging(), per_device_train_batch_size=1, gradient_accumulation_steps=2, ranking_timeout=1.0,
        max_ranking_failures=1.0, num_interactions=5, dataset=prompts(8), stub_generation=True, **changes,
    )  # fmt: skip
    try:
        trainer.train()
        said = None
    except BudgetExhaustedError as error:
        said = str(error)
    failures = [[log.get(f"failures/{kind}") for kind in KINDS] for log in trainer.state.log_history if "loss" in log]
    return said, trainer.state.global_step, failures


def main(folder, num_processes, deepspeed=None):
    changes = {}
    if deepspeed:
        import deepspeed as library

        # Or it would compile a faster all-reduce for CPUs, for a minute.
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        changes = {"deepspeed": deepspeed}
    trainers = train(Path(folder), int(num_processes), **changes)
    result = {
        "logs": [trainer.state.log_history for trainer in trainers],
        "demonstrations": trainers[0].demonstrations.state_dict(),
        "said": fail(Path(folder, "failing"), **changes),
        **({} if deepspeed else {"hung": hang(Path(folder, "hanging"))}),
    }
    Path(folder, f"result-{PartialState().process_index}.json").write_text(json.dumps(result))
    del trainers
    gc.collect()  # what holds on to the group of processes
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # all is done; the exit of torch with gloo has aborted now and then


if __name__ == "__main__":
    main(*sys.argv[1:])
