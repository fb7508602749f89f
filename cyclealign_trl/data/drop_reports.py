"""Report why a loader dropped rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def dropped_rows(reasons: Iterable[str] | Counter[str]) -> str:
    """Return the number of dropped rows by reason, as text in alphabetical order.

    Args:
        reasons: One reason per dropped row, or their counts.

    Example:
        >>> f"5 rows, 2 kept; {dropped_rows(['repeated', 'empty', 'repeated'])}"
        '5 rows, 2 kept; dropped: empty 1, repeated 2'
    """
    counts = sorted(Counter(reasons).items())
    return "dropped: " + (", ".join(f"{reason} {count}" for reason, count in counts) or "none")
