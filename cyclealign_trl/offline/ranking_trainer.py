"""`RankingTrainer`: PRO and RRHF on ranked completions, and the base of the cycle."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import is_peft_model, set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    TrainerCallback,
)

from .._compat import EvalLoopOutput, get_config_model_id
from ..models.loading import as_dict, check_positions, hub_kwargs, load_policy, model_name, sync_special_tokens
from ..models.logps import fuse_lm_head, has_plain_lm_head, sequence_logps
from ..models.renderer import Renderer
from ..training.base_trainer import CardBeforePush, Optimizers, PublishedTrainer, ResumableTrainer
from ..training.dataset_checks import check_no_stream, column_names, named_datasets
from ..training.model_card import LOSSES, TrainedModel
from ..types import ABSENT
from .losses import pair_margins, pro_loss, rrhf_loss
from .ranking_collator import RankingCollator
from .ranking_config import RankingConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftConfig


@dataclass(frozen=True, slots=True)
class RankingTargets:
    """What a batch of B prompts with K completions each trains on.

    Args:
        ranks: `(B, K)`, -1 = absent. A row of -1 weighs nothing.
        rewards: `(B, K)` for PRO's temperatures, or `None`.
        sft_ids: Token ids of B completions to imitate; an empty one stands for the top-ranked completion. `None` if
            no prompt has one of its own. A row of -1 with a target trains on that alone.
        rank_sft_ids: Whether these targets also rank above their prompt's completions, so that K + 1 compete.
        weights: `(B,)`, what each prompt's loss is multiplied by; `None` weighs all alike. The divisor of the batch's
            mean stays B.
    """

    ranks: Tensor
    rewards: Tensor | None = None
    sft_ids: list[list[int]] | None = None
    rank_sft_ids: bool = False
    weights: Tensor | None = None


class RankingTrainer(PublishedTrainer, ResumableTrainer):
    """Trains a policy on completions in order of merit: a ranking loss plus SFT on the best completion.

    The loss of a prompt with K completions is `ranking + sft_weight * (K - 1)^2 * SFT`, with PRO (arXiv 2306.17492) or
    RRHF (arXiv 2304.05302) as the ranking loss and a sum over tokens as SFT; a batch takes the mean over its prompts.

    Args:
        model: A causal language model, or its name on the Hub or on disk.
        args: The arguments.
        train_dataset: Rows of `prompt`, `completions` (K texts, or K lists of one assistant message), and `ranks`
            (K integers, 0 = best, equal ranks tie) or `rewards` (K numbers, largest = best) or both; with rewards,
            PRO uses its temperatures. Or TRL's preference data, which is K = 2: `chosen` and `rejected`, with
            `prompt` or with the prompt as what both begin with.
        eval_dataset: Likewise, or a mapping of several.
        processing_class: The policy's tokenizer; by default the one of the model's name.
        peft_config: Trains an adapter instead of all weights.
        callbacks: Further callbacks.
        optimizers: An optimiser and a schedule of your own.

    Raises:
        ValueError: If a column is missing, a data set's first row cannot be read, the tokenizer has neither a pad nor
            an end-of-sequence token, or prompts and completions together can be longer than the model's positions.
    """

    # Each micro-batch's loss is a mean over its prompts: the Trainer divides by the number of micro-batches.
    loss_is_scaled_for_ga = False
    args: RankingConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RankingConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
    ) -> None:
        if args is None:
            args = self._default_args(model)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            self._check_dataset(name, dataset, args)

        set_seed(args.seed)  # before PEFT draws the adapter's weights
        if args.data_seed is None:
            args.data_seed = args.seed  # or each process would shuffle by a seed of its own, and take others' rows
        given = model
        if isinstance(model, str):
            model = load_policy(model, args)
        elif args.model_init_kwargs is not None:
            raise ValueError(
                "model_init_kwargs has no effect on a model that is loaded already: pass its name instead."
            )
        if processing_class is None:
            source = hub_kwargs(as_dict(args.model_init_kwargs))
            processing_class = AutoTokenizer.from_pretrained(get_config_model_id(model.config), **source)
        eos_token_ids = sync_special_tokens(model, processing_class)
        check_positions(
            model, max_prompt_length=args.max_prompt_length, max_completion_length=args.max_completion_length
        )
        self.renderer = Renderer(
            processing_class,
            eos_token_ids,
            args.max_prompt_length,
            args.max_completion_length,
            as_dict(args.chat_template_kwargs),
        )

        self._receive_policy(given, model, args, peft_config)
        fuse_lm_head(model.get_base_model() if is_peft_model(model) else model)
        if peft_config is not None:
            from peft import get_peft_model

            model = cast("PreTrainedModel", get_peft_model(model, peft_config))
        self._fused_lm_head = has_plain_lm_head(model)
        # The Trainer would say that it cannot count floating-point operations: our batches are lists.
        model.warnings_issued = {**getattr(model, "warnings_issued", {}), "estimate_tokens": True}

        # Since they were last drained: values to average, with weights, and counts to add up.
        self._metrics: dict[str, defaultdict[str, list[tuple[float, float]]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }
        self._counts: dict[str, defaultdict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of the current step, by what they went into
        collator = self._make_collator()
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            if hasattr(dataset, "__len__") and len(dataset):
                _try_first_row(name, dataset, collator)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.add_callback(CardBeforePush(self.create_model_card))
        set_seed(args.seed, device_specific=True)  # every process samples for itself

    # What a subclass changes

    @staticmethod
    def _default_args(model: str | PreTrainedModel) -> RankingConfig:
        return RankingConfig(f"{model_name(model)}-Ranking")

    def _check_dataset(self, name: str, dataset: Dataset, args: RankingConfig) -> None:
        check_no_stream(name, dataset)
        columns = column_names(dataset)
        ranked = {"prompt", "completions"} <= columns and columns & {"ranks", "rewards"}
        if not ranked and not {"chosen", "rejected"} <= columns:
            raise ValueError(
                f"{name} needs the columns 'prompt', 'completions', and 'ranks' or 'rewards'; or 'chosen' and "
                f"'rejected'. It has {sorted(columns)}."
            )

    def _receive_policy(
        self,
        given: str | PreTrainedModel,
        model: PreTrainedModel,
        args: RankingConfig,
        peft_config: PeftConfig | None,
    ) -> None:
        """Called with the policy as it was loaded, before anything is added to it."""

    def _make_collator(self) -> Callable[[Any], Any]:
        return RankingCollator(self.renderer)

    def _targets(self, inputs: dict[str, Any], sums: Tensor, lengths: Tensor) -> RankingTargets:
        """What the batch trains on, given the policy's summed log-probabilities and lengths, both `(B, K)`."""
        self._log_batch(
            {
                "prompts/cut_ratio": torch.tensor(inputs["prompt_cut"], device=sums.device),
                "completions/clipped_ratio": torch.tensor(inputs["completion_cut"], device=sums.device),
            }
        )
        ranks = torch.tensor(inputs["ranks"], device=sums.device)
        rewards = inputs["rewards"]
        return RankingTargets(ranks, None if rewards is None else torch.tensor(rewards, device=sums.device))

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """Mean over the batch's prompts of the ranking loss plus weighted SFT."""
        prompt_ids, completion_ids = inputs["prompt_ids"], inputs["completion_ids"]
        shape = (len(prompt_ids), len(completion_ids[0]))  # (B, K)
        with self._timer("forward"):
            sums, lengths = self._sequence_logps(
                model,
                [prompt for prompt in prompt_ids for _ in range(shape[1])],
                [ids for completions in completion_ids for ids in completions],
            )
        sums, lengths = sums.view(shape), lengths.view(shape)
        targets = self._targets(inputs, sums, lengths)

        losses, scores = self._losses(model, inputs, sums, lengths, targets)  # (B,), (B, K)
        if targets.weights is not None:
            losses = losses * targets.weights
        loss = losses.mean()
        return (loss, {"scores": scores.detach(), "ranks": targets.ranks}) if return_outputs else loss

    def _losses(
        self, model: nn.Module, inputs: dict[str, Any], sums: Tensor, lengths: Tensor, targets: RankingTargets
    ) -> tuple[Tensor, Tensor]:
        """The loss of each prompt `(B,)`, and the scores that order its completions `(B, K)`."""
        scores = sums / lengths.clamp(min=1)  # (B, K)
        margins = pair_margins(scores.detach(), targets.ranks)
        competing, ranks, target_sums = scores, targets.ranks, None
        # Every process decides alike, by the configuration alone: a forward that only some run would hang the others.
        if targets.sft_ids is not None and (self.args.sft_weight > 0 or targets.rank_sft_ids):
            with self._timer("forward"):
                target_sums, _ = self._sequence_logps(model, inputs["prompt_ids"], targets.sft_ids)  # (B,)
            target_lengths = torch.tensor([len(ids) for ids in targets.sft_ids], device=sums.device)  # (B,)
            if targets.rank_sft_ids:
                target_scores = target_sums / target_lengths.clamp(min=1)
                competing = torch.cat([target_scores.unsqueeze(1), scores], dim=1)  # (B, K + 1)
                ranks = _with_first(ranks, present=target_lengths > 0)  # (B, K + 1)

        if self.args.loss_type == "pro":
            losses = pro_loss(competing, ranks, targets.rewards)  # (B,)
        else:
            losses = rrhf_loss(competing, ranks)  # (B,)
        metrics = {"ranking_loss": losses}
        if self.args.sft_weight > 0:
            sft_losses = -_best(sums, targets.ranks)  # (B,)
            if target_sums is not None:
                sft_losses = torch.where(target_lengths > 0, -target_sums, sft_losses)
            num_competing = (ranks != ABSENT).sum(dim=1)  # (B,)
            # A prompt that has a target and no ranking weighs as much as a ranked one.
            num_competing = num_competing.where((targets.ranks != ABSENT).any(dim=1), sums.shape[1])
            losses = losses + self.args.sft_weight * (num_competing - 1) ** 2 * sft_losses
            metrics["sft_loss"] = sft_losses
        self._log_batch({**metrics, "ranking/accuracy": margins > 0, "ranking/margin": margins})
        return losses, scores

    def _sequence_logps(
        self, model: nn.Module, prompt_ids: list[list[int]], completion_ids: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        return sequence_logps(
            model,
            prompt_ids,
            completion_ids,
            pad_token_id=self.renderer.tokenizer.pad_token_id,
            device=self.accelerator.device,
            fused=self._fused_lm_head,
        )

    # The Trainer's seams

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs  # lists, moved to the device where they become tensors

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, forward and backward."""
        started, before = time.perf_counter(), sum(self._seconds.values())
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()  # or the backward pass would be charged to whatever waits for it next
        timed = sum(self._seconds.values()) - before
        self._seconds["backward"] += time.perf_counter() - started - timed
        if self.accelerator.sync_gradients:
            self._log_seconds()
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, scores `(B, K)` and ranks `(B, K)` of a batch."""
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        self._log_seconds()
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["scores"], outputs["ranks"]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluates or predicts, and adds what was measured meanwhile to the metrics."""
        output: EvalLoopOutput = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._drain("eval").items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was measured in training since its last log."""
        if "loss" in logs or "train_runtime" in logs:
            logs.update(self._drain("train"))
        super().log(logs, start_time)

    # Checkpoints

    def _fixed_settings(self) -> dict[str, Any]:
        args = self.args
        return {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "rows of train_dataset": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
        }

    # Publishing

    def _describe(self, model: TrainedModel) -> TrainedModel:
        """Adds to a description of the model how it was trained."""
        args = self.args
        loss = LOSSES[args.loss_type]
        return replace(
            model,
            papers=(loss,),
            method=f"{loss.link}: it learned an order of completions that was already there.",
            settings={
                "ranking loss": loss.link,
                "SFT loss": f"{args.sft_weight} (K - 1)², on the top-ranked completion" if args.sft_weight else "none",
                "learning rate": f"{args.learning_rate}, {SchedulerType(args.lr_scheduler_type).value}",
                "prompts per step": str(args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
                "optimiser steps": str(self.state.global_step),
            },
        )

    # Metrics

    @contextmanager
    def _timer(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _drain(self, mode: str) -> dict[str, float]:
        """The means and counts since the last call, and a fresh start."""
        drained = {name: fmean(*zip(*values, strict=True)) for name, values in self._metrics[mode].items()}
        drained.update(self._counts[mode])
        self._metrics[mode].clear()
        self._counts[mode].clear()
        return drained

    def _log_metric(self, name: str, value: float, weight: float = 1.0) -> None:
        self._metrics[self._mode][name].append((value, weight))

    def _log_count(self, name: str, count: float) -> None:
        self._counts[self._mode][name] += count

    def _log_seconds(self) -> None:
        self._log_local({f"time/{name}": seconds for name, seconds in self._seconds.items()})
        self._seconds.clear()

    def _log_local(self, metrics: Mapping[str, float]) -> None:
        """Logs the means over processes of what each has measured for itself, all of them the same metrics."""
        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=self.accelerator.device)
        for name, value in zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True):
            self._log_metric(name, value)

    def _log_batch(self, metrics: Mapping[str, Tensor]) -> None:
        """Logs means over all elements of all processes' tensors, which may be of any number, even none."""
        totals = torch.stack(
            [part for values in metrics.values() for part in (values.detach().float().sum(), _count(values))]
        )
        summed = self.accelerator.reduce(totals).view(-1, 2).tolist()
        for name, (total, count) in zip(metrics, summed, strict=True):
            if count:
                self._log_metric(name, total / count, weight=count)


def _best(sums: Tensor, ranks: Tensor) -> Tensor:
    """The sum `(B,)` of each prompt's top-ranked completion, 0 where nothing is ranked."""
    absent = ranks == ABSENT
    best = ranks.masked_fill(absent, ranks.shape[1]).argmin(dim=1, keepdim=True)  # (B, 1)
    return sums.gather(1, best).squeeze(1).masked_fill(absent.all(dim=1), 0.0)


def _with_first(ranks: Tensor, present: Tensor) -> Tensor:
    """Ranks `(B, K + 1)` with one more completion before all others, where it is present and they are ranked."""
    ranked = ranks != ABSENT
    first = torch.zeros_like(ranks[:, :1]).masked_fill(~(present & ranked.any(dim=1)).unsqueeze(1), ABSENT)
    return torch.cat([first, ranks + ranked.long()], dim=1)


def _count(values: Tensor) -> Tensor:
    return torch.tensor(float(values.numel()), device=values.device)


def _try_first_row(name: str, dataset: Any, collator: Callable[[Any], Any]) -> None:
    try:
        collator([dataset[0]])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The first row of {name} cannot be used: {error}") from error
