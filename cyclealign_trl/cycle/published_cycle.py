"""What a run of the cycle publishes: its card, its demonstrations, and its log as a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ..offline.ranking_trainer import RankingTrainer
from ..rankers.base import Ranker, ranker_name
from ..training.model_card import CYCLEALIGN, TrainedModel, public_name
from .cyclealign_config import CycleAlignConfig
from .demonstrations import DemonstrationPool
from .interaction_log import COLUMNS, InteractionLog, summarize
from .publishing import interaction_sections, push_interactions, save_demonstrations


class PublishedCycle(RankingTrainer):
    """Publishes what its subclass, the cycle itself, holds."""

    args: CycleAlignConfig
    demonstrations: DemonstrationPool
    interaction_log: InteractionLog
    ranker: Ranker

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card, and beside it the demonstrations of a run; see `RankingTrainer.create_model_card`."""
        if self.is_world_process_zero():
            save_demonstrations(self.demonstrations, Path(self.args.output_dir))
        super().create_model_card(*args, **kwargs)

    def push_interactions_to_hub(
        self, repo_id: str | None = None, private: bool | None = None, token: str | None = None
    ) -> str:
        """Publishes the log of interactions as a data set with a card. Call it on all processes.

        Args:
            repo_id: Where to; by default the model's repository with `-interactions` behind its name.
            private: Whether a new repository is private; by default as `hub_private_repo` says.
            token: A token that may write; by default `hub_token`, or the one that is logged in.

        Returns:
            The data set's address.

        Raises:
            FileNotFoundError: If the run has no log.
            RuntimeError: On the other processes, if it failed on the main one, which raises the error itself.
        """
        address: str | None = None
        error: Exception | None = None
        if self.is_world_process_zero():
            try:
                address = push_interactions(
                    self.interaction_log.read(),
                    repo_id or f"{self._repo_id}-interactions",
                    self._cycle_settings(),
                    private=self.args.hub_private_repo if private is None else private,
                    token=self.args.hub_token if token is None else token,
                )
            except Exception as raised:  # raised below: the other processes are waiting
                error = raised
        (address,) = broadcast_object_list([address])
        if error is not None:
            raise error
        if address is None:
            raise RuntimeError("The main process could not publish the log of interactions: see its error.")
        return address

    def _describe(self, model: TrainedModel) -> TrainedModel:
        model = super()._describe(model)
        (loss,) = model.papers
        sections: list[str] = []
        if self.interaction_log.paths:
            rows = self.interaction_log.read(COLUMNS).to_pylist()
            sections = interaction_sections(summarize(rows, self.args.min_agreement), Path(self.args.output_dir))
        return replace(
            model,
            papers=(CYCLEALIGN, loss),
            method=f"{CYCLEALIGN.link}: it sampled completions, a ranker put them in order, what both agreed on was "
            f"shown to the ranker as a demonstration, and it learned the order by {loss.link}.",
            settings={**model.settings, **self._cycle_settings()},
            sections=sections,
        )

    def _cycle_settings(self) -> dict[str, str]:
        args, pool = self.args, self.demonstrations
        target = {
            "improved": "the ranker's improved completion",
            "top_ranked": "the top-ranked completion",
            "corrector": "the ranker's improved completion, or the corrected best one",
        }
        dynamic = f"at most {pool.capacity} dynamic per {pool.scope}" if pool.capacity else "no dynamic"
        return {
            "SFT loss": f"{args.sft_weight} (K - 1)², on {target[args.sft_target]}" if args.sft_weight else "none",
            "ranker": f"`{public_name(ranker_name(self.ranker))}`",
            "completions per prompt, K": str(args.num_generations),
            "interactions per prompt": f"{'at most ' if args.stop_on_agreement else ''}{args.num_interactions}",
            "demonstrations": f"{len(pool.static)} static, {dynamic}",
            "sampling": f"temperature {args.temperature}, top_p {args.top_p}, top_k {args.top_k}",
        }
