"""The seam between the cycle and whoever corrects answers: one required method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from .types import Prompt


@runtime_checkable
class Corrector(Protocol):
    """Anything that corrects answers, such as an `Aligner`."""

    def correct(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[str]:
        """A better answer for each of N answers to N prompts, or the answer itself where it is good enough."""
        ...
