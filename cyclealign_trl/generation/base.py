"""The seam between the cycle and whoever samples: one required method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn


class GenerationBackend(Protocol):
    """Samples completions from the policy as it is now."""

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Samples K completions for each of B prompts.

        Args:
            model: The policy, as wrapped for training.
            prompt_ids: Token ids of B prompts.

        Returns:
            Token ids of B x K completions, without padding. A completion that ended by itself ends in its
            end-of-sequence token; one without was cut off.
        """
        ...
