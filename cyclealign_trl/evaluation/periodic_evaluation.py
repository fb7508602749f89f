"""Evaluations in the course of a run: when they happen, what they cost, and when they end the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..cycle.guards import StopCallback
from ..cycle.step_exchange import exchange
from ..errors import RankerError
from ..models.generation_backend import seeded
from ..offline.ranking_trainer import RankingTrainer
from ..rankers.base import Outcome, Ranker, check_ranker, in_request_order, set_default_tokenizer, stream_outcomes
from ..rankers.cache import with_cache
from ..training.checkpoints import set_folder_aside
from ..types import RankingRequest
from .intervals import check_confidence_level

logger = logging.getLogger(__name__)


class PeriodicEvaluation(StopCallback):
    """Evaluate every `eval_steps` optimiser steps and at the end of training, and log the result through the trainer.

    The log history, which checkpoints keep, tells which evaluations a run has made and how they went. A resumed run
    therefore makes the same evaluations as an uninterrupted one and stops at the same step. If the ranker raises
    `RankerError`, the run saves a checkpoint and stops, and the resumed run repeats the evaluation.

    A subclass sets `name`, the folder of its metrics and of its files in the output directory, and `target`, the
    metric that must rise, and implements `evaluate`.

    Args:
        ranker: The judge. With a `fingerprint`, its answers are stored in the output directory, so that a resumed run
            does not pay for them again. A budget of its own gets a ledger there.
        trainer: The trainer that the callback is added to.
        eval_steps: Number of optimiser steps from one evaluation to the next.
        patience: Number of evaluations without an improvement after which training stops. `None` never stops.
        min_delta: How much `target` must rise above its best value to count as an improvement.
        confidence_level: Coverage of the intervals.
        seed: Seed of the bootstrap.

    Raises:
        TypeError: If `trainer` is not a `RankingTrainer`, or `ranker` not a ranker.
        ValueError: If an argument is out of range.
    """

    error = RankerError
    name: ClassVar[str]
    target: ClassVar[str]

    def __init__(
        self,
        ranker: Ranker,
        trainer: RankingTrainer,
        eval_steps: int,
        patience: int | None,
        min_delta: float,
        confidence_level: float,
        seed: int,
    ) -> None:
        if not isinstance(trainer, RankingTrainer):
            raise TypeError(
                f"{type(self).__name__} needs a CycleAlignTrainer, RankingTrainer or DLMATrainer, whose policy "
                f"completes prompts, got {type(trainer).__name__}."
            )
        check_ranker(ranker)
        for argument, value in (("eval_steps", eval_steps), ("patience", patience)):
            if value is not None and value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        if min_delta < 0:
            raise ValueError(f"min_delta must be at least 0, got {min_delta}.")
        check_confidence_level(confidence_level)
        set_default_tokenizer(ranker, trainer.renderer.tokenizer)
        self.trainer = trainer
        self.eval_steps = eval_steps
        self.patience = patience
        self.min_delta = min_delta
        self.confidence_level = confidence_level
        self.seed = seed
        self.folder = Path(trainer.args.output_dir, self.name)
        self._own_ranker = ranker is not getattr(trainer, "ranker", None)
        self.ranker = with_cache(ranker, self.folder, trainer.args.process_index) if self._own_ranker else ranker
        self._budget = getattr(ranker, "budget", None)
        self._message: str | None = None

    def evaluate(self) -> dict[str, float]:
        """Return the metrics. Every process calls this, and must return the same."""
        raise NotImplementedError

    def rank(self, requests: Sequence[RankingRequest]) -> list[Outcome]:
        """Divide requests among the processes, and return the outcomes of all of them, in their order.

        Every process must call this with the same requests.

        Raises:
            RankerError: If the ranker raises it on any process.
        """
        args = self.trainer.args
        own = requests[args.process_index :: args.world_size]
        outcomes: list[Outcome] = []
        error: Exception | None = None
        try:
            outcomes = in_request_order(stream_outcomes(self.ranker, own))
            if len(outcomes) != len(own):
                raise RankerError(f"The ranker was given {len(own)} requests and returned {len(outcomes)} answers.")
        except Exception as raised:  # on all processes, which would otherwise wait for this one
            outcomes, error = [], raised
        size = -(-len(requests) // args.world_size)
        answers = [[outcome] for outcome in outcomes] + [[] for _ in range(size - len(outcomes))]
        gathered, ranker_error = exchange(answers, error, self._budget)
        if ranker_error is not None:
            raise ranker_error
        return gathered

    @property
    def stop_reason(self) -> str | None:
        """Message of the ranker's error, if there is one."""
        return self._message

    # Events of the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the ledger, and make up for an evaluation that the ranker's error has prevented."""
        self._message = None
        others = [callback for callback in self._evaluations if callback is not self]
        if any(other.name == self.name for other in others):
            raise ValueError(f"The trainer has several callbacks that log {self.name}/. Remove all but one of them.")
        if state.global_step == 0:
            self._start_new_run()
        self._continue_ledger()
        if self._is_due(state) and not self._is_done(state):
            self._run(args, state, control)
            if self._message is not None:
                raise self.error(self._message)
        control.should_training_stop |= self._out_of_patience(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate if the step is due, or is the last one."""
        if self._is_due(state) or state.global_step >= state.max_steps or control.should_training_stop:
            self._run(args, state, control)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate the last step if another callback has stopped the run there."""
        if control.should_training_stop and state.global_step > 0 and not self._is_done(state):
            self._run(args, state, control)
        return control

    def _run(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        callbacks = self.trainer.callback_handler.callbacks
        if any(isinstance(each, StopCallback) and each.stop_reason is not None for each in callbacks):
            return  # the run stops: an evaluation would ask the ranker again
        should_log = control.should_log
        try:
            with seeded(args.seed + args.process_index, args.device):
                metrics = self.evaluate()
        except RankerError as error:
            self._message = str(error)
            control.should_save, control.should_evaluate = True, False
            return
        self.trainer.log(metrics)
        control.should_log = should_log  # `log` has reset it, and the Trainer still has to log its own metrics
        if self._out_of_patience(state):
            if state.is_world_process_zero:
                logger.warning(
                    "Training stops at step %d: %s has not risen by more than %g in %d evaluations.",
                    state.global_step,
                    self.target,
                    self.min_delta,
                    self.patience,
                )
            control.should_training_stop = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS  # as at the end of training

    # State

    def _is_due(self, state: TrainerState) -> bool:
        return bool(state.global_step > 0 and state.global_step % self.eval_steps == 0)

    def _is_done(self, state: TrainerState) -> bool:
        return any(log["step"] == state.global_step and f"{self.name}/failed" in log for log in state.log_history)

    def _out_of_patience(self, state: TrainerState) -> bool:
        """Return whether the last `patience` values of the target are no improvement."""
        best, since_best = float("-inf"), 0
        for value in (log[self.target] for log in state.log_history if self.target in log):
            if value > best + self.min_delta:
                best, since_best = value, 0
            else:
                since_best += 1
        return self.patience is not None and since_best >= self.patience

    def _start_new_run(self) -> None:
        """Move the files of an earlier run in the output directory out of the way, except its stored rankings."""
        if self.trainer.args.should_save:
            for folder in (self._ledger_folder, self._completions_folder):
                set_folder_aside(folder)
        self.trainer.accelerator.wait_for_everyone()

    def _continue_ledger(self) -> None:
        """Count what earlier parts of the run have spent, unless the trainer or another callback does so."""
        budgets = [getattr(getattr(self.trainer, "ranker", None), "budget", None)]
        for callback in self._evaluations:
            if callback is self:
                break
            budgets.append(callback._budget)
        if self._budget is not None and self._budget not in budgets:
            args = self.trainer.args
            self._budget.keep_ledger(self._ledger_folder, args.process_index, args.world_size)

    @property
    def _evaluations(self) -> list[PeriodicEvaluation]:
        callbacks = self.trainer.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, PeriodicEvaluation)]

    @property
    def _ledger_folder(self) -> Path:
        return self.folder / "spent"

    @property
    def _completions_folder(self) -> Path:
        return self.folder / "completions"
