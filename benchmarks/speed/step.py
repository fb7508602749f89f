"""Measure whole steps of `CycleAlignTrainer` beside those of other trainers, with a judge that costs nothing."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from .limits import generation_flops, training_flops
from .measuring import Budget, NotMeasured, clock, isolated, peak_mib
from .plans import OURS, StepWork
from .shapes import MODELS, build_model, build_prompts, build_tokenizer
from .trainers import TRAINERS, Setting, missing

PHASES = ("generate", "train")
Row = dict[str, Any]


def measure_step(work: StepWork, device: str, rounds: int, steps: int, budget: Budget, rate: float) -> list[Row]:
    """Return a row for each trainer: median seconds of a step, of its phases, and per completion, and peak MiB.

    In a round, each trainer runs once, in a process of its own, and the first of its steps does not count. Ratios are
    of seconds per completion, because Online DPO samples two for each prompt. A trainer that was not measured has a
    `note`.

    Args:
        work: What is measured.
        device: `"cpu"` or `"cuda"`.
        rounds: How often each trainer runs.
        steps: Steps of each run that count.
        budget: Budget of the part.
        rate: Operations per second that the device attains.
    """
    facts = {key: value for key, value in asdict(work).items() if key != "trainers"}
    rows: dict[str, Row] = {name: {"work": str(work), "trainer": name, **facts} for name in work.trainers}
    runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in work.trainers}
    for _ in range(rounds):
        for name in work.trainers:
            rows[name]["note"] = missing(TRAINERS[name], work, device)
            if rows[name]["note"]:
                continue
            try:
                with tempfile.TemporaryDirectory() as folder:  # deleted even if the process is killed
                    measured, peak = isolated(_run, work, name, steps, device, folder, device=device, budget=budget)
                runs[name].append(measured)
                rows[name]["peak_mib"] = max(peak, rows[name].get("peak_mib", 0.0))
            except NotMeasured as error:
                if not runs[name]:
                    rows[name]["note"] = str(error)
    for name, row in rows.items():
        row["n"] = TRAINERS[name].n or work.n
        if runs[name]:
            _summarise(row, work, runs[name], rate)
    for name, row in rows.items():
        if name != OURS and runs[name] and runs[OURS]:
            pairs = zip(runs[OURS], runs[name], strict=False)  # a round that did not fit has no pair
            row["ours_to_it_seconds"] = median(
                _median(ours, "total") / work.n / (_median(its, "total") / row["n"]) for ours, its in pairs
            )
            row["ours_to_it_memory"] = rows[OURS]["peak_mib"] / row["peak_mib"]
    return list(rows.values())


def _summarise(row: Row, work: StepWork, runs: list[list[dict[str, float]]], rate: float) -> None:
    steps = [step for run in runs for step in run]
    completions = [work.new_tokens] * row["n"]
    shape = MODELS[work.model]
    flops = work.prompts * (
        generation_flops(shape, work.prompt_length, completions)
        + training_flops(shape, work.prompt_length, completions, work.lora)
    )
    row["seconds"] = _median(steps, "total")
    row["seconds_per_completion"] = row["seconds"] / work.prompts / row["n"]
    row["share_of_limit"] = flops / rate / row["seconds"]
    for phase in PHASES:
        if phase in steps[0]:
            row[phase] = _median(steps, phase)


def _median(steps: list[dict[str, float]], key: str) -> float:
    return median(step[key] for step in steps)


class Stopwatch:
    """Add up the seconds of the calls that make up a phase. A call inside of another counts for the outer one."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._phase_runs = False
        self._seconds: dict[str, float] = {}
        self._marks: list[dict[str, float]] = []

    def time_calls(self, owner: Any, path: str, phase: str) -> None:
        """Time the calls of an attribute, such as `accelerator.backward`, if `owner` has it."""
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        call = getattr(owner, name, None)
        if call is None:
            return
        self._seconds.setdefault(phase, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._phase_runs:
                return call(*args, **kwargs)
            self._phase_runs, start = True, self._now()
            try:
                return call(*args, **kwargs)
            finally:
                self._phase_runs = False
                self._seconds[phase] += self._now() - start

        setattr(owner, name, timed)

    def mark(self) -> None:
        """Mark the end of a step."""
        self._marks.append({"total": self._now(), **self._seconds})

    def steps(self) -> list[dict[str, float]]:
        """Return the seconds between marks, by phase and in total."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [{key: end[key] - start.get(key, 0.0) for key in end} for start, end in pairs]


def _run(work: StepWork, name: str, steps: int, device: str, folder: str) -> tuple[list[dict[str, float]], float]:
    """Return the seconds of the steps that count, and the peak memory with weights and optimiser."""
    if TRAINERS[name].module == "unsloth":
        __import__("unsloth")  # must be imported before transformers and TRL
    from transformers import TrainerCallback

    if work.zero2 or work.vllm:  # both need the environment of a launcher, even for one process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    watch = Stopwatch(clock(device))

    class Marks(TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            watch.time_calls(optimizer, "step", "train")
            watch.mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.mark()

    def run() -> None:
        trainer = _build(work, name, steps + 1, device, folder)
        for phase, paths in TRAINERS[name].phases.items():
            for path in paths:
                watch.time_calls(trainer, path, phase)
        trainer.add_callback(Marks())
        trainer.train()

    peak = peak_mib(run, device)
    return watch.steps()[1:], peak


def _build(work: StepWork, name: str, steps: int, device: str, folder: str) -> Any:
    from datasets import Dataset

    peer = TRAINERS[name]
    tokenizer = build_tokenizer(MODELS[work.model].vocabulary)
    model = build_model(work.model, device)
    model_folder = Path(folder, "model")
    if work.vllm or peer.loads_model:  # vLLM reads the architecture from a folder
        model.save_pretrained(model_folder)
        tokenizer.save_pretrained(model_folder)
        model.name_or_path = model.config._name_or_path = str(model_folder)
    if peer.loads_model:
        model = None
    prompts = build_prompts(work.prompts * steps, work.prompt_length)
    dataset = Dataset.from_dict({"prompt": prompts})
    run_folder = str(Path(folder, "run"))
    return peer.build(Setting(work, model, tokenizer, dataset, run_folder, str(model_folder), steps, device))
