"""Measure ranking losses, training steps and memory beside those of other projects, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.speed            # under 8 minutes on one core
    OMP_NUM_THREADS=1 python -m benchmarks.speed --quick    # under 2 minutes
    python -m benchmarks.speed --device cuda                # under 10 minutes on one GPU
    python -m benchmarks.speed --tiny                       # checks that everything runs; the figures mean nothing

The tables are explained in `docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import platform
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, get_args

import torch

from .figures import draw_memory
from .limits import attained_flops
from .loss import measure_loss
from .measuring import Budget, isolated
from .memory import measure_memory
from .plans import PLANS, Part
from .report import header, tables, versions
from .step import measure_step

IMAGES = Path(__file__).parents[2] / "docs" / "images"
LIBRARIES = (
    ("cyclealign_trl", "CycleAlignTrainer"),
    ("trl", "GRPOTrainer"),
    ("trl", "RLOOTrainer"),
    ("trl.experimental.online_dpo", "OnlineDPOTrainer"),
    ("peft", "LoraConfig"),
    ("deepspeed", "initialize"),
    ("transformers", "Qwen3ForCausalLM"),
)
CLOCKS = {
    "cpu": "Seconds are processor seconds, memory is resident memory.",
    "cuda": "Seconds are wall time of a synchronised GPU, memory is what PyTorch has allocated on it.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print each part when it is done."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=CLOCKS, default="cpu", help="Where to measure.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="Measure less, on a CPU.")
    size.add_argument("--tiny", action="store_true", help="Run all parts with a tiny model, on any device.")
    parser.add_argument("--only", nargs="+", choices=get_args(Part), help="The parts to run.")
    parser.add_argument("--work", help="Run only the works whose title contains this text, such as 'Qwen3-8B'.")
    parser.add_argument("--output", type=Path, help="Write the report to this JSON file too.")
    parser.add_argument("--figures", action="store_true", help="Draw the part 'memory' as docs/images/memory.svg.")
    args = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn about forks otherwise
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if args.quick and args.device != "cpu":
        parser.error("--quick is a plan for a CPU. Use --only or --work to measure less on a GPU.")
    report = measure(
        "tiny" if args.tiny else "quick" if args.quick else {"cpu": "cpu", "cuda": "gpu"}[args.device],
        args.device,
        args.only or get_args(Part),
        args.work or "",
    )
    if args.output:
        args.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if args.figures and report.get("memory"):
        draw_memory(report["memory"], IMAGES / "memory.svg")


def measure(plan_name: str, device: str, parts: Sequence[Part], work_contains: str = "") -> dict[str, Any]:
    """Run the parts of a plan, print their tables, and return the report."""
    plan = PLANS[plan_name]
    machine, rate = isolated(_machine, device, device=device, budget=Budget(120))
    report: dict[str, Any] = {
        "plan": plan_name,
        "device": device,
        "machine": machine,
        "clock": CLOCKS[device],
        "versions": versions(),
        "flops_per_second": rate,
    }
    print(header(report), flush=True)
    if device == "cpu":
        _import_libraries()
    for part in parts:
        budget = Budget(plan.seconds[part])
        report[part] = []
        if part == "memory":
            works = tuple(work for work in plan.memory if work_contains in str(work))
            report[part] = measure_memory(works, device, budget)
            print(tables(part, report[part]), flush=True)
        elif part == "loss":
            for work in (work for work in plan.loss if work_contains in str(work)):
                rows = measure_loss(work, device, plan.rounds, budget, rate)
                report[part] += rows
                print(tables(part, rows), flush=True)
        else:
            for step_work in (work for work in plan.step if work_contains in str(work)):
                rows = measure_step(step_work, device, plan.step_rounds, plan.steps, budget, rate)
                report[part] += rows
                print(tables(part, rows), flush=True)
    return report


def _machine(device: str) -> tuple[str, float]:
    """Return the name of the machine and the operations per second of its matrix products."""
    name = f"one thread of {platform.machine()}" if device == "cpu" else torch.cuda.get_device_name()
    return name, attained_flops(device)


def _import_libraries() -> None:
    """Import what forked processes need, once, so that it counts for none of them."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # DeepSpeed logs what it finds
        warnings.simplefilter("ignore")  # TRL warns that some trainers are experimental
        for module, name in LIBRARIES:
            with suppress(ImportError):
                getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    main()
