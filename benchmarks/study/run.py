"""Run the study, and continue it where it was stopped.

    python -m benchmarks.study.run MODEL HH_RLHF_FOLDER OUTPUT_DIR --minutes 55

Train the reward models first, with `benchmarks.study.reward_models`. Each finished row and seed becomes a JSON file in
`--results`, from which `benchmarks.study.page` writes docs/study.md. A row that has one is not run again, and
everything else continues: sampling, training from its last checkpoint, replies and scores. Kill it at any time.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.report import versions
from cyclealign_trl import ReplySettings, evaluate_models
from cyclealign_trl._files import atomic_write

from .clock import Clock
from .job import Job, OutOfTimeError, Study
from .methods import judge_calls, make
from .rows import ROWS, Row
from .scales import SCALES

RESULTS = Path(__file__).parent / "results"


def run_row(study: Study, name: str, row: Row, seed: int) -> dict[str, Any]:
    """Train and evaluate a row, and return its result."""
    label = f"{name}-{seed}"
    job = Job(study, row, seed, study.output_dir / label)
    with Clock(job.folder / "seconds-training.txt") as training:
        source = make(job)
    study.check_time()
    with Clock(job.folder / "seconds-evaluation.txt") as evaluation:
        rewards = {}
        for reward_model in ("evaluator", "judge"):
            report = evaluate_models(
                {label: source},
                str(study.reward_models / reward_model),
                study.prompts,
                output_dir=study.output_dir / "evaluation",
                settings=ReplySettings(max_new_tokens=study.scale.max_completion_length),
            )
            rewards[reward_model] = report.scores[label]
    replies = report.replies[label]
    return {
        "row": name,
        "seed": seed,
        "settings": asdict(study.scale) | dict(row.settings),
        "steps": study.scale.steps if row.method not in ("none", "best_of_4") else 0,
        "judge_calls": judge_calls(job),
        "seconds": {"training": round(training.total), "evaluation": round(evaluation.total)},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "prompt_ids": [prompt.id for prompt in study.prompts.prompts],
        "rewards": rewards,
        "words": [len(reply.completion.split()) for reply in replies],
        "length_limited": sum(reply.finish_reason == "length" for reply in replies) / len(replies),
    }


def main(argv: list[str] | None = None) -> None:
    """Run what is missing."""
    args = _make_parser().parse_args(argv)
    scale = SCALES[args.scale]
    deadline = time.monotonic() + 60 * args.minutes
    reward_models = args.reward_models or args.output_dir
    study = Study(args.model, args.hh_rlhf, reward_models, args.output_dir / args.scale, scale, deadline)
    results = args.results / args.scale
    accuracies = {
        name: json.loads((reward_models / name / "reward_model.json").read_text("utf-8"))
        for name in ("evaluator", "judge")
    }
    _write(results / "reward_models.json", accuracies)
    for seed in args.seeds:
        for name in args.rows:
            row = ROWS[name]
            path = results / f"{name}-{seed}.json"
            if path.exists() or (seed != 0 and not row.seeded):
                continue
            if row.needs is not None:
                needed = f"{row.needs}-{seed if ROWS[row.needs].seeded else 0}"
                if not (results / f"{needed}.json").exists():
                    print(f"{name}, seed {seed}, needs {needed} first.", flush=True)
                    continue
            print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}", flush=True)
            try:
                study.check_time()
                _write(path, run_row(study, name, row, seed))
            except OutOfTimeError:
                print("Out of time. Run the same command again to continue.", flush=True)
                return


def _write(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Chat model to align.")
    parser.add_argument("hh_rlhf", help="Folder with the test files of HH-RLHF.")
    parser.add_argument("output_dir", type=Path, help="Folder of the runs.")
    parser.add_argument("--reward_models", type=Path, help="Folder of evaluator and judge. Default: OUTPUT_DIR.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the results. Default: %(default)s.")
    parser.add_argument("--scale", choices=SCALES, default="small", help="Default: %(default)s.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="Default: all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Default: 0, which all have that need none.")
    parser.add_argument("--minutes", type=float, default=55, help="When to stop. Default: %(default)s.")
    return parser


if __name__ == "__main__":
    main()
