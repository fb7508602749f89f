"""Write files atomically, and tell local paths from names on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` if the block raises nothing.

    The temporary file is in the same folder and ends in `.tmp`. Each process has its own.

    Args:
        path: The final path. Missing folders are created, and an existing file is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_missing_path(name: str) -> bool:
    """Return whether a name can only be a local path, not `name` or `owner/name` on the Hub, and nothing is there."""
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1
    return is_path and not os.path.exists(name)
