"""Measure forward and backward of our ranking loss beside the losses of other projects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.peer_adapter import loss_step

from .limits import training_flops
from .measuring import Budget, NotMeasured, interleaved, isolated, peak_mib, return_freed_memory
from .peer_losses import PEER_LOSSES, Loss
from .plans import LossWork
from .shapes import MODELS, Group, add_lora, build_group, build_model

OURS = "ours"
LOSSES = (OURS, *PEER_LOSSES)
Row = dict[str, Any]
Peaks = tuple[dict[str, float], dict[str, str]]  # peaks in MiB, and why others were not measured


def measure_loss(
    work: LossWork, device: str, rounds: int, budget: Budget, rate: float, names: tuple[str, ...] = LOSSES
) -> list[Row]:
    """Return a row for each loss: median seconds, peak MiB, our ratio to it, and its share of the limit.

    Ratios of seconds are medians of the ratios within each round. A loss that was not measured has a `note`.

    Args:
        work: What is measured.
        device: `"cpu"` or `"cuda"`.
        rounds: Rounds that count, at most.
        budget: Budget of the part.
        rate: Operations per second that the device attains.
        names: The losses to measure.
    """
    rows: dict[str, Row] = {name: {"work": str(work), "loss": name, **asdict(work)} for name in names}
    seconds, peaks = _seconds_and_peaks(work, device, rounds, budget, rows)
    limit = training_flops(MODELS[work.model], *work.lengths, work.lora) / rate
    for name, row in rows.items():
        row["peak_mib"] = peaks.get(name)
        if name in seconds:
            row["seconds"] = median(seconds[name])
            row["share_of_limit"] = limit / row["seconds"]
        if name != OURS and name in seconds and OURS in seconds:
            pairs = zip(seconds[OURS], seconds[name], strict=True)
            row["ours_to_it_seconds"] = median(ours / its for ours, its in pairs)
        if name != OURS and peaks.get(name) and peaks.get(OURS):
            row["ours_to_it_memory"] = peaks[OURS] / peaks[name]
    return list(rows.values())


def _seconds_and_peaks(
    work: LossWork, device: str, rounds: int, budget: Budget, rows: dict[str, Row]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Measure the losses, and write why one was not measured into its row."""
    names = tuple(rows)
    try:
        if device == "cpu":
            seconds_of = isolated(_seconds, work, names, rounds, budget.left() / 2, device=device, budget=budget)
            peaks, notes = measure_peaks((work,), names, device, budget)[0]
            notes = {name: f"memory: {note}" for name, note in notes.items()}
        else:  # on a GPU, loading a large model takes longer than all losses
            seconds_of, peaks, notes = isolated(
                measure_in_one_process, work, names, rounds, budget.left() / 2, device, device=device, budget=budget
            )
    except NotMeasured as error:
        seconds_of, peaks, notes = {}, {}, dict.fromkeys(names, str(error))
    for name, note in notes.items():
        rows[name]["note"] = note
    return seconds_of, peaks


def measure_peaks(works: Sequence[LossWork], names: Sequence[str], device: str, budget: Budget) -> list[Peaks]:
    """Return for each work the peak MiB of forward and backward of losses, above weights and gradients.

    Args:
        works: Works that differ in the group, not in the model.
        names: The losses to measure.
        device: `"cpu"` or `"cuda"`. On the CPU, each loss of each work runs in a process of its own.
        budget: Budget of the part.
    """
    if device != "cpu":
        try:
            return isolated(_peaks_of_works, works, names, device, device=device, budget=budget)
        except NotMeasured as error:
            return [({}, dict.fromkeys(names, str(error)))] * len(works)
    measured: list[Peaks] = []
    for work in works:
        peaks: dict[str, float] = {}
        notes: dict[str, str] = {}
        for name in names:
            try:
                ((its_peaks, its_notes),) = isolated(
                    _peaks_of_works, (work,), (name,), device, device=device, budget=budget
                )
                peaks, notes = peaks | its_peaks, notes | its_notes
            except NotMeasured as error:
                notes[name] = str(error)
        measured.append((peaks, notes))
    return measured


def measure_in_one_process(
    work: LossWork, names: Sequence[str], rounds: int, seconds: float, device: str
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """Return seconds, peaks, and notes on losses that ran out of memory, which take no part in the rounds."""
    calls = _calls(_build_model(work, device), _build_group(work, device), names)
    peaks, notes = _peaks(calls, device)
    return interleaved({name: calls[name] for name in peaks}, rounds, device, seconds), peaks, notes


def _build_model(work: LossWork, device: str) -> Any:
    model = build_model(work.model, device)
    if work.lora:
        add_lora(model)
    return model.train()


def _build_group(work: LossWork, device: str) -> Group:
    return build_group(MODELS[work.model].vocabulary, *work.lengths, device)


def _calls(model: Any, group: Group, names: Sequence[str]) -> dict[str, Callable[[], None]]:
    """Return a call for each loss that computes it and adds its gradients to those of the model."""

    def step(loss: Loss) -> None:
        loss(model, group).backward()

    losses: dict[str, Loss] = {OURS: loss_step(), **PEER_LOSSES}
    return {name: partial(step, losses[name]) for name in names}


def _seconds(work: LossWork, names: Sequence[str], rounds: int, seconds: float) -> dict[str, list[float]]:
    calls = _calls(_build_model(work, "cpu"), _build_group(work, "cpu"), names)
    return interleaved(calls, rounds, "cpu", seconds)


def _peaks_of_works(works: Sequence[LossWork], names: Sequence[str], device: str) -> list[Peaks]:
    if device == "cpu":
        return_freed_memory()
    model = _build_model(works[0], device)
    return [_peaks(_calls(model, _build_group(work, device), names), device) for work in works]


def _peaks(calls: Mapping[str, Callable[[], None]], device: str) -> Peaks:
    peaks: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, call in calls.items():
        try:
            call()  # allocates the gradients and what libraries keep
            peaks[name] = peak_mib(call, device)
        except torch.OutOfMemoryError:
            notes[name] = "out of memory"
        if device != "cpu":
            torch.cuda.empty_cache()
    return peaks, notes
