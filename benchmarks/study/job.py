"""One row with one seed: the inputs that all rows share, their training arguments, and training within a deadline."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cyclealign_trl import RewardScorer
from cyclealign_trl.evaluation.prompts import PromptSet

from .dialogues import evaluation_prompts, training_pairs
from .endpoint import Score, reward_model_score
from .rows import Row
from .samples import PolicySamples
from .scales import Scale


class OutOfTimeError(Exception):
    """The time of this command is over. What is finished is stored."""


@dataclass
class Study:
    """What the rows share.

    Args:
        model: Path of the initial policy.
        hh_rlhf: Folder with the test files of HH-RLHF.
        reward_models: Folder of `evaluator` and `judge`.
        output_dir: Folder of the runs.
        scale: Sizes.
        deadline: When to stop, on the clock of `time.monotonic`.
    """

    model: str
    hh_rlhf: str
    reward_models: Path
    output_dir: Path
    scale: Scale
    deadline: float

    @cached_property
    def pairs(self) -> Dataset:
        """Pairs to train on."""
        return training_pairs(self.hh_rlhf, AutoTokenizer.from_pretrained(self.model), self.scale)

    @cached_property
    def prompts(self) -> PromptSet:
        """Prompts to evaluate on."""
        return evaluation_prompts(self.hh_rlhf, AutoTokenizer.from_pretrained(self.model), self.scale)

    @cached_property
    def judge_score(self) -> Score:
        """Scores of the judge's reward model."""
        return reward_model_score(RewardScorer(str(self.reward_models / "judge")))

    def samples(self, kind: str, number: int) -> PolicySamples:
        """Return the stored samples of the initial policy for a kind of prompts."""
        path = self.output_dir / "samples" / f"{kind}.jsonl"
        return PolicySamples(self.model, path, number, self.scale)

    def check_time(self) -> None:
        """Raise `OutOfTimeError` after the deadline."""
        if time.monotonic() > self.deadline:
            raise OutOfTimeError


@dataclass
class Job:
    """A row with a seed.

    Args:
        study: What the rows share.
        row: The row.
        seed: The seed.
        folder: Folder of the run.
    """

    study: Study
    row: Row
    seed: int
    folder: Path

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments that all trainers share."""
        scale = self.study.scale
        return {
            "output_dir": str(self.folder),
            "seed": self.seed,
            "max_steps": scale.steps,
            "per_device_train_batch_size": scale.batch_size,
            "learning_rate": scale.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "optim": "adamw_torch",
            "max_grad_norm": 1.0,
            "save_steps": scale.save_steps,
            "save_total_limit": 1,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
        }

    @property
    def peft_config(self) -> LoraConfig:
        """Return the adapter that all trainers train."""
        rank = self.study.scale.lora_rank
        return LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", target_modules="all-linear")

    def train(self, trainer: Trainer) -> str:
        """Train, from the last checkpoint if there is one, and return the folder of the adapter.

        Raises:
            OutOfTimeError: If the deadline passes first. A checkpoint is saved.
        """
        trainer.add_callback(_Deadline(self.study))
        trainer.train(resume_from_checkpoint=any(self.folder.glob("checkpoint-*")))
        if trainer.state.global_step < self.study.scale.steps:
            raise OutOfTimeError
        trainer.save_model()
        return str(self.folder)


class _Deadline(TrainerCallback):
    """Save a checkpoint and stop training after the deadline."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if time.monotonic() > self._study.deadline:
            control.should_save = True
            control.should_training_stop = True
        return control
