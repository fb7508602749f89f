"""Measure seconds and peak memory, each in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
MIB = 2**20


class NotMeasured(Exception):  # noqa: N818 - it is not a fault
    """Something was not measured. The text says why and is printed in place of figures."""


class Budget:
    """Seconds that a part of the benchmark may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left.

        Raises:
            NotMeasured: If there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise NotMeasured(f"not run: the {self.seconds:.0f} s of this part were over")
        return left


def isolated(function: Callable[..., T], *arguments: Any, device: str, budget: Budget) -> T:
    """Call a function in a process of its own and return what it returns.

    The function must be importable, and its arguments and result picklable. On the CPU the process is forked, so it
    need not import anything again. CUDA cannot be used after a fork.

    Raises:
        NotMeasured: If the function raises or does not finish within the budget.
    """
    seconds = budget.left()
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, device, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise NotMeasured(f"not finished within {seconds:.0f} s")
        value, note = receiver.recv()
    except EOFError as error:
        process.join(10)
        raise NotMeasured(f"failed: the process ended with {process.exitcode}") from error
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the function has started
        process.kill()
        process.join()
    if note:
        raise NotMeasured(note)
    result: T = value
    return result


def _send_result(sender: Connection, device: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # trainers print their logs
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        sender.send((function(*arguments), ""))
    except NotMeasured as error:
        sender.send((None, str(error)))
    except torch.OutOfMemoryError:
        sender.send((None, "out of memory"))
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        sender.send((None, f"failed: {type(error).__name__}: {first_line[:200]}"))


def clock(device: str) -> Callable[[], float]:
    """Return a clock: processor seconds on the CPU, which other processes hardly change; else synchronised seconds."""
    if device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: str, seconds: float
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round. In a round, all calls run once, in turn.

    A round that does not count comes first. No further round starts after `seconds`, but one round always counts.
    """
    now, end = clock(device), time.monotonic() + seconds
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > end:
            break
        for name, call in calls.items():
            gc.collect()
            start = now()
            call()
            if number:
                measured[name].append(now() - start)
    return measured


def peak_mib(call: Callable[[], object], device: str) -> float:
    """Return by how many MiB a call raises the memory in use at its peak.

    On the CPU this is resident memory of the process, and on a GPU memory that PyTorch has allocated.

    Raises:
        NotMeasured: On a CPU without Linux.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.init()  # there are no statistics to reset before
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if not sys.platform.startswith("linux"):
        raise NotMeasured("peak memory of a process is read from /proc, which only Linux has")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM to VmRSS
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


def return_freed_memory() -> None:
    """Let the C library return tensors to the system as soon as they are freed: resident memory is memory in use.

    Call this before the first tensor is allocated. Allocations take longer afterwards.
    """
    if sys.platform.startswith("linux"):
        trim_threshold, mmap_threshold, size = -1, -3, 65536  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, size)
        library.mallopt(trim_threshold, size)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)
