"""JSON lines that are appended as they are computed, and continued after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._files import atomic_write

KEY = "prompt_id"
"""Column that identifies a row."""


class RowFile:
    """Rows by `prompt_id` in a file of JSON lines, which `datasets` loads.

    Each call of `append` writes its rows to the disk before it returns. If the process is killed while it writes, the
    next one drops the incomplete last line.

    Args:
        path: Path of the file, created if missing.
        settings: Settings that the rows depend on, as JSON-compatible data. They are stored beside the file, in
            `NAME.settings.json`.

    Raises:
        ValueError: If the file was written with other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._check_settings(settings)
        self.rows: dict[str, dict[str, Any]] = {row[KEY]: row for row in self._read()}

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows with ids that the file does not have."""
        new = {row[KEY]: row for row in rows}
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in new.values())
        with self.path.open("ab") as file:
            file.write(lines.encode(errors="replace"))  # no file accepts lone surrogates
            file.flush()
            os.fsync(file.fileno())
        self.rows |= new

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.path.with_suffix(".settings.json")
        if not self.path.exists():
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            return
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        before, now = _flatten(stored), _flatten(settings)
        changes = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changes:
            raise ValueError(
                f"{self.path} was written with other settings: {', '.join(changes)}. Choose another output_dir, or "
                "delete the file to compute it again."
            )

    def _read(self) -> list[dict[str, Any]]:
        """Read the rows, after cutting off an incomplete last line."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            os.truncate(self.path, complete)
        rows = []
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                row[KEY]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"Line {number} of {self.path} is damaged: {error}. Delete this line.") from error
            rows.append(row)
        return rows


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dictionary, after a round trip through JSON."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
