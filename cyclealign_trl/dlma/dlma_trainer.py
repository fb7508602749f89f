"""`DLMATrainer`: DPO with the model's own opinion of each pair as its margin."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import DistributedType, is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .._compat import disable_dropout_in_model, prepare_deepspeed, prepare_fsdp
from ..models.loading import digest_weights, load_policy
from ..models.logps import Scoring, add_scoring, sequence_logps
from ..models.renderer import Renderer
from ..offline.ranking_collator import Batch, RankedBatch, RankingCollator
from ..offline.ranking_config import RankingConfig
from ..offline.ranking_trainer import RankingTargets, RankingTrainer
from ..training.base_trainer import Optimizers
from ..training.dataset_checks import column_names
from ..training.model_card import Paper, TrainedModel
from ..training.row_checks import NUMBER, RowCheck
from .dlma_config import DLMAConfig
from .dlma_loss import dlma_loss

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

PAPER = Paper(
    "DLMA",
    "Direct Large Language Model Alignment Through Self-Rewarding Contrastive Prompt Distillation",
    "Liu, Aiwei and Bai, Haoping and Lu, Zhiyun and Kong, Xiang and Wang, Simon and Shan, Jiulong and Cao, Meng and "
    "Wen, Lijie",
    2024,
    "2402.11907",
)
_REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class PairBatch(RankedBatch):
    """B pairs of completions, the chosen one first.

    Args:
        self_rewards: Self-reward of each pair in nats, `(B,)`. `None` without that column.
        ref_logps: Precomputed log-probabilities of the reference, `(B, 2)`. `None` without those columns.
    """

    self_rewards: list[float] | None
    ref_logps: list[list[float]] | None


@dataclass(frozen=True)
class PairCollator:
    """Collate preference pairs, with their self-rewards if they have them, into a `PairBatch`."""

    renderer: Renderer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PairBatch:
        """Tokenise the pairs.

        Raises:
            ValueError: If a row cannot be read, or a self-reward is not a finite number.
        """
        self_rewards = [row["self_reward"] for row in rows] if "self_reward" in rows[0] else None
        for value in self_rewards or ():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"Self-rewards must be finite numbers, got {value}.")
        ref_logps = None
        if set(_REF_COLUMNS) <= rows[0].keys():
            ref_logps = [[row[name] for name in _REF_COLUMNS] for row in rows]
        return PairBatch(**vars(RankingCollator(self.renderer)(rows)), self_rewards=self_rewards, ref_logps=ref_logps)


class DLMATrainer(RankingTrainer):
    """Train a policy on contrastive pairs by DLMA (arXiv 2402.11907): DPO with the clipped self-reward as its margin.

    The pairs come from `generate_contrastive_pairs`, or are preference data with `add_self_rewards`. The loss is
    `dlma_loss` with sums over tokens, against a frozen reference.

    Args:
        model: A causal language model, or its name on the Hub or on disk.
        ref_model: The reference. Defaults to the initial policy: with `peft_config`, its weights without the adapter,
            otherwise a second model that is loaded by name, or a copy.
        args: The arguments.
        train_dataset: TRL's preference data (`chosen`, `rejected`, with `prompt` or with the prompt as their common
            beginning; texts or messages) with a column `self_reward`, which `margin_weight=0` does not need.
        eval_dataset: Data set of the same format, or a mapping of several.
        processing_class: The policy's tokenizer. Defaults to the one of the model's name.
        peft_config: Trains an adapter instead of all weights.
        callbacks: Further callbacks.
        optimizers: Custom optimiser and schedule.

    Raises:
        ValueError: If a column is missing, or no reference can be made; and if `RankingTrainer` raises it.
    """

    args: DLMAConfig
    _config_class = DLMAConfig
    _method_name = "DLMA"
    _paper = PAPER
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: DLMAConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
    ) -> None:
        if ref_model is not None and not isinstance(ref_model, nn.Module):
            raise TypeError(
                f"ref_model must be a loaded model, got {type(ref_model).__name__}. Load it with "
                "AutoModelForCausalLM, and pass a config as args=."
            )
        if ref_model is model:
            raise ValueError(
                "model and ref_model are the same object, so the reference would be trained. Leave ref_model out."
            )
        if args is None:
            args = self._default_args(model)
        self.ref_model: nn.Module | None = ref_model
        self._reference_scoring: Scoring | None = None
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
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        if self.ref_model is not None:
            self.ref_model = self._prepare_reference(cast("PreTrainedModel", self.ref_model))
        if args.precompute_ref_log_probs:
            self._precompute_ref_logps()

    # Data

    def _check_dataset(self, name: str, dataset: Dataset, args: RankingConfig) -> None:
        assert isinstance(args, DLMAConfig)
        columns = column_names(dataset)
        if not {"chosen", "rejected"} <= columns:
            raise ValueError(f"{name} needs the columns 'chosen' and 'rejected'; it has {sorted(columns)}.")
        if args.margin_weight and "self_reward" not in columns:
            raise ValueError(
                f"{name} needs a column 'self_reward'. Add it with add_self_rewards(dataset, model), or set "
                "margin_weight=0 for DPO."
            )
        super()._check_dataset(name, dataset, args)

    def _row_check(self, dataset: Any, collator: Callable[[Any], Batch]) -> RowCheck:
        check = super()._row_check(dataset, collator)
        numbers = {name: NUMBER for name in ("self_reward", *_REF_COLUMNS) if name in column_names(dataset)}
        return replace(check, columns={**check.columns, **numbers})

    def _make_collator(self) -> Callable[[Any], Batch]:
        return PairCollator(self.renderer)

    # Reference

    def _receive_policy(
        self,
        given: str | PreTrainedModel,
        model: PreTrainedModel,
        args: RankingConfig,
        peft_config: PeftConfig | None,
    ) -> None:
        assert isinstance(args, DLMAConfig)
        if args.precompute_ref_log_probs and args.distributed_state.distributed_type == DistributedType.FSDP:
            raise ValueError("precompute_ref_log_probs=True does not work with FSDP. Set it to False.")
        is_split = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        # ZeRO-3 cannot score with a model and train it afterwards, so precomputing needs a second model there, too.
        needs_second_model = is_split if args.precompute_ref_log_probs else peft_config is None
        if self.ref_model is None and needs_second_model:
            if is_peft_model(model):
                raise ValueError(
                    "The model already has an adapter, so its weights without it are not the initial policy. Set "
                    "precompute_ref_log_probs=True, or merge the adapter and pass a peft_config."
                )
            if isinstance(given, str):
                self.ref_model = load_policy(given, args)
            elif is_split:
                raise ValueError(
                    "DeepSpeed ZeRO-3 has split the model's weights, so it cannot be copied as the reference. Pass "
                    "the model's name, or a ref_model."
                )
            else:
                self.ref_model = copy.deepcopy(model)
        self._reference_digest = digest_weights(cast("PreTrainedModel", self.ref_model or model))

    def _prepare_reference(self, reference: PreTrainedModel) -> nn.Module:
        """Freeze the reference and move it to its device, split as the policy is."""
        reference.eval().requires_grad_(False)
        add_scoring(reference)
        if not self.is_fsdp_enabled:
            self._reference_scoring = self._choose_scoring(reference, reference)
        prepared: nn.Module
        if self.is_deepspeed_enabled:
            prepared = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            prepared = prepare_fsdp(reference, self.accelerator)
        else:
            prepared = self.accelerator.prepare_model(reference, evaluation_mode=True)
        return prepared

    def _ref_logps(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """Return the reference's summed log-probabilities `(B, 2)` of both completions."""
        if batch.ref_logps is not None:
            return torch.tensor(batch.ref_logps, device=self.accelerator.device)
        if self.args.precompute_ref_log_probs:
            raise ValueError(
                "These pairs have no precomputed log-probabilities of the reference, which is gone: pass them as "
                "eval_dataset to the constructor, or set precompute_ref_log_probs=False."
            )
        with self._metrics.timer("reference"), self._as_reference(model) as reference:
            return self._score_pairs(reference, batch)

    @contextmanager
    def _as_reference(self, model: nn.Module) -> Iterator[nn.Module]:
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                yield model

    @torch.no_grad()
    def _score_pairs(self, reference: nn.Module, batch: PairBatch) -> Tensor:
        if self._reference_scoring is None:  # FSDP, or the policy without its adapter
            self._reference_scoring = self._scoring or self._choose_scoring(reference, self._causal_lm)
        sums, _ = sequence_logps(
            reference,
            [prompt for prompt in batch.prompt_ids for _ in range(2)],
            [ids for pair in batch.completion_ids for ids in pair],
            pad_token_id=self.renderer.tokenizer.pad_token_id,
            device=self.accelerator.device,
            scoring=self._reference_scoring,
        )
        return sums.view(-1, 2)

    def _precompute_ref_logps(self) -> None:
        """Add the reference's log-probabilities to the data sets, and free the reference."""
        reference = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            # DeepSpeed does not move the model that will be trained to its device before training starts.
            reference = prepare_deepspeed(self.model, self.accelerator)
        was_training = self.model.training
        reference.eval()
        if isinstance(self.eval_dataset, Mapping):
            named = self.eval_dataset.items()
            self.eval_dataset = {name: self._with_ref_logps(reference, dataset) for name, dataset in named}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_ref_logps(reference, self.eval_dataset)
        if self.train_dataset is not None:
            self.train_dataset = self._with_ref_logps(reference, self.train_dataset)
        self.model.train(was_training)
        self.ref_model = None

    def _with_ref_logps(self, reference: nn.Module, dataset: Dataset) -> Dataset:
        loader = self.accelerator.prepare(
            DataLoader(dataset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        )
        batches = []
        for batch in tqdm(loader, "Reference log-probabilities", disable=self.args.disable_tqdm, leave=False):
            with self.accelerator.autocast():
                batches.append(self.accelerator.gather_for_metrics(self._score_pairs(reference, batch)).cpu())
        columns = torch.cat(batches).T.tolist()  # (2, N)
        dataset = dataset.remove_columns([name for name in _REF_COLUMNS if name in dataset.column_names])
        for name, column in zip(_REF_COLUMNS, columns, strict=True):
            dataset = dataset.add_column(name, column)
        return dataset

    # Loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the learning rate schedule, and warn if the run ends before its warm-up does."""
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        if warmup_steps >= num_training_steps and self.is_world_process_zero():
            logger.warning(
                "The learning rate warms up over %d steps, but the run has only %d and never reaches %g. Lower "
                "warmup_steps, or set a share of the steps such as 0.1.",
                warmup_steps,
                num_training_steps,
                self.args.learning_rate,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _losses(
        self, model: nn.Module, batch: PairBatch, sums: Tensor, lengths: Tensor, targets: RankingTargets
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair `(B,)`, and the implicit rewards of both completions `(B, 2)`."""
        args = self.args
        ref_sums = self._ref_logps(model, batch)  # (B, 2)
        self_rewards = torch.zeros_like(sums[:, 0])  # (B,)
        if args.margin_weight:
            self_rewards = torch.tensor(batch.self_rewards, device=sums.device)
        lower, upper = args.margin_clip
        losses = dlma_loss(
            sums[:, 0],
            sums[:, 1],
            ref_sums[:, 0],
            ref_sums[:, 1],
            self_rewards,
            beta=args.beta,
            margin_weight=args.margin_weight,
            margin_clip=(lower, upper),
        )  # (B,)
        rewards = args.beta * (sums.detach() - ref_sums)  # (B, 2)
        margins = rewards[:, 0] - rewards[:, 1]
        metrics = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": margins > 0,
            "logps/chosen": sums[:, 0],
            "logps/rejected": sums[:, 1],
        }
        if args.margin_weight:
            metrics |= {
                "self_reward/mean": self_rewards,
                "self_reward/positive_ratio": self_rewards > 0,
                "self_reward/clipped_ratio": (self_rewards < lower) | (self_rewards > upper),
            }
        if args.sft_weight > 0:
            metrics["sft_loss"] = -sums[:, 0]
            losses = losses - args.sft_weight * sums[:, 0]
        self._metrics.add_tensors(metrics)
        return losses, rewards

    # Checkpoints and publishing

    def _resume_settings(self) -> dict[str, Any]:
        return {**super()._resume_settings(), "reference": self._reference_digest}

    def _describe(self, model: TrainedModel) -> TrainedModel:
        args, model = self.args, super()._describe(model)
        return replace(
            model,
            method=f"{PAPER.link}: it wrote a good and a bad reply to each prompt, scored how much better the good "
            "one is, and learned to prefer it by that margin.",
            settings={
                **model.settings,
                "SFT loss": f"{args.sft_weight}, on the chosen completion" if args.sft_weight else "none",
                "beta": str(args.beta),
                "margin": f"{args.margin_weight} times the self-reward, clipped to {args.margin_clip}",
            },
        )
