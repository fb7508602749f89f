"""Means, counts and times between two logs."""

import time

import pytest
import torch
from accelerate import Accelerator

from cyclealign_trl.training.metrics import MetricStore


class Clock:
    """Clock that moves only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def advance(self, seconds):
        self.now += seconds


class TwoProcesses:
    """Accelerator whose other process has reported the given values."""

    device = torch.device("cpu")

    def __init__(self, *others):
        self.others = list(others)

    def reduce(self, values, reduction="sum"):
        total = values + torch.tensor(self.others.pop(0), dtype=values.dtype)
        return total / 2 if reduction == "mean" else total


def make_store(accelerator=None, mode="train"):
    return MetricStore(accelerator or Accelerator(cpu=True), lambda: mode)


def test_means_are_weighted():
    metrics = make_store()
    metrics.add_mean("loss", 1.0)
    metrics.add_mean("loss", 4.0, weight=2.0)
    metrics.add_mean("rate", 0.5, weight=7.0)
    assert metrics.drain("train") == {"loss": pytest.approx(3.0), "rate": 0.5}


def test_counts_are_summed():
    metrics = make_store()
    metrics.add_count("failures/timeout", 2)
    metrics.add_count("failures/timeout", 3)
    assert metrics.drain("train") == {"failures/timeout": 5}


def test_modes_are_kept_apart_and_drained_once():
    mode = "train"
    metrics = MetricStore(Accelerator(cpu=True), lambda: mode)
    metrics.add_mean("loss", 1.0)
    metrics.add_count("failures/timeout", 1)
    mode = "eval"
    metrics.add_mean("loss", 2.0)
    assert metrics.drain("eval") == {"loss": 2.0}
    assert metrics.drain("eval") == {}
    assert metrics.drain("train") == {"loss": 1.0, "failures/timeout": 1}
    assert metrics.drain("train") == {}


def test_elements_of_tensors_weigh_alike():
    metrics = make_store()
    metrics.add_tensors({"loss": torch.tensor([1.0, 2.0, 3.0]), "accuracy": torch.tensor([True, False])})
    metrics.add_tensors({"loss": torch.tensor([10.0]), "accuracy": torch.tensor([[True], [True]])})
    assert metrics.drain("train") == {"loss": pytest.approx(4.0), "accuracy": pytest.approx(0.75)}


def test_empty_tensors_add_nothing():
    metrics = make_store()
    metrics.add_tensors({"accuracy": torch.tensor([]), "loss": torch.tensor([1.0])})
    assert metrics.drain("train") == {"loss": 1.0}


def test_elements_weigh_alike_over_processes_with_different_numbers_of_them():
    # Sum and number of elements of each metric on the other process.
    metrics = make_store(TwoProcesses([9.0, 1.0, 0.0, 0.0]))
    metrics.add_tensors({"loss": torch.tensor([1.0, 2.0]), "accuracy": torch.tensor([])})
    assert metrics.drain("train") == {"loss": pytest.approx(4.0)}


def test_local_values_are_averaged_over_processes():
    metrics = make_store(TwoProcesses([4.0, 10.0]))
    metrics.add_local({"pool/size": 2.0, "time/forward": 0.0})
    assert metrics.drain("train") == {"pool/size": 3.0, "time/forward": 5.0}


def test_an_outer_timer_excludes_the_time_of_inner_ones(monkeypatch):
    clock, metrics = Clock(monkeypatch), make_store()
    with metrics.timer("backward"):
        clock.advance(1)
        with metrics.timer("forward"):
            clock.advance(2)
            with metrics.timer("rank_wait"):
                clock.advance(4)
        with metrics.timer("forward"):
            clock.advance(8)
        clock.advance(16)
    metrics.add_times()
    assert metrics.drain("train") == {"time/backward": 17, "time/forward": 10, "time/rank_wait": 4}


def test_times_start_at_0_after_they_were_added(monkeypatch):
    clock, metrics = Clock(monkeypatch), make_store()
    for seconds in (1, 3):
        with metrics.timer("forward"):
            clock.advance(seconds)
        metrics.add_times()
    assert metrics.drain("train") == {"time/forward": 2}  # a mean of both calls


def test_a_block_that_raises_is_timed(monkeypatch):
    clock, metrics = Clock(monkeypatch), make_store()

    def fail():
        with metrics.timer("rank_wait"):
            clock.advance(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    metrics.add_times()
    assert metrics.drain("train") == {"time/rank_wait": 5}
