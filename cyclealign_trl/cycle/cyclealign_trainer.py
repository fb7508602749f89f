"""`CycleAlignTrainer`: the cycle of sampling, ranking, agreeing and training, inside the Trainer's loop.

The methods follow one optimiser step, which is one interaction, in the order of the paper: sample completions and send
them to the ranker, wait for its rankings and compare them with the policy's order, train, and keep what both agree on
as demonstrations.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .._compat import is_vllm_available
from ..chat.budget import Budget
from ..chat.joint_budget import JointBudget
from ..data.formats import plain_prompt
from ..data.hh_rlhf import DatasetType, is_published
from ..errors import RankerError
from ..models.generation_backend import seeded
from ..offline.ranking_collator import Batch, TokenIds
from ..offline.ranking_config import RankingConfig
from ..offline.ranking_trainer import RankingTargets, RankingTrainer
from ..rankers.base import Ranker, check_ranker, ranker_name, set_default_tokenizer
from ..rankers.cache import with_cache
from ..training.base_trainer import Optimizers
from ..training.checkpoints import set_folder_aside
from ..training.config_checks import check_config_class
from ..training.dataset_checks import check_map_style, column_names, first_rows
from ..training.model_card import TrainedModel, public_name
from ..training.row_checks import PROMPT, RowCheck
from ..types import Corrector, RankingFailure, RankingRequest, prompt_key
from .completion_tables import print_completions, track_completions
from .cyclealign_config import CycleAlignConfig, check_corrector, make_pool
from .demonstrations import DemonstrationPool
from .guards import BudgetGuard, FailureGuard, RankerErrorGuard
from .interaction import InteractionResult, add_correction
from .interaction_log import InteractionLog
from .interaction_sampler import InteractionSampler
from .interaction_totals import RunningTotals
from .pending_rankings import PendingRankings
from .publishing import describe_run, push_log, run_settings, save_demonstrations
from .rollout import PromptBatch, PromptCollator, Rollout, make_backend
from .rollout_queue import RolloutQueue
from .step_exchange import exchange
from .step_metrics import InteractionRecord, counts, means
from .targets import TargetBuilder

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


class CycleAlignTrainer(RankingTrainer):
    """Align a policy with a black-box ranker by CycleAlign (arXiv 2310.16271).

    Every optimiser step is one interaction. The policy samples K completions per prompt. The ranker, shown
    demonstrations, orders them and can offer a better one. The policy orders them by its own probabilities. What both
    agree on becomes a demonstration, and the policy trains on the ranker's order. Each prompt has `num_interactions`
    interactions in a row.

    Args:
        model: A causal language model, or its name on the Hub or on disk.
        ranker: The black box: an `LLMRanker`, a `FunctionRanker`, or any object with their `rank` method.
        args: The arguments.
        demonstrations: Pool of demonstrations. Defaults to the one that `args` describes.
        train_dataset: Rows of `prompt` (text or messages) and other columns, which the ranker gets as metadata.
        eval_dataset: Data set of the same format, or a mapping of several. An evaluation runs one interaction with a
            frozen pool.
        processing_class: The policy's tokenizer. Defaults to the one of the model's name.
        peft_config: Trains an adapter instead of all weights.
        callbacks: Further callbacks.
        optimizers: Custom optimiser and schedule.
        corrector: Corrects the best completion for the SFT target if the ranker offers no improved completion: an
            `Aligner`, or any object with its `correct` method. Requires `sft_target="corrector"`.

    Raises:
        ValueError: If a data set is a stream or lacks `prompt`, the training set is smaller than one optimiser step,
            or `demonstrations` or `corrector` contradicts `args`; and if `RankingTrainer` raises it.
        TypeError: If `ranker` has no `rank` method, or `corrector` no `correct` method; and if `RankingTrainer` raises
            it.
    """

    args: CycleAlignConfig
    _config_class = CycleAlignConfig
    _method_name = "CycleAlign"
    eval_dataset: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        ranker: Ranker,
        args: CycleAlignConfig | None = None,
        demonstrations: DemonstrationPool | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
        corrector: Corrector | None = None,
    ) -> None:
        if args is None:
            args = self._default_args(model)
        check_config_class(self, args, self._config_class)
        check_corrector(args, corrector)
        check_ranker(ranker)
        if args.log_completions and importlib.util.find_spec("rich") is None:
            raise ValueError("log_completions=True needs rich: pip install 'cyclealign-trl[report]'.")
        if args.generation_backend == "vllm" and not is_vllm_available():
            raise ValueError("generation_backend='vllm' needs vLLM: pip install 'cyclealign-trl[vllm]'.")
        self.demonstrations = make_pool(args, demonstrations)
        super().__init__(
            model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if train_dataset is not None:
            self._get_train_sampler()  # raises if one step takes more prompts than there are
        self.eval_dataset = first_rows(self.eval_dataset, args.max_eval_samples)
        self.ranker = with_cache(ranker, Path(args.output_dir), args.process_index) if args.cache_rankings else ranker
        set_default_tokenizer(ranker, self.renderer.tokenizer)
        self.corrector = corrector
        self.generation = make_backend(args, self.model, self.accelerator, self.renderer)
        if isinstance(self.generation, TrainerCallback):  # it follows the optimiser steps
            self.add_callback(self.generation)
        self.interaction_log = InteractionLog(args.output_dir, args.process_index)
        self._totals = RunningTotals(self.interaction_log, args.min_agreement)  # of all processes, on the main one
        self._target_builder = TargetBuilder(args, self.renderer)

        self._queue = RolloutQueue(args, self.renderer, self.demonstrations, self._generate, self._rank)
        self._records: list[list[InteractionRecord]] = []  # of the current step
        self._ranking_error: Exception | None = None  # raised when the processes meet
        self._last_records: list[InteractionRecord] = []
        self._ranker_error_guard = RankerErrorGuard()
        self._failure_guard = FailureGuard(args.max_ranking_failures)
        self._budget_guard = BudgetGuard(args.at_budget_cap)
        self.add_callback(self._ranker_error_guard)
        self.add_callback(self._failure_guard)
        self.add_callback(self._budget_guard)

    # Data

    def _check_dataset(self, name: str, dataset: Dataset, args: RankingConfig) -> None:
        check_map_style(name, dataset)
        columns = column_names(dataset)
        if "prompt" not in columns and not is_published(dataset):
            raise ValueError(f"{name} needs a column 'prompt'; it has {sorted(columns)}.")

    def _read_dataset(self, name: str, dataset: Any, dataset_type: DatasetType = "prompt-only") -> Any:
        return super()._read_dataset(name, dataset, dataset_type)

    def _row_check(self, dataset: Any, collator: Callable[[Any], Batch]) -> RowCheck:
        return RowCheck(
            {"prompt": PROMPT},
            read=lambda row: plain_prompt(row["prompt"]),
            collate=collator,
            collate_longest=self.renderer.max_prompt_length is None,
        )

    def _make_collator(self) -> Callable[[Any], Batch]:
        return PromptCollator(self.renderer)

    @property
    def _num_completions(self) -> int:
        return self.args.num_generations

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> InteractionSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        return InteractionSampler(
            num_prompts=len(dataset),
            window=self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            num_interactions=args.num_interactions,
            seed=args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetch the micro-batches of the next optimiser step, and with look-ahead those of the one after it."""
        # Sampling starts later: when a run is resumed, the random state is loaded after this call.
        fetch = super().get_batch_samples
        batches, num_items = self._queue.next_batches, None
        if not batches:
            batches, num_items = fetch(epoch_iterator, num_batches, device)
        next_batches: list[Any] = []
        if self.args.ranking_lookahead and self.state.global_step + 1 < self.state.max_steps:
            next_batches, _ = fetch(epoch_iterator, num_batches, device)  # none in the last step of an epoch
        self._queue.begin_step(batches, next_batches)
        self._records.clear()
        self._ranking_error = None
        return batches, num_items

    # 1. Sample completions, and send them to the ranker

    def _prepare_inputs(self, inputs: PromptBatch) -> Rollout:
        if self.model.training:
            return self._queue.pop(ends_window=(self.state.global_step + 1) % self.args.num_interactions == 0)
        (rollout,) = self._queue.roll_out([inputs])
        return rollout

    def _generate(self, prompt_ids: list[TokenIds]) -> list[list[TokenIds]]:
        with self._metrics.timer("generate"):
            return self.generation.generate(self.model_wrapped, prompt_ids)

    def _rank(self, requests: Sequence[RankingRequest]) -> PendingRankings:
        return PendingRankings(self.ranker, requests)

    # 2. Compare the rankings with the policy's own order (called by `compute_loss` after the forward pass)

    def _targets(self, batch: Rollout, sums: Tensor, lengths: Tensor) -> RankingTargets:
        with self._metrics.timer("forward"):  # on a device, reading the scores waits for the forward pass
            by_mean = self.args.policy_score == "mean_logprob"
            scores = (sums / lengths.clamp(min=1) if by_mean else sums).detach().tolist()
        results = self._resolve(batch, scores)
        sft_targets = [
            self._target_builder.sft_target(result, ids)
            for result, ids in zip(results, batch.completion_ids, strict=True)
        ]
        self._record(batch, results, sft_targets)
        return self._target_builder.build(results, [ids for ids, _ in sft_targets], sums)

    def _resolve(self, rollout: Rollout, scores: list[list[float]]) -> list[InteractionResult]:
        """Wait for the ranker, compare its orders with the policy's, and correct completions where asked to."""
        min_agreement = self.args.min_agreement
        try:
            with self._metrics.timer("rank_wait"):
                outcomes = rollout.wait(self._queue.deadline)
            details = [outcome.detail for outcome in outcomes if isinstance(outcome, RankingFailure)]
            self._failure_guard.last_detail = next(filter(None, reversed(details)), self._failure_guard.last_detail)
            return self._correct(rollout.resolve(outcomes, scores, min_agreement))
        except Exception as error:
            # Raised here, it would leave the other processes waiting for this one in the backward pass.
            self._ranking_error = self._ranking_error or error
            return rollout.resolve(rollout.fail(type(error).__name__), scores, min_agreement)

    def _correct(self, results: list[InteractionResult]) -> list[InteractionResult]:
        """Correct the best completion of each prompt for which the ranker offers no improved one."""
        if self.corrector is None:
            return results
        # Not in the ranker's thread: a corrector samples with the random state of this one.
        with self._metrics.timer("correct"):
            indices = [
                index
                for index, result in enumerate(results)
                if result.improved_completion is None
                and (result.agreement is not None or self._target_builder.trains_sft_alone(result))
            ]
            if not indices:
                return results
            corrections = self.corrector.correct(
                [results[index].prompt for index in indices], [results[index].best_completion for index in indices]
            )
        corrected = list(results)
        for index, correction in zip(indices, corrections, strict=True):
            corrected[index] = add_correction(results[index], correction)
        return corrected

    def _record(
        self, rollout: Rollout, results: list[InteractionResult], sft_targets: list[tuple[TokenIds | None, bool]]
    ) -> None:
        """Keep the results until the step ends, or log them if this is an evaluation."""
        records = [
            InteractionRecord(
                result,
                lengths=tuple(len(ids) for ids in completions),
                num_clipped=sum(ids[-1] not in self.renderer.eos_token_ids for ids in completions),
                prompt_truncated=prompt_truncated,
                improved_truncated=truncated,
                trains=self._target_builder.trains(result, sft_ids),
            )
            for result, completions, prompt_truncated, (sft_ids, truncated) in zip(
                results, rollout.completion_ids, rollout.prompt_truncated, sft_targets, strict=True
            )
        ]
        if self.model.training:
            self._records.append(records)
        else:
            self._log_records(self._gather([records]))

    # 3. Train, and keep what policy and ranker agree on

    def training_step(self, model: nn.Module, inputs: PromptBatch, num_items_in_batch: Any = None) -> Tensor:
        """Run the forward and backward pass of one micro-batch, and close the interaction after the last one."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._close_interaction()
        return loss

    def _close_interaction(self) -> None:
        """Log the step's interactions, and add its demonstrations to the pool.

        This happens before the optimiser steps, so that a crash cannot lose the log of a step that was taken.
        """
        records, ranker_error = self._exchange(self._records)
        if ranker_error is not None and self.state.global_step == 0:
            raise ranker_error  # there is nothing to save
        self._ranker_error_guard.observe(ranker_error)
        position = self.state.global_step % self.args.num_interactions
        own_results = [record.result for record in chain.from_iterable(self._records)]
        self.interaction_log.write(self.state.global_step, position, own_results)
        if self.is_world_process_zero():
            self._totals.observe(self.state.global_step, [record.result for record in records])

        failures = [record.result.failure for record in records]
        self._budget_guard.observe(failures, str(self._budget or "by its own account"))
        self._failure_guard.observe(record.result.failure for record in records if record.asked)
        observed = own_results if self.demonstrations.scope == "prompt" else [record.result for record in records]
        self.demonstrations.observe(result.demonstration for result in observed if result.demonstration is not None)
        if self.args.stop_on_agreement:
            self._queue.agreed.update(prompt_key(result.prompt) for result in own_results if result.fully_agreed)
        if position == self.args.num_interactions - 1:
            self.demonstrations.forget(result.prompt for result in own_results)
            self._queue.agreed.clear()
        self._log_records(records)
        if not any(record.trains for record in records):
            self._drop_gradients()

    def _drop_gradients(self) -> None:
        """Make the optimiser step leave the weights unchanged: with zero gradients, momentum would still move them.

        DeepSpeed keeps gradients of its own, and the scaler of fp16 needs some, so their steps are taken.
        """
        if not self.is_deepspeed_enabled and self.accelerator.scaler is None:
            self.model.zero_grad(set_to_none=True)

    def _gather(self, micro_batches: list[list[InteractionRecord]]) -> list[InteractionRecord]:
        records, ranker_error = self._exchange(micro_batches)
        if ranker_error is not None:
            raise ranker_error
        return records

    def _exchange(
        self, micro_batches: list[list[InteractionRecord]]
    ) -> tuple[list[InteractionRecord], RankerError | None]:
        error, self._ranking_error = self._ranking_error, None
        return exchange(micro_batches, error, self._budget)

    # Evaluation and metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with a random state of its own, so that evaluations compare and do not change the training."""
        try:
            with seeded(self.args.seed + self.args.process_index, self.accelerator.device):
                metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        except RankerError as error:
            if not self.is_in_train or self.state.global_step == 0:
                raise
            self._save_checkpoint(self.model, trial=None)
            raise RankerErrorGuard.resumable(str(error), self.args, self.state) from None
        return metrics

    def _log_records(self, records: list[InteractionRecord]) -> None:
        ordered = sum(record.result.agreement is not None for record in records)
        ranked = sum(record.result.ranks is not None for record in records)
        in_passes = sum(record.result.consistency is not None for record in records)
        weights = {"agreement": ordered, "improved": ranked, "ranker": in_passes}
        for name, value in means(records).items():
            self._metrics.add_mean(name, value, weight=weights.get(name.partition("/")[0], len(records)))
        for name, count in counts(records).items():
            self._metrics.add_count(name, count)
        self._metrics.add_local({"pool/size": len(self.demonstrations)})
        self._last_records = records

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the metrics since the last log, and a table of completions if `log_completions` is set."""
        super().log(logs, start_time)
        if self.args.log_completions and "loss" in logs and self.is_world_process_zero():
            step = self.state.global_step
            print_completions(self._last_records, step)
            track_completions(self._last_records, step, self.args.report_to, self.callback_handler.callbacks)

    # Checkpoints

    def _resume_settings(self) -> dict[str, Any]:
        return {**super()._resume_settings(), "num_interactions": self.args.num_interactions}

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "demonstrations": self.demonstrations.state_dict(),
            "agreed": sorted(self._queue.agreed),
            "totals": self._totals.state_dict(),
        }
        if ahead := self._queue.state():
            state["ahead"] = ahead
        return state

    def _load_state(self, state: dict[str, Any]) -> None:
        self.demonstrations.load_state_dict(state["demonstrations"])
        self._queue.agreed = set(state["agreed"])
        self._totals.load_state_dict(state.get("totals"))
        self._queue.restart(state.get("ahead", []))
        self._continue_ledger()

    def _run_record(self) -> dict[str, Any]:
        pool = self.demonstrations
        return {
            **super()._run_record(),
            "ranker": public_name(ranker_name(self.ranker)),
            # A subclass can select otherwise, and the report replays this class.
            "demonstrations": pool.settings() if type(pool) is DemonstrationPool else None,
        }

    def _start_new_run(self) -> None:
        self._queue.agreed.clear()
        self._queue.restart([])
        self._totals.start()
        if self.args.should_save:
            for folder in (self.interaction_log.folder, self._ledger_folder):
                set_folder_aside(folder)
        self.accelerator.wait_for_everyone()
        self._continue_ledger()

    # Budget of the ranker

    @property
    def _budget(self) -> Budget | JointBudget | None:
        return getattr(self.ranker, "budget", None)

    @property
    def _ledger_folder(self) -> Path:
        return Path(self.args.output_dir, "spent")

    def _continue_ledger(self) -> None:
        """Count what earlier parts of the run have spent. A checkpoint does not know what was spent after it."""
        if self._budget is not None:
            self._budget.keep_ledger(self._ledger_folder, self.args.process_index, self.args.world_size)
        self._gather([])

    # Publishing

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card, and the demonstrations of a run next to it; see `RankingTrainer.create_model_card`."""
        if self.is_world_process_zero():
            save_demonstrations(self.demonstrations, Path(self.args.output_dir))
        super().create_model_card(*args, **kwargs)

    def push_interactions_to_hub(
        self, repo_id: str | None = None, private: bool | None = None, token: str | None = None
    ) -> str:
        """Publish the log of interactions as a data set with a card. Call it on all processes.

        Args:
            repo_id: Repository to publish to. Defaults to the model's repository with the suffix `-interactions`.
            private: Whether a new repository is private. Defaults to `hub_private_repo`.
            token: Token with write access. Defaults to `hub_token`, or to the one that is logged in.

        Returns:
            URL of the data set.

        Raises:
            FileNotFoundError: If the run has no log.
            RuntimeError: On the other processes, if publishing failed on the main one, which raises its own error.
        """
        return push_log(
            self.interaction_log,
            repo_id or f"{self._repo_id}-interactions",
            run_settings(self.args, self.demonstrations, self.ranker),
            private=self.args.hub_private_repo if private is None else private,
            token=self.args.hub_token if token is None else token,
            is_main_process=self.is_world_process_zero(),
        )

    def _describe(self, model: TrainedModel) -> TrainedModel:
        model = super()._describe(model)
        return describe_run(model, self.args, self.demonstrations, self.ranker, self._totals.current())
