"""The budgets of several rankers of a run, kept apart, behind the interface of one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .budget import Budget


class JointBudget:
    """Budgets that a run records and shares out together, and that each keep their own caps.

    Args:
        members: Names and budgets. The names tell the ledgers apart, so they must be the same when a run is resumed.
            Equal names are numbered in their order.
    """

    def __init__(self, members: Iterable[tuple[str, Budget | JointBudget]]) -> None:
        self._members = tuple(members)

    def __str__(self) -> str:
        return "; ".join(f"{name}: {budget}" for name, budget in self._members)

    def __eq__(self, other: object) -> bool:
        """Return whether both consist of the same budgets, as those of a jury and of its cached version do."""
        if not isinstance(other, JointBudget):
            return NotImplemented
        return [budget for _, budget in self._members] == [budget for _, budget in other._members]

    @property
    def committed(self) -> tuple[Any, ...]:
        """What each member has committed, see `Budget.committed`."""
        return tuple(budget.committed for _, budget in self._members)

    def share_out(self, committed: Iterable[Sequence[Any]]) -> None:
        """Divide what is left of each member's caps equally among the processes.

        Args:
            committed: What each process has committed, including this one.
        """
        for (_, budget), amounts in zip(self._members, zip(*committed, strict=True), strict=True):
            budget.share_out(amounts)

    def keep_ledger(self, folder: str | PathLike[str], process_index: int = 0, num_processes: int = 1) -> None:
        """Record the spending of each member in a folder of its own, `folder/<name>`; see `Budget.keep_ledger`."""
        used: set[str] = set()
        for name, budget in self._members:
            base = re.sub(r"[^\w.-]+", "-", name)[:80].strip(".") or "ranker"
            part, number = base, 2
            while part.lower() in used:
                part, number = f"{base}-{number}", number + 1
            used.add(part.lower())
            budget.keep_ledger(Path(folder, part), process_index, num_processes)
