"""Targets of a batch: the ranker's order, the completion to imitate, and the weight of each prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .._warnings import OnceLogger
from ..chat.budget import BUDGET_EXHAUSTED
from ..models.renderer import Renderer
from ..offline.ranking_collator import TokenIds
from ..offline.ranking_trainer import RankingTargets
from ..types import ABSENT
from .cyclealign_config import CycleAlignConfig
from .interaction import InteractionResult

logger = logging.getLogger(__name__)


class TargetBuilder:
    """Build the targets of batches as the arguments say.

    Args:
        args: The arguments.
        renderer: Tokenises improved completions.
    """

    def __init__(self, args: CycleAlignConfig, renderer: Renderer) -> None:
        self._args = args
        self._renderer = renderer
        self._once = OnceLogger(logger)

    def trains_sft_alone(self, result: InteractionResult) -> bool:
        """Return whether the budget is used up and the run goes on without rankings."""
        return self._args.at_budget_cap == "sft" and result.failure == BUDGET_EXHAUSTED

    def sft_target(self, result: InteractionResult, completion_ids: list[TokenIds]) -> tuple[TokenIds | None, bool]:
        """Return the token ids to imitate, `None` for the top-ranked completion, and whether they were truncated."""
        alone = self.trains_sft_alone(result)
        # An improved completion that equals a sampled one would compete with itself if it ranked above all.
        competes = self._args.rank_improved_completion and result.improved_completion in result.completions
        if (
            result.improved_completion is not None
            and self._args.sft_target != "top_ranked"
            and (alone or not competes)
        ):
            return self._renderer.completion(result.prompt, result.improved_completion)
        return (completion_ids[result.white_box_order[0]] if alone else None), False

    def trains(self, result: InteractionResult, sft_ids: TokenIds | None) -> bool:
        """Return whether the loss of a prompt with this result and SFT target is not weighted with 0."""
        has_loss = result.agreement is not None or (sft_ids is not None and self._args.sft_weight > 0)
        return has_loss and self._weight(result) > 0

    def build(
        self, results: Sequence[InteractionResult], sft_ids: list[TokenIds | None], sums: Tensor
    ) -> RankingTargets:
        """Return the targets of a batch.

        Args:
            results: Results of B interactions.
            sft_ids: Their SFT targets.
            sums: The policy's summed log-probabilities `(B, K)`, for their shape and device.
        """
        absent = (ABSENT,) * sums.shape[1]
        ranks = [absent if result.ranks is None or result.all_tied else result.ranks for result in results]
        has_targets = self._args.sft_target != "top_ranked" or self._args.at_budget_cap == "sft"
        return RankingTargets(
            torch.tensor(ranks, device=sums.device),
            sft_ids=sft_ids if has_targets else None,
            rank_sft_ids=self._args.rank_improved_completion,
            weights=self._weights(results, sums.device),
        )

    def _weights(self, results: Sequence[InteractionResult], device: torch.device) -> Tensor | None:
        """Return the weight of each prompt's loss `(B,)`: the consistency of the ranker's passes, 1 for one pass."""
        if not self._args.weight_by_consistency:
            return None
        if any(result.ranks and result.consistency is None for result in results):
            self._once.warning(
                "single_pass",
                "weight_by_consistency=True has no effect on rankings with a single pass, which weigh 1. Ask for "
                "several passes, as LLMRanker(num_passes=3) does.",
            )
        return torch.tensor([self._weight(result) for result in results], device=device)

    def _weight(self, result: InteractionResult) -> float:
        if not self._args.weight_by_consistency or result.consistency is None:
            return 1.0
        return max(0.0, result.consistency)
