"""Measure forward and backward of our ranking loss beside the losses of other projects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

from benchmarks.peer_adapter import loss_step

from .limits import training_flops
from .measuring import Budget, NotMeasured, interleaved, isolated, peak_mib, return_freed_memory
from .peer_losses import PEER_LOSSES, Loss
from .plans import LossWork
from .shapes import MODELS, Group, add_lora, build_group, build_model, response_lengths

OURS = "ours"
LOSSES = (OURS, *PEER_LOSSES)
Row = dict[str, Any]


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
    limit = training_flops(MODELS[work.model], *_lengths(work), work.lora) / rate
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
    peaks: dict[str, float] = {}
    try:
        names = tuple(rows)
        if device != "cpu":  # on a GPU, loading a large model takes longer than all losses
            # A loss that runs out of memory must not take part in the rounds, so peaks are measured first.
            seconds, peaks, notes = isolated(_time_on_gpu, work, names, rounds, budget.left(), device=device,
                                             budget=budget)  # fmt: skip
            for name, note in notes.items():
                rows[name]["note"] = note
            return seconds, peaks
        seconds = isolated(_time, work, names, rounds, budget.left() / 2, device=device, budget=budget)
    except NotMeasured as error:
        for row in rows.values():
            row["note"] = str(error)
        return {}, {}
    for name, row in rows.items():
        try:
            peaks[name] = isolated(_peak, work, name, device=device, budget=budget)
        except NotMeasured as error:
            row["note"] = f"memory: {error}"
    return seconds, peaks


def measure_peak(work: LossWork, name: str, device: str, budget: Budget) -> float:
    """Return the peak MiB of forward and backward of one loss, above weights and gradients.

    Raises:
        NotMeasured: If it could not be measured.
    """
    return isolated(_peak, work, name, device, device=device, budget=budget)


def _lengths(work: LossWork) -> tuple[int, list[int]]:
    prompt = round(work.length * work.prompt_share)
    return prompt, response_lengths(work.length - prompt, work.n)


def _build(work: LossWork, device: str) -> tuple[Any, Group]:
    model = build_model(work.model, device)
    if work.lora:
        add_lora(model)
    model.train()
    return model, build_group(MODELS[work.model].vocabulary, work.length, work.prompt_share, work.n, device)


def _calls(model: Any, group: Group, names: tuple[str, ...]) -> dict[str, Callable[[], None]]:
    """Return a call for each loss that computes it and adds its gradients to those of the model."""

    def step(loss: Loss) -> None:
        loss(model, group).backward()

    losses: dict[str, Loss] = {OURS: loss_step(), **PEER_LOSSES}
    return {name: partial(step, losses[name]) for name in names}


def _time(work: LossWork, names: tuple[str, ...], rounds: int, seconds: float) -> dict[str, list[float]]:
    return interleaved(_calls(*_build(work, "cpu"), names), rounds, "cpu", seconds)


def _peak(work: LossWork, name: str, device: str = "cpu") -> float:
    call = _calls(*_build(work, device), (name,))[name]
    call()  # allocates the gradients and what libraries keep
    if device == "cpu":
        return_freed_memory()
    return peak_mib(call, device)


def _time_on_gpu(
    work: LossWork, names: tuple[str, ...], rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """Return seconds, peaks, and notes on the losses that ran out of memory."""
    import torch

    calls = _calls(*_build(work, "cuda"), names)
    peaks: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, call in calls.items():
        try:
            call()
            peaks[name] = peak_mib(call, "cuda")
        except torch.OutOfMemoryError:
            notes[name] = "out of memory"
        torch.cuda.empty_cache()
    fitting = {name: call for name, call in calls.items() if name in peaks}
    return interleaved(fitting, rounds, "cuda", seconds / 2), peaks, notes
