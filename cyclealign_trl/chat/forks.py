"""Rebuild objects in the child of a fork: its threads are gone, and its locks and connections belong to the parent."""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol


class Rebuildable(Protocol):
    """An object that works in a forked process after `rebuild_after_fork`."""

    def rebuild_after_fork(self) -> None:
        """Replace locks, threads and connections by new ones."""
        ...


_OBJECTS: weakref.WeakSet[Rebuildable] = weakref.WeakSet()
_KEPT: list[Any] = []


def register(instance: Rebuildable) -> None:
    """Rebuild an object in every later child."""
    _OBJECTS.add(instance)


def keep(*resources: object) -> None:
    """Keep resources of the parent until the child exits. Closing them in the child could disturb the parent."""
    _KEPT.append(resources)


def _rebuild_all() -> None:
    for instance in list(_OBJECTS):
        instance.rebuild_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_rebuild_all)
