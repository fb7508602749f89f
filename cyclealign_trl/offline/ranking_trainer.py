"""`RankingTrainer`: PRO and RRHF on ranked completions, and the base of the cycle and of DLMA."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import is_peft_model, set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, SchedulerType, TrainerCallback

from .._compat import EvalLoopOutput, get_config_model_id
from ..data.formats import ranked_row
from ..data.hh_rlhf import DatasetType, is_published, read_published
from ..models.chat_templates import set_chat_template
from ..models.choose_scoring import choose_scoring
from ..models.loading import (
    check_positions,
    check_tokenizer,
    dict_field,
    hub_kwargs,
    load_policy,
    max_positions,
    short_model_name,
    sync_special_tokens,
)
from ..models.logps import Scoring, add_scoring, sequence_logps
from ..models.renderer import Renderer
from ..training.base_trainer import BaseTrainer, Optimizers
from ..training.config_checks import check_config_class
from ..training.dataset_checks import check_has_rows, check_map_style, column_names, named_datasets
from ..training.metrics import MetricStore, Mode
from ..training.model_card import Paper, TrainedModel
from ..training.row_checks import (
    COMPLETIONS,
    PROMPT,
    RANKS,
    REWARDS,
    RowCheck,
    check_rewards,
    check_rows,
    equally_long,
    pair_check,
    plain_rows,
)
from ..types import ABSENT
from .losses import LOSSES, pair_margins, ranks_above
from .ranking_collator import Batch, RankedBatch, RankingCollator, TokenIds
from .ranking_config import RankingConfig

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankingTargets:
    """Targets of a batch of B prompts with K completions each.

    Args:
        ranks: `(B, K)`, -1 = absent. A prompt whose ranks are all -1 has no ranking loss.
        rewards: `(B, K)` for PRO's temperatures, or `None`.
        sft_ids: Token ids of the completions to imitate, one per prompt. `None` for a prompt imitates its top-ranked
            completion. A prompt without ranks but with a target trains on that alone. `None` for the batch means that
            no batch of the run has targets.
        rank_sft_ids: Whether the targets also rank above their prompt's completions, so that K + 1 compete.
        weights: `(B,)`, factors of the prompts' losses. The divisor of the batch's mean stays B. `None` means 1.
    """

    ranks: Tensor
    rewards: Tensor | None = None
    sft_ids: list[TokenIds | None] | None = None
    rank_sft_ids: bool = False
    weights: Tensor | None = None


class RankingTrainer(BaseTrainer):
    """Train a policy on ranked completions: a ranking loss, plus SFT on the best completion.

    The loss of a prompt with K completions is `ranking + sft_weight * (K - 1)^2 * SFT`. The ranking loss is PRO (arXiv
    2306.17492) or RRHF (arXiv 2304.05302), and the SFT loss is a sum over tokens. A batch takes the mean over its
    prompts.

    Args:
        model: A causal language model, or its name on the Hub or on disk.
        args: The arguments.
        train_dataset: Rows of `prompt`, `completions` (K texts, or K lists of one assistant message), and `ranks`
            (K integers, 0 = best, equal ranks tie) or `rewards` (K numbers, largest = best) or both. With rewards, PRO
            uses its temperatures. TRL's preference data has K = 2: `chosen` and `rejected`, with `prompt` or with the
            prompt as their common beginning.
        eval_dataset: Data set of the same format, or a mapping of several.
        processing_class: The policy's tokenizer. Defaults to the one of the model's name.
        peft_config: Trains an adapter instead of all weights.
        callbacks: Further callbacks.
        optimizers: Custom optimiser and schedule.

    Raises:
        TypeError: If `args` belongs to another trainer, or `processing_class` is not a tokenizer.
        ValueError: If a data set has no rows or lacks a column, its first row cannot be read, the tokenizer has
            neither a pad nor an end-of-sequence token, or prompt and completion together can exceed the model's
            positions.
    """

    # Each micro-batch's loss is a mean over its prompts: the Trainer divides by the number of micro-batches.
    loss_is_scaled_for_ga = False
    args: RankingConfig
    _config_class: type[RankingConfig] = RankingConfig
    _method_name = "Ranking"  # in the default output directory

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
        check_config_class(self, args, self._config_class)
        if processing_class is not None:
            check_tokenizer("processing_class", processing_class)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_has_rows(name, dataset)
        train_dataset, eval_dataset = plain_rows(train_dataset), plain_rows(eval_dataset)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            self._check_dataset(name, dataset, args)

        set_seed(args.seed)  # before PEFT initialises the adapter
        if args.data_seed is None:
            args.data_seed = args.seed  # else each process would shuffle by its own seed, and processes share rows
        given = model
        if isinstance(model, str):
            model = load_policy(model, args)
        elif args.model_init_kwargs is not None:
            raise ValueError("model_init_kwargs has no effect on a loaded model. Pass the model's name instead.")
        if processing_class is None:
            source = hub_kwargs(dict_field(args.model_init_kwargs))
            processing_class = AutoTokenizer.from_pretrained(get_config_model_id(model.config), **source)
        if args.chat_template is not None:
            set_chat_template(processing_class, args.chat_template)
        chat_template_kwargs = dict_field(args.chat_template_kwargs)
        eos_token_ids = sync_special_tokens(model, processing_class, chat_template_kwargs)
        check_positions(
            model, max_prompt_length=args.max_prompt_length, max_completion_length=args.max_completion_length
        )
        self.renderer = Renderer(
            processing_class,
            eos_token_ids,
            args.max_prompt_length,
            args.max_completion_length,
            chat_template_kwargs,
            max_positions(model),
        )

        self._receive_policy(given, model, args, peft_config)
        add_scoring(model.get_base_model() if is_peft_model(model) else model)
        if peft_config is not None:
            from peft import get_peft_model

            model = cast("PreTrainedModel", get_peft_model(model, peft_config))
        collator = self._make_collator()
        train_dataset = self._read_dataset("train_dataset", train_dataset)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {
                name: self._read_dataset(f"eval_dataset[{name!r}]", part) for name, part in eval_dataset.items()
            }
        else:
            eval_dataset = self._read_dataset("eval_dataset", eval_dataset)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            if hasattr(dataset, "__len__") and len(dataset):
                check_rows(name, dataset, self._row_check(dataset, collator))
                check_rewards(name, dataset)
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
        self._metrics = MetricStore(self.accelerator, self._mode)
        # FSDP runs a model only as wrapped for training, so its check waits for the first forward pass.
        self._scoring = None if self.is_fsdp_enabled else self._choose_scoring(self.model, self._causal_lm)
        set_seed(args.seed, device_specific=True)  # every process samples different completions

    # Hooks of subclasses

    @classmethod
    def _default_args(cls, model: str | PreTrainedModel) -> Any:  # cls._config_class
        return cls._config_class(f"{short_model_name(model)}-{cls._method_name}")

    def _check_dataset(self, name: str, dataset: Dataset, args: RankingConfig) -> None:
        """Raise `ValueError` if a data set lacks what the trainer reads."""
        check_map_style(name, dataset)
        columns = column_names(dataset)
        ranked = {"prompt", "completions"} <= columns and columns & {"ranks", "rewards"}
        if not ranked and not {"chosen", "rejected"} <= columns:
            raise ValueError(
                f"{name} needs the columns 'prompt', 'completions', and 'ranks' or 'rewards'; or 'chosen' and "
                f"'rejected'. It has {sorted(columns)}."
            )

    def _read_dataset(self, name: str, dataset: Any, dataset_type: DatasetType = "preference") -> Any:
        """Return a data set in a format of the trainer, and split dialogues that HH-RLHF publishes."""
        if not is_published(dataset):
            return dataset
        conversational = self.renderer.tokenizer.chat_template is not None
        dataset = read_published(dataset, dataset_type, conversational)
        logger.warning(
            "%s contains dialogues of HH-RLHF, which are read as %s: %s.",
            name,
            "messages" if conversational else "plain text, because the tokenizer has no chat template",
            dataset.info.description,
        )
        return dataset

    def _row_check(self, dataset: Any, collator: Callable[[Any], Batch]) -> RowCheck:
        """Return how to check the rows of a data set."""
        columns = column_names(dataset)
        collate_longest = self.renderer.max_prompt_length is None
        if "completions" in columns:
            return RowCheck(
                {"prompt": PROMPT, "completions": COMPLETIONS, "ranks": RANKS, "rewards": REWARDS},
                read=ranked_row,
                collate=collator,
                is_plain=equally_long("completions", "ranks", "rewards"),
                collate_longest=collate_longest,
            )
        return pair_check(dataset[0], collator, collate_longest)

    def _receive_policy(
        self,
        given: str | PreTrainedModel,
        model: PreTrainedModel,
        args: RankingConfig,
        peft_config: PeftConfig | None,
    ) -> None:
        """Use the loaded policy before its head is fused and an adapter is added. `given` is the argument `model`."""

    def _make_collator(self) -> Callable[[Any], Batch]:
        return RankingCollator(self.renderer)

    def _targets(self, batch: Any, sums: Tensor, lengths: Tensor) -> RankingTargets:
        """Return the targets of a batch.

        Args:
            batch: The batch, from the collator or from `_prepare_inputs`.
            sums: The policy's summed log-probabilities, `(B, K)`.
            lengths: Tokens of the completions, `(B, K)`.
        """
        assert isinstance(batch, RankedBatch)
        self._metrics.add_tensors(
            {
                "prompts/cut_ratio": torch.tensor(batch.prompt_truncated, device=sums.device),
                "completions/clipped_ratio": torch.tensor(batch.completion_truncated, device=sums.device),
            }
        )
        ranks = torch.tensor(batch.ranks, device=sums.device)
        rewards = None if batch.rewards is None else torch.tensor(batch.rewards, device=sums.device)
        return RankingTargets(ranks, rewards)

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,  # a batch with `prompt_ids` and `scored_ids`
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """Return the mean over the batch's prompts of the ranking loss plus weighted SFT."""
        completion_ids = inputs.scored_ids
        shape = (len(completion_ids), len(completion_ids[0]))  # (B, K)
        with self._metrics.timer("forward"):
            sums, lengths = self._sequence_logps(
                model,
                [prompt for prompt in inputs.prompt_ids for _ in range(shape[1])],
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
        self, model: nn.Module, batch: Any, sums: Tensor, lengths: Tensor, targets: RankingTargets
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each prompt `(B,)`, and the scores that order its completions `(B, K)`."""
        scores = sums / lengths.clamp(min=1)  # (B, K)
        margins = pair_margins(scores.detach(), targets.ranks)
        competing, ranks, target_sums = scores, targets.ranks, None
        # The configuration alone decides on this forward pass: one that only some processes run would hang.
        if targets.sft_ids is not None and (self.args.sft_weight > 0 or targets.rank_sft_ids):
            target_ids = [ids or [] for ids in targets.sft_ids]
            with self._metrics.timer("forward"):
                target_sums, target_lengths = self._sequence_logps(model, batch.prompt_ids, target_ids)  # (B,), (B,)
            if targets.rank_sft_ids:
                target_scores = target_sums / target_lengths.clamp(min=1)
                competing = torch.cat([target_scores.unsqueeze(1), scores], dim=1)  # (B, K + 1)
                ranks = _insert_first(ranks, present=target_lengths > 0)  # (B, K + 1)

        losses = LOSSES[self.args.loss_type].function(competing, ranks, targets.rewards)  # (B,)
        metrics = {"ranking_loss": losses}
        if self.args.sft_weight > 0:
            sft_losses = -_top_ranked(sums, scores.detach(), targets.ranks)  # (B,)
            if target_sums is not None:
                sft_losses = torch.where(target_lengths > 0, -target_sums, sft_losses)
            num_competing = (ranks != ABSENT).sum(dim=1)  # (B,)
            # A prompt that has a target and no ranking weighs as much as a ranked one.
            num_competing = num_competing.where((targets.ranks != ABSENT).any(dim=1), sums.shape[1])
            losses = losses + self.args.sft_weight * (num_competing - 1) ** 2 * sft_losses
            metrics["sft_loss"] = sft_losses
        self._metrics.add_tensors({**metrics, "ranking/accuracy": margins > 0, "ranking/margin": margins})
        return losses, scores

    def _sequence_logps(
        self, model: nn.Module, prompt_ids: list[TokenIds], completion_ids: list[TokenIds]
    ) -> tuple[Tensor, Tensor]:
        if self._scoring is None:
            self._scoring = self._choose_scoring(model, self._causal_lm)
        return sequence_logps(
            model,
            prompt_ids,
            completion_ids,
            pad_token_id=self.renderer.tokenizer.pad_token_id,
            device=self.accelerator.device,
            scoring=self._scoring,
        )

    def _choose_scoring(self, model: nn.Module, causal_lm: PreTrainedModel) -> Scoring:
        return choose_scoring(
            model,
            causal_lm,
            num_completions=self._num_completions,
            max_prompt_length=self.args.max_prompt_length,
            max_completion_length=self.args.max_completion_length,
        )

    @property
    def _num_completions(self) -> int:
        """Completions of the first prompt, K."""
        dataset = self.train_dataset
        if dataset is None or "completions" not in column_names(dataset):
            return 2
        return len(dataset[0]["completions"])

    @property
    def _causal_lm(self) -> PreTrainedModel:
        """The policy without wrappers and adapter."""
        model = self.accelerator.unwrap_model(self.model)
        return cast("PreTrainedModel", model.get_base_model() if is_peft_model(model) else model)

    # Overrides of the Trainer

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # lists, which become tensors on the device where they are used

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the Trainer counts operations by `input_ids`, which batches do not have."""
        return 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the forward and backward pass of one micro-batch."""
        with self._metrics.timer("backward"):  # what is not timed inside
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.device.type != "cpu":
                torch.accelerator.synchronize()  # else the next timer that waits for the device is charged
        if self.accelerator.sync_gradients:
            self._metrics.add_times()
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss, the scores `(B, K)` and the ranks `(B, K)` of a batch."""
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        self._metrics.add_times()
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
        """Evaluate or predict, and add the metrics of the evaluation to the output."""
        output: EvalLoopOutput = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        assert output.metrics is not None
        measured = self._metrics.drain("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of training since its last log."""
        if "loss" in logs or "train_runtime" in logs:
            logs.update(self._metrics.drain("train"))
        super().log(logs, start_time)

    def _mode(self) -> Mode:
        return "train" if self.model.training else "eval"

    # Publishing

    @property
    def _paper(self) -> Paper:
        return LOSSES[self.args.loss_type].paper

    def _describe(self, model: TrainedModel) -> TrainedModel:
        args, paper = self.args, self._paper
        return replace(
            model,
            papers=(paper,),
            method=f"{paper.link} on completions that were already ranked.",
            settings={
                "ranking loss": paper.link,
                "SFT loss": f"{args.sft_weight} (K - 1)², on the top-ranked completion" if args.sft_weight else "none",
                "learning rate": f"{args.learning_rate}, {SchedulerType(args.lr_scheduler_type).value}",
                "prompts per step": str(args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
                "optimiser steps": str(self.state.global_step),
                "log-probabilities": str(self._scoring or "not computed"),
            },
        )


def _top_ranked(sums: Tensor, scores: Tensor, ranks: Tensor) -> Tensor:
    """Return the sum `(B,)` of each prompt's top-ranked completion, 0 if the ranks prefer none.

    If several completions share the best rank, it is the one that the policy scores highest.
    """
    preferred = ranks_above(ranks).any(dim=2)  # (B, K): above at least one other
    top_rank = ranks.masked_fill(~preferred, ranks.shape[1]).amin(dim=1, keepdim=True)  # (B, 1)
    best = scores.masked_fill(~preferred | (ranks != top_rank), float("-inf")).argmax(dim=1, keepdim=True)  # (B, 1)
    return sums.gather(1, best).squeeze(1).masked_fill(~preferred.any(dim=1), 0.0)


def _insert_first(ranks: Tensor, present: Tensor) -> Tensor:
    """Return ranks `(B, K + 1)` with a further completion above all others, if it is present and they are ranked."""
    ranked = ranks != ABSENT
    first = torch.zeros_like(ranks[:, :1]).masked_fill(~(present & ranked.any(dim=1)).unsqueeze(1), ABSENT)
    return torch.cat([first, ranks + ranked.long()], dim=1)
