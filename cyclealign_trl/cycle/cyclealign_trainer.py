"""`CycleAlignTrainer`: the cycle of sampling, ranking, agreeing and training inside the Trainer's own loop."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .._compat import is_vllm_available
from .._warnings import OnceLogger
from ..chat.budget import BUDGET_EXHAUSTED, Amount, Budget
from ..errors import RankerError
from ..models.generation_backend import seeded
from ..models.loading import short_model_name
from ..offline.ranking_config import RankingConfig
from ..offline.ranking_trainer import RankingTargets
from ..rankers.base import Outcome, Ranker
from ..rankers.cache import CachedRanker
from ..training.base_trainer import Optimizers
from ..training.checkpoints import set_folder_aside
from ..training.dataset_checks import column_names
from ..types import ABSENT, Corrector, RankingFailure, prompt_key
from .cyclealign_config import CycleAlignConfig, make_pool
from .demonstrations import DemonstrationPool
from .guards import BudgetGuard, FailureGuard
from .interaction import Settlement, correct, open_interaction, settle
from .interaction_log import InteractionLog
from .interaction_sampler import InteractionSampler
from .published_cycle import PublishedCycle
from .rollout import PendingRanking, PromptCollator, make_backend
from .step_metrics import InteractionRecord, counts, means, print_completions

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


class CycleAlignTrainer(PublishedCycle):
    """Aligns a policy with a black-box ranker by CycleAlign (arXiv 2310.16271).

    Every optimiser step is one interaction: the policy samples K completions per prompt; the ranker, shown
    demonstrations, orders them and may offer a better one; the policy orders them by its own probabilities; what both
    agree on becomes a demonstration; the policy trains on the ranker's order. Each prompt has `num_interactions` of
    these in a row.

    Args:
        model: A causal language model, or its name on the Hub or on disk.
        ranker: The black box: an `LLMRanker`, a `FunctionRanker`, or anything with their `rank` method.
        args: The arguments.
        demonstrations: The pool of demonstrations; by default the one that `args` describes.
        train_dataset: Rows of `prompt` (text or messages) and whatever else the ranker should know about each.
        eval_dataset: Likewise, or a mapping of several. An evaluation runs one interaction with a frozen pool.
        processing_class: The policy's tokenizer; by default the one of the model's name.
        peft_config: Trains an adapter instead of all weights.
        callbacks: Further callbacks.
        optimizers: An optimiser and a schedule of your own.
        corrector: Writes the SFT target where the ranker offers no improved completion, by correcting the best
            completion: an `Aligner`, or anything with its `correct` method. Goes with `sft_target="corrector"`.

    Raises:
        ValueError: If a dataset is a stream or lacks `prompt`, the training set is smaller than one optimiser step, or
            `demonstrations` or `corrector` contradicts `args`; and as `RankingTrainer` does.
        TypeError: If `ranker` has no `rank` method, or `corrector` no `correct` method.
    """

    args: CycleAlignConfig

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
        _check_corrector(corrector, args)
        if not isinstance(ranker, Ranker):
            raise TypeError(f"ranker must have a method rank(requests); {type(ranker).__name__} has none.")
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
        self.eval_dataset = _limit(eval_dataset, args.max_eval_samples)
        self.ranker = _cached(ranker, args)
        self.corrector = corrector
        self.generation = make_backend(args, self.model, self.accelerator, self.renderer)
        if isinstance(self.generation, TrainerCallback):  # it asks to be told of every step
            self.add_callback(self.generation)
        self.interaction_log = InteractionLog(args.output_dir, args.process_index)

        # The step under way: micro-batches waiting for completions, those that have them, and what became of each.
        self._waiting: list[dict[str, Any]] = []
        self._rollouts: deque[dict[str, Any]] = deque()
        self._records: list[list[InteractionRecord]] = []
        self._deadline = 0.0  # for its rankings, on the clock `time.monotonic`
        self._ranking_error: Exception | None = None  # raised where the processes meet
        # The window under way: prompts that need no further interaction (`stop_on_agreement`).
        self._agreed: set[str] = set()
        self._last_records: list[InteractionRecord] = []
        self._once = OnceLogger(logger)
        self._failure_guard = FailureGuard(args.max_ranking_failures)
        self._budget_guard = BudgetGuard(args.at_budget_cap)
        self.add_callback(self._failure_guard)
        self.add_callback(self._budget_guard)

    # What RankingTrainer leaves open

    @staticmethod
    def _default_args(model: str | PreTrainedModel) -> CycleAlignConfig:
        return CycleAlignConfig(f"{short_model_name(model)}-CycleAlign")

    def _check_dataset(self, name: str, dataset: Dataset, args: RankingConfig) -> None:
        if isinstance(dataset, (IterableDataset, torch.utils.data.IterableDataset)):
            raise ValueError(
                f"{name} is a stream, but the cycle repeats windows of prompts, which takes a dataset with a length. "
                "Load it without streaming=True, or take a part: Dataset.from_list(list(stream.take(1000)))."
            )
        columns = column_names(dataset)
        if "prompt" not in columns:
            raise ValueError(f"{name} needs a column 'prompt'; it has {sorted(columns)}.")

    def _make_collator(self) -> Callable[[Any], Any]:
        return PromptCollator(self.renderer)

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

    # The step: generate and ask for all micro-batches, then train on one after the other

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetches the micro-batches of the next optimiser step."""
        # No sampling here: on resume, the random state is loaded after this call.
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waiting = list(batches)
        self._rollouts.clear()
        self._records.clear()
        self._ranking_error = None
        return batches, num_items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # In training, the first micro-batch of the step starts all of them, so that accumulation changes nothing.
        waiting = self._waiting if self.model.training else [inputs]
        if waiting:
            self._rollouts.extend(self._roll_out(batch) for batch in waiting)
            self._deadline = time.monotonic() + self.args.ranking_timeout
            self._waiting = []
        return self._rollouts.popleft()

    def _roll_out(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds completions to a batch of prompts and sends them to the ranker, without waiting for it."""
        with self._timer("generate"):
            completion_ids = self.generation.generate(self.model_wrapped, batch["prompt_ids"])
        decode = self.renderer.tokenizer.batch_decode
        interactions = [
            open_interaction(
                prompt,
                decode(ids, skip_special_tokens=True),
                self.demonstrations.select(prompt),
                metadata,
                already_agreed=prompt_key(prompt) in self._agreed,
                num_static=len(self.demonstrations.static),
            )
            for prompt, metadata, ids in zip(batch["prompt"], batch["metadata"], completion_ids, strict=True)
        ]
        requests = [interaction.request for interaction in interactions if interaction.request is not None]
        return {
            **batch,
            "completion_ids": completion_ids,
            "interactions": interactions,
            "ranking": PendingRanking(self.ranker, requests),
        }

    def _targets(self, inputs: dict[str, Any], sums: Tensor, lengths: Tensor) -> RankingTargets:
        """Waits for the ranker, compares, and turns its order into what the batch trains on."""
        with self._timer("forward"):  # reading the scores waits for the forward pass on a device
            scores = (sums / lengths if self.args.policy_score == "mean_logprob" else sums).detach().tolist()
        try:
            with self._timer("rank_wait"):
                answers = inputs["ranking"].outcomes(self._deadline)
            settlements = self._correct(self._settle(inputs, answers, scores))
        except Exception as error:
            # Raised here, it would leave the other processes waiting for this one in the backward pass.
            self._ranking_error = self._ranking_error or error
            settlements = self._settle(inputs, repeat(RankingFailure(type(error).__name__)), scores)
        num_generations = sums.shape[1]
        ranks = [settlement.ranks or (ABSENT,) * num_generations for settlement in settlements]

        improved: list[tuple[list[int], bool]] = [
            self._sft_target(settlement, completions)
            for settlement, completions in zip(settlements, inputs["completion_ids"], strict=True)
        ]
        records = [
            InteractionRecord(
                settlement,
                lengths=tuple(len(ids) for ids in completions),
                num_clipped=sum(ids[-1] not in self.renderer.eos_token_ids for ids in completions),
                prompt_cut=prompt_cut,
                improved_cut=improved_cut,
            )
            for settlement, completions, prompt_cut, (_, improved_cut) in zip(
                settlements, inputs["completion_ids"], inputs["prompt_cut"], improved, strict=True
            )
        ]
        if self.model.training:
            self._records.append(records)
        else:
            self._log_records(self._gather([records]))
        has_targets = self.args.sft_target != "top_ranked" or self.args.at_budget_cap == "sft"
        return RankingTargets(
            torch.tensor(ranks, device=sums.device),
            sft_ids=[ids for ids, _ in improved] if has_targets else None,
            rank_sft_ids=self.args.rank_improved_completion,
            weights=self._weights(settlements, sums.device),
        )

    def _correct(self, settlements: list[Settlement]) -> list[Settlement]:
        """Has the best completions corrected where the ranker offers no improved one."""
        if self.corrector is None:
            return settlements
        # Here and not in the ranker's thread: what it samples draws on the random state of this one.
        with self._timer("correct"):
            bare = [
                index
                for index, settlement in enumerate(settlements)
                if (settlement.ranks is not None or self._trains_sft_alone(settlement))
                and settlement.improved_completion is None
            ]
            if not bare:
                return settlements
            corrections = self.corrector.correct(
                [settlements[index].prompt for index in bare],
                [settlements[index].best_completion for index in bare],
            )
        corrected = list(settlements)
        for index, correction in zip(bare, corrections, strict=True):
            corrected[index] = correct(settlements[index], correction)
        return corrected

    def _sft_target(self, settlement: Settlement, completion_ids: list[list[int]]) -> tuple[list[int], bool]:
        """Token ids to imitate, none where that is the top-ranked completion, and whether they had to be cut."""
        alone = self._trains_sft_alone(settlement)
        # One that is to rank above all others, and is one of them, would compete with itself.
        competes = self.args.rank_improved_completion and settlement.improved_completion in settlement.completions
        if (
            settlement.improved_completion is not None
            and self.args.sft_target != "top_ranked"
            and (alone or not competes)
        ):
            return self.renderer.completion(settlement.prompt, settlement.improved_completion)
        return (completion_ids[settlement.white_box_order[0]] if alone else []), False

    def _trains_sft_alone(self, settlement: Settlement) -> bool:
        """Whether there is no ranking because there is no money left for it, and the run goes on without."""
        return self.args.at_budget_cap == "sft" and settlement.failure == BUDGET_EXHAUSTED

    def _weights(self, settlements: Sequence[Settlement], device: torch.device) -> Tensor | None:
        """What each prompt's loss weighs `(B,)`, where the ranker's passes are to say so; 1 where there was one."""
        if not self.args.weight_by_consistency:
            return None
        if any(s.ranks and s.consistency is None for s in settlements):
            self._once.warning(
                "single_pass",
                "weight_by_consistency=True has no effect on rankings of a single pass, which weigh 1: ask for "
                "several, as LLMRanker(num_passes=3) does.",
            )
        weights = [1.0 if s.consistency is None else max(0.0, s.consistency) for s in settlements]
        return torch.tensor(weights, device=device)

    def _settle(
        self, inputs: dict[str, Any], answers: Iterable[Outcome], scores: list[list[float]]
    ) -> list[Settlement]:
        answers = iter(answers)
        return [
            settle(
                interaction,
                None if interaction.request is None else next(answers),
                row_scores,
                self.args.min_agreement,
            )
            for interaction, row_scores in zip(inputs["interactions"], scores, strict=True)
        ]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, forward and backward; after the step's last one, the interaction is closed."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._close_interaction()
        return loss

    def _close_interaction(self) -> None:
        """Logs the step and lets the pool learn from it. Before the optimiser steps, so that no crash can lose it."""
        records = self._gather(self._records)
        position = self.state.global_step % self.args.num_interactions
        local = [record.settlement for record in chain.from_iterable(self._records)]
        self.interaction_log.write(self.state.global_step, position, local)

        failures = [record.settlement.failure for record in records]
        self._budget_guard.observe(failures, str(self._budget or "it says so"))
        self._failure_guard.observe(record.settlement.failure for record in records if record.asked)
        learned = local if self.demonstrations.scope == "prompt" else [record.settlement for record in records]
        self.demonstrations.observe(
            settlement.demonstration for settlement in learned if settlement.demonstration is not None
        )
        if self.args.stop_on_agreement:
            self._agreed.update(prompt_key(settlement.prompt) for settlement in local if settlement.fully_agreed)
        if position == self.args.num_interactions - 1:
            self.demonstrations.forget(settlement.prompt for settlement in local)
            self._agreed.clear()
        self._log_records(records)

    def _gather(self, micro_batches: list[list[InteractionRecord]]) -> list[InteractionRecord]:
        """The records of all processes, in the order of the sampler; raises on all if the ranker did so on one.

        What is left of the ranker's budget is shared out anew.
        """
        error, self._ranking_error = self._ranking_error, None
        said = None if error is None else f"{type(error).__name__}: {error}"
        committed = None if self._budget is None else self._budget.committed
        gathered: list[tuple[str | None, Amount | None, list[list[InteractionRecord]]]]
        gathered = gather_object([(said, committed, micro_batches)])
        if error is not None:
            raise error
        for process_index, (said, *_) in enumerate(gathered):
            if said is not None:
                raise RankerError(f"The ranker failed on process {process_index}. {said}")
        if self._budget is not None:
            self._budget.share_out([amount for _, amount, _ in gathered if amount is not None])
        per_process = [theirs for *_, theirs in gathered]
        return [record for same_time in zip(*per_process, strict=True) for record in chain.from_iterable(same_time)]

    # Evaluation and metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates with a random state of its own: samples compare over time, and training goes on as without."""
        with seeded(self.args.seed + self.args.process_index, self.accelerator.device):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _log_records(self, records: list[InteractionRecord]) -> None:
        ranked = sum(record.settlement.agreement is not None for record in records)
        in_passes = sum(record.settlement.consistency is not None for record in records)
        weights = {"agreement": ranked, "improved": ranked, "ranker": in_passes}
        for name, value in means(records).items():
            self._log_metric(name, value, weight=weights.get(name.partition("/")[0], len(records)))
        for name, count in counts(records).items():
            self._log_count(name, count)
        self._log_local({"pool/size": len(self.demonstrations)})
        self._last_records = records

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log, and prints the completions that were logged, if asked to."""
        super().log(logs, start_time)
        if self.args.log_completions and "loss" in logs and self.is_world_process_zero():
            print_completions(self._last_records, self.state.global_step)

    # Checkpoints

    def _fixed_settings(self) -> dict[str, Any]:
        return {**super()._fixed_settings(), "num_interactions": self.args.num_interactions}

    def _kept_state(self) -> dict[str, Any]:
        return {"demonstrations": self.demonstrations.state_dict(), "agreed": sorted(self._agreed)}

    def _restore(self, state: dict[str, Any]) -> None:
        self.demonstrations.load_state_dict(state["demonstrations"])
        self._agreed = set(state["agreed"])
        self._keep_ledger()

    def _start_afresh(self) -> None:
        self._agreed.clear()
        if self.is_world_process_zero():
            for folder in (self.interaction_log.folder, self._ledgers):
                set_folder_aside(folder)
        self.accelerator.wait_for_everyone()
        self._keep_ledger()

    # The ranker's budget

    @property
    def _budget(self) -> Budget | None:
        return getattr(self.ranker, "budget", None)

    @property
    def _ledgers(self) -> Path:
        return Path(self.args.output_dir, "spent")

    def _keep_ledger(self) -> None:
        """Counts what earlier parts of the run have spent, which no checkpoint knows in full."""
        if self._budget is not None:
            self._budget.keep_ledger(self._ledgers, self.args.process_index, self.args.world_size)
        self._gather([])


def _check_corrector(corrector: Corrector | None, args: CycleAlignConfig) -> None:
    if corrector is not None and not isinstance(corrector, Corrector):
        raise TypeError(
            f"corrector must have a method correct(prompts, answers); {type(corrector).__name__} has none."
        )
    if (corrector is not None) != (args.sft_target == "corrector"):
        raise ValueError(
            f"A corrector and sft_target='corrector' go together; got corrector={corrector!r} and "
            f"sft_target={args.sft_target!r}."
        )


def _cached(ranker: Ranker, args: CycleAlignConfig) -> Ranker:
    """The ranker behind this process's database, and in view of those that other processes or runs left beside it."""
    if not args.cache_rankings or isinstance(ranker, CachedRanker) or getattr(ranker, "fingerprint", None) is None:
        return ranker
    folder = Path(args.output_dir)
    own = folder / f"rankings-{args.process_index}.sqlite"
    folder.mkdir(parents=True, exist_ok=True)
    return CachedRanker(ranker, own, also_read=sorted(set(folder.glob("rankings-*.sqlite")) - {own}))


def _limit(dataset: Any, max_samples: int | None) -> Any:
    if max_samples is None or dataset is None:
        return dataset
    if isinstance(dataset, Mapping):
        return {name: _limit(part, max_samples) for name, part in dataset.items()}
    return dataset.select(range(min(max_samples, len(dataset))))
