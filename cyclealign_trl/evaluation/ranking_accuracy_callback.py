"""`RankingAccuracyCallback`: how well the judge ranks, with the demonstrations that the run has found so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..cycle.cyclealign_trainer import CycleAlignTrainer
from ..cycle.step_metrics import usage_counts
from ..rankers.base import Outcome, Ranker
from ..types import Demonstration, RankingRequest, RankingResult, prompt_key
from .evaluate_ranker import shown_order
from .metrics.ranking_agreement import RankingAgreement
from .periodic_evaluation import PeriodicEvaluation
from .references import ReferenceRanking, read_references

if TYPE_CHECKING:
    from collections.abc import Sequence

CONDITIONS = ("full", "without_d2", "without_icl")


class RankingAccuracyCallback(PeriodicEvaluation):
    """Measure how well the ranker ranks held-out completions in the course of a run (Figure 4 of arXiv 2310.16271).

    Every `eval_steps` steps and at the end, the ranker orders groups of completions whose order is known, under three
    conditions: with static and dynamic demonstrations ("full"), with static ones alone ("without_d2"), and with none
    ("without_icl"). A group that is shown the same demonstrations under two conditions is ranked once. The completions
    are shown in a random order, the same in every evaluation.

    The dynamic demonstrations are those that the pool holds when the evaluated step begins, which the requests of
    that step are shown. Each held-out group gets those of one prompt, as many as in training, in turns over the
    prompts in the pool. With the scope "run", every group gets all of them. A pool with the scope "prompt" is empty in
    the first interaction of a window, so `eval_steps` should be a multiple of `num_interactions`: the evaluated step
    is then the last interaction, which is shown the most.

    Args:
        ranker: The judge to measure, usually `trainer.ranker`, which shares the cache and the budget of the run.
        trainer: The trainer, whose pool the demonstrations come from.
        dataset: Rows with a reference order, in any format that `read_references` supports.
        eval_steps: Number of optimiser steps from one evaluation to the next.
        patience: Number of evaluations without an improvement after which training stops. `None` never stops.
        min_delta: How much the accuracy ("full") must rise above its best value to count as an improvement.
        confidence_level: Coverage of the intervals.
        seed: Seed of the shown orders and the bootstrap.

    Raises:
        TypeError: If `trainer` is not a `CycleAlignTrainer`, or `ranker` not a ranker.
        ValueError: If an argument is out of range, or no row has a reference order.
    """

    name = "ranking_accuracy"
    target = "ranking_accuracy/full"
    trainer: CycleAlignTrainer

    def __init__(
        self,
        ranker: Ranker,
        trainer: CycleAlignTrainer,
        dataset: Iterable[Mapping[str, Any]],
        eval_steps: int,
        *,
        patience: int | None = None,
        min_delta: float = 0.0,
        confidence_level: float = 0.95,
        seed: int = 0,
    ) -> None:
        if not isinstance(trainer, CycleAlignTrainer):
            raise TypeError(
                f"RankingAccuracyCallback needs a CycleAlignTrainer, which collects demonstrations, got "
                f"{type(trainer).__name__}. To measure a ranker without a run, call evaluate_ranker."
            )
        super().__init__(ranker, trainer, eval_steps, patience, min_delta, confidence_level, seed)
        self._references, dropped = read_references(dataset)
        if not self._references:
            raise ValueError(f"No row of dataset has a reference order; dropped rows: {dict(dropped)}.")
        self._groups: list[tuple[Demonstration, ...]] = []  # of this process, when the current step began

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `PeriodicEvaluation`."""
        self._groups = self.trainer.demonstrations.groups()
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the demonstrations of the moment: at the end of a window, the step's end is too late."""
        self._groups = self.trainer.demonstrations.groups()

    def evaluate(self) -> dict[str, float]:
        """Rank the groups under each condition, and return the metrics."""
        requests: list[RankingRequest] = []
        positions: dict[str, list[int]] = {condition: [] for condition in CONDITIONS}  # of their requests
        dynamic = self._dynamic_demonstrations()
        static = self.trainer.demonstrations.static
        for index, reference in enumerate(self._references):
            own = dynamic[index % len(dynamic)] if dynamic else ()
            position_of: dict[int, int] = {}  # by number of demonstrations, as each condition drops some
            for condition, shown, num_static in zip(
                CONDITIONS, ((*static, *own), static, ()), (len(static), len(static), 0), strict=True
            ):
                if len(shown) not in position_of:
                    position_of[len(shown)] = len(requests)
                    requests.append(self._request(reference, shown, num_static))
                positions[condition].append(position_of[len(shown)])
        outcomes = self.rank(requests)
        metrics = {"failed": float(sum(not isinstance(outcome, RankingResult) for outcome in outcomes))}
        for condition in CONDITIONS:
            metrics |= self._accuracy(condition, [outcomes[position] for position in positions[condition]])
        named = {f"{self.name}/{metric}": value for metric, value in metrics.items()}
        return named | usage_counts(self.name, [outcome.usage for outcome in outcomes])

    def _dynamic_demonstrations(self) -> list[tuple[Demonstration, ...]]:
        """Return the demonstrations of each prompt in the pools of all processes, in an order of the prompts."""
        pools: list[list[tuple[Demonstration, ...]]] = gather_object([self._groups])
        if self.trainer.demonstrations.scope == "run":  # all processes hold the same
            return pools[0]
        return sorted(chain.from_iterable(pools), key=lambda group: prompt_key(group[0].prompt))

    def _request(
        self, reference: ReferenceRanking, demonstrations: Sequence[Demonstration], num_static: int
    ) -> RankingRequest:
        return RankingRequest(
            reference.prompt,
            tuple(reference.completions[index] for index in shown_order(reference, self.seed)),
            tuple(demonstrations),
            reference.metadata,
            num_static,
        )

    def _accuracy(self, condition: str, outcomes: Sequence[Outcome]) -> dict[str, float]:
        predictions, references = [], []
        for reference, outcome in zip(self._references, outcomes, strict=True):
            if isinstance(outcome, RankingResult):
                shown = shown_order(reference, self.seed)
                rank_of = dict(zip(shown, outcome.resolved_ranks, strict=True))
                predictions.append([rank_of[index] for index in range(len(shown))])
                references.append(list(reference.ranks))
        if not predictions:
            return {}
        agreement = RankingAgreement(keep_in_memory=True).compute(
            predictions=predictions, references=references, confidence_level=self.confidence_level, seed=self.seed
        )
        low, high = agreement["pairwise_accuracy_interval"]
        return {
            condition: agreement["pairwise_accuracy"],
            f"{condition}_low": low,
            f"{condition}_high": high,
            f"{condition}_exact_match": agreement["exact_match"],
        }
