"""Threads that take the place of the processes of a run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor


class Processes:
    """Run a function on several threads, each with the index of a process.

    Args:
        number: Number of processes.
    """

    def __init__(self, number):
        self._number = number
        self._barrier = threading.Barrier(number, timeout=20)
        self._own = threading.local()
        self._gathered = [None] * number

    def gather_object(self, objects):
        """Return the objects of all processes, as `accelerate.utils.gather_object` does."""
        self._gathered[self._own.index] = objects
        self._barrier.wait()
        gathered = [entry for part in self._gathered for entry in part]
        self._barrier.wait()
        return gathered

    def run(self, act):
        """Call `act(index)` in all processes, and return what it returned or raised in each."""

        def in_process(index):
            self._own.index = index
            try:
                return act(index)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self._number) as pool:
            return list(pool.map(in_process, range(self._number)))
