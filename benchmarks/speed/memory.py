"""Measure the peak memory of a scoring step by number of completions, beside what the number of tokens predicts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .loss import OURS, measure_peaks
from .measuring import Budget
from .plans import LossWork

ROWS = "TRL, padded rows"


def measure_memory(works: tuple[LossWork, ...], device: str, budget: Budget) -> list[dict[str, Any]]:
    """Return a row for each work: peak MiB of both layouts and their growth, beside the growth of their tokens.

    A prompt of P tokens with K completions takes `P + K C` tokens if it is computed once, where C is their mean
    length, and `K (P + C)` in padded rows, where C is the longest. Growth is relative to the first work.

    Args:
        works: Works that differ in the number of responses.
        device: `"cpu"` or `"cuda"`.
        budget: Budget of the part.
    """
    rows: list[dict[str, Any]] = []
    measured = measure_peaks(works, (OURS, ROWS), device, budget)
    for work, (peaks, notes) in zip(works, measured, strict=True):
        prompt, completions = work.lengths
        row: dict[str, Any] = {
            "work": str(work),
            **asdict(work),
            "shared_tokens": prompt + sum(completions),
            "padded_tokens": work.n * (prompt + max(completions)),
        }
        for name, key in ((OURS, "ours_mib"), (ROWS, "padded_mib")):
            if name in peaks:
                row[key] = peaks[name]
        row["note"] = "; ".join(f"{name}: {note}" for name, note in notes.items())
        rows.append(row)
    for key in ("shared_tokens", "padded_tokens", "ours_mib", "padded_mib"):
        for row in rows:
            if row.get(key) and rows[0].get(key):
                row[f"{key.removesuffix('_mib')}_growth"] = row[key] / rows[0][key]
    return rows
