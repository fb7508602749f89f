"""`DLMATrainer`: DPO whose margin is what the model itself thinks of each pair."""

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
from ..models.loading import digest_weights, load_policy, short_model_name
from ..models.logps import fuse_lm_head, has_plain_lm_head, sequence_logps
from ..models.renderer import Renderer
from ..offline.ranking_collator import RankingCollator
from ..offline.ranking_config import RankingConfig
from ..offline.ranking_trainer import RankingTargets, RankingTrainer
from ..training.base_trainer import Optimizers
from ..training.dataset_checks import column_names
from ..training.model_card import DLMA, TrainedModel
from .dlma_config import DLMAConfig
from .dlma_loss import dlma_loss

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

_REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class DLMATrainer(RankingTrainer):
    """Trains a policy on contrastive pairs by DLMA (arXiv 2402.11907): DPO with the clipped self-reward as its margin.

    The pairs are those of `generate_contrastive_pairs`, or any preference data with `add_self_rewards`. The loss is
    `dlma_loss` with sums over tokens, against a reference that stays as the policy was.

    Args:
        model: A causal language model, or its name on the Hub or on disk.
        ref_model: The reference. By default the policy as it is now: with `peft_config`, its weights without the
            adapter; else loaded again by its name, or copied.
        args: The arguments.
        train_dataset: Rows of TRL's preference data (`chosen`, `rejected`, with `prompt` or with the prompt as what
            both begin with) and their `self_reward`, in text or as messages. Without `margin_weight`, no self-reward.
        eval_dataset: Likewise, or a mapping of several.
        processing_class: The policy's tokenizer; by default the one of the model's name.
        peft_config: Trains an adapter instead of all weights.
        callbacks: Further callbacks.
        optimizers: An optimiser and a schedule of your own.

    Raises:
        ValueError: If a column is missing, or there is no way to a reference; and as `RankingTrainer` does.
    """

    args: DLMAConfig
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
        if ref_model is model:
            raise ValueError("model and ref_model are one object, which would follow the policy. Leave ref_model out.")
        if args is None:
            args = self._default_args(model)
        self.ref_model: nn.Module | None = ref_model
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
            self.ref_model = self._ready_to_score(cast("PreTrainedModel", self.ref_model))
        if args.precompute_ref_log_probs:
            self._precompute_ref_logps()

    @staticmethod
    def _default_args(model: str | PreTrainedModel) -> DLMAConfig:
        return DLMAConfig(f"{short_model_name(model)}-DLMA")

    def _check_dataset(self, name: str, dataset: Dataset, args: RankingConfig) -> None:
        assert isinstance(args, DLMAConfig)
        columns = column_names(dataset)
        if not {"chosen", "rejected"} <= columns:
            raise ValueError(f"{name} needs the columns 'chosen' and 'rejected'; it has {sorted(columns)}.")
        if args.margin_weight and "self_reward" not in columns:
            raise ValueError(
                f"{name} needs a column 'self_reward', which add_self_rewards(dataset, model) adds. For plain DPO, "
                "set margin_weight=0."
            )
        super()._check_dataset(name, dataset, args)

    def _make_collator(self) -> Callable[[Any], Any]:
        return DLMACollator(self.renderer)

    # The reference

    def _receive_policy(
        self,
        given: str | PreTrainedModel,
        model: PreTrainedModel,
        args: RankingConfig,
        peft_config: PeftConfig | None,
    ) -> None:
        assert isinstance(args, DLMAConfig)
        if args.precompute_ref_log_probs and args.distributed_state.distributed_type == DistributedType.FSDP:
            raise ValueError("precompute_ref_log_probs=True does not work with FSDP. Leave it out.")
        is_split = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        # ZeRO-3 cannot run a model for scores and train it after that: there, precomputing takes one of its own, too.
        by_itself = is_split if args.precompute_ref_log_probs else peft_config is None
        if self.ref_model is None and by_itself:
            if is_peft_model(model):
                raise ValueError(
                    "The model has an adapter already, which a reference without it would lack. Set "
                    "precompute_ref_log_probs=True, or merge the adapter and pass a peft_config."
                )
            if isinstance(given, str):
                self.ref_model = load_policy(given, args)
            elif is_split:
                raise ValueError(
                    "DeepSpeed ZeRO-3 has split the model's weights, so that no reference can be copied from it. Pass "
                    "the model's name, or a ref_model."
                )
            else:
                self.ref_model = copy.deepcopy(model)
        self._reference_digest = digest_weights(cast("PreTrainedModel", self.ref_model or model))

    def _ready_to_score(self, reference: PreTrainedModel) -> nn.Module:
        """The reference on its device, split as the policy will be where that is needed."""
        reference.eval().requires_grad_(False)
        fuse_lm_head(reference)
        ready: nn.Module
        if self.is_deepspeed_enabled:
            ready = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            ready = prepare_fsdp(reference, self.accelerator)
        else:
            ready = self.accelerator.prepare_model(reference, evaluation_mode=True)
        return ready

    def _ref_logps(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Summed log-probabilities `(B, 2)` of both completions under the reference."""
        if inputs["ref_logps"] is not None:
            return torch.tensor(inputs["ref_logps"], device=self.accelerator.device)
        if self.args.precompute_ref_log_probs:
            raise ValueError(
                "These pairs have no precomputed reference log-probabilities, and the policy has moved on since: pass "
                "them as eval_dataset when the trainer is made, or set precompute_ref_log_probs=False."
            )
        with self._timer("reference"), self._as_reference(model) as reference:
            return self._score_pairs(reference, inputs)

    @contextmanager
    def _as_reference(self, model: nn.Module) -> Iterator[nn.Module]:
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                yield model

    @torch.no_grad()
    def _score_pairs(self, reference: nn.Module, inputs: dict[str, Any]) -> Tensor:
        sums, _ = sequence_logps(
            reference,
            [prompt for prompt in inputs["prompt_ids"] for _ in range(2)],
            [ids for pair in inputs["completion_ids"] for ids in pair],
            pad_token_id=self.renderer.tokenizer.pad_token_id,
            device=self.accelerator.device,
            fused=has_plain_lm_head(self.accelerator.unwrap_model(reference)),
        )
        return sums.view(-1, 2)

    def _precompute_ref_logps(self) -> None:
        """Adds the reference's log-probabilities to the data sets, and lets go of the reference."""
        reference = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            # What is to be trained lies on no device before training starts.
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
        for inputs in tqdm(loader, "Reference log-probabilities", disable=self.args.disable_tqdm, leave=False):
            with self.accelerator.autocast():
                batches.append(self.accelerator.gather_for_metrics(self._score_pairs(reference, inputs)).cpu())
        columns = torch.cat(batches).T.tolist()  # (2, N)
        dataset = dataset.remove_columns([name for name in _REF_COLUMNS if name in dataset.column_names])
        for name, column in zip(_REF_COLUMNS, columns, strict=True):
            dataset = dataset.add_column(name, column)
        return dataset

    # The loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the schedule; says so if the run ends before its warm-up does."""
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        if warmup_steps >= num_training_steps and self.is_world_process_zero():
            logger.warning(
                "The learning rate warms up over %d steps, but the run has %d: it never reaches %g. Set warmup_steps "
                "to fewer, or to a share of them, such as 0.1.",
                warmup_steps,
                num_training_steps,
                self.args.learning_rate,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _losses(
        self, model: nn.Module, inputs: dict[str, Any], sums: Tensor, lengths: Tensor, targets: RankingTargets
    ) -> tuple[Tensor, Tensor]:
        """The loss of each pair `(B,)`, and the implicit rewards of both completions `(B, 2)`."""
        args = self.args
        ref_sums = self._ref_logps(model, inputs)  # (B, 2)
        self_rewards = torch.zeros_like(sums[:, 0])  # (B,)
        if args.margin_weight:
            self_rewards = torch.tensor(inputs["self_rewards"], device=sums.device)
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
        self._log_batch(metrics)
        return losses, rewards

    # Checkpoints and publishing

    def _fixed_settings(self) -> dict[str, Any]:
        return {**super()._fixed_settings(), "reference": self._reference_digest}

    def _describe(self, model: TrainedModel) -> TrainedModel:
        args, model = self.args, super()._describe(model)
        return replace(
            model,
            method=f"{DLMA.link}: it replied to each prompt as well and as badly as it could, and learned to tell the "
            "replies apart as far as it held the one to be better.",
            settings={
                **model.settings,
                "SFT loss": f"{args.sft_weight}, on the chosen completion" if args.sft_weight else "none",
                "beta": str(args.beta),
                "margin": f"{args.margin_weight} times the self-reward, clipped to {args.margin_clip}",
            },
        )


@dataclass(frozen=True)
class DLMACollator:
    """Batches pairs as `RankingCollator` does, with B `self_rewards` and B x 2 `ref_logps`, `None` where absent."""

    renderer: Renderer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = RankingCollator(self.renderer)(rows)
        self_rewards = [row["self_reward"] for row in rows] if "self_reward" in rows[0] else None
        for value in self_rewards or ():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"Self-rewards must be finite numbers, got {value}.")
        ref_logps = None
        if set(_REF_COLUMNS) <= rows[0].keys():
            ref_logps = [[row[name] for name in _REF_COLUMNS] for row in rows]
        return {**batch, "self_rewards": self_rewards, "ref_logps": ref_logps}
