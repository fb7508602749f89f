"""Every interaction of a run, as Parquet files that `datasets.load_dataset("parquet", ...)` reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..interaction import Settlement

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_ORDER = pa.list_(pa.int64())
_USAGE = pa.struct(
    [
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("cost", pa.float64()),
        ("attempts", pa.int64()),
        ("cached", pa.bool_()),
    ]
)


def schema(conversational: bool) -> pa.Schema:
    """The columns of the log. Prompts are chat messages or text, orders list indices into `completions`.

    `ranks` holds the rank of each completion (0 = best), where ties show, which orders cannot.
    """
    return pa.schema(
        [
            ("step", pa.int64()),
            ("interaction", pa.int64()),
            ("prompt", _MESSAGES if conversational else pa.string()),
            ("completions", pa.list_(pa.string())),
            ("black_box_order", _ORDER),
            ("white_box_order", _ORDER),
            ("agreement", _ORDER),
            ("ranks", _ORDER),
            ("improved_completion", pa.string()),
            ("failure", pa.string()),
            ("usage", _USAGE),
            ("consistency", pa.float64()),
        ]
    )


class InteractionLog:
    """Writes `interactions/step-NNNNNN-R.parquet`: one file per optimiser step and process.

    A file is renamed into place when it is complete, and overwritten when a resumed run replays its step.

    Args:
        output_dir: The run's output directory.
        process_index: This process, R.
    """

    def __init__(self, output_dir: str | os.PathLike[str], process_index: int) -> None:
        self.folder = Path(output_dir) / "interactions"
        self._process_index = process_index

    def write(self, step: int, interaction: int, settlements: Sequence[Settlement]) -> None:
        """Writes what became of each of the process's prompts in one step.

        Args:
            step: Optimiser steps finished before this one.
            interaction: Position in the cycle, from 0.
            settlements: One per prompt.
        """
        rows = [_row(step, interaction, settlement) for settlement in settlements]
        conversational = isinstance(settlements[0].prompt, list)
        path = self.folder / f"step-{step:06d}-{self._process_index}.parquet"
        unfinished = path.with_suffix(".tmp")
        self.folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema(conversational)), unfinished)
        unfinished.replace(path)

    @property
    def paths(self) -> list[Path]:
        """The files of all processes, by step."""
        return sorted(self.folder.glob("*.parquet"))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The log of all processes, by step.

        Args:
            columns: Those to read; `None` reads all.

        Raises:
            FileNotFoundError: If there is none.
        """
        if not self.paths:
            raise FileNotFoundError(f"No interaction log in {self.folder}: train first, in this output directory.")
        return pa.concat_tables(pq.read_table(path, columns=columns) for path in self.paths)


def _row(step: int, interaction: int, settlement: Settlement) -> dict[str, Any]:
    return {
        "step": step,
        "interaction": interaction,
        "prompt": settlement.prompt,
        "completions": settlement.completions,
        "black_box_order": settlement.black_box_order,
        "white_box_order": settlement.white_box_order,
        "agreement": settlement.agreement,
        "ranks": settlement.ranks,
        "improved_completion": settlement.improved_completion,
        "failure": settlement.failure,
        "usage": None if settlement.usage is None else asdict(settlement.usage),
        "consistency": settlement.consistency,
    }
