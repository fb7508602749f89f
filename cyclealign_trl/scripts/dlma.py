"""`cyclealign dlma`: a policy aligned with its own opinion, from prompts alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from accelerate.utils import is_peft_model
from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from ..dlma.contrastive_pairs import generate_contrastive_pairs
from ..dlma.dlma_config import DLMAConfig
from ..dlma.dlma_trainer import DLMATrainer
from ..errors import CheckpointError
from ..models.loading import dict_field
from ..rankers.contrastive_prompts import ContrastivePrompts
from ..training.checkpoints import last_complete_checkpoint
from .arguments import CommandParser
from .inputs import add_model_arguments, load_splits
from .launch import start, work


@dataclass
class PairArguments:
    """How pairs are made of a data set of prompts. A data set of pairs with `self_reward` is trained on as it is."""

    contrastive: str = field(
        default="harmless",
        metadata={
            "help": "What a good and a bad reply are: harmless or helpful, unless positive and negative say so."
        },
    )
    positive: str | None = field(
        default=None, metadata={"help": "Describes a good reply, as a noun phrase: a kind reply."}
    )
    negative: str | None = field(default=None, metadata={"help": "Describes a bad reply."})
    placement: Literal["reply", "system"] = field(
        default="reply", metadata={"help": "Whether the description stands next to the reply or in a system message."}
    )
    num_iterations: int = field(
        default=1,
        metadata={"help": "Rounds of making pairs with the policy as it is and training on them."},
    )
    generation_batch_size: int = field(default=16, metadata={"help": "Prompts at once when pairs are made."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the pairs."})

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {self.num_iterations}.")

    @property
    def prompts(self) -> ContrastivePrompts:
        """The contrastive prompts."""
        if self.positive is not None and self.negative is not None:
            return ContrastivePrompts(self.positive, self.negative, self.placement)
        if self.positive is not None or self.negative is not None:
            raise ValueError("--positive and --negative go together: one alone contrasts nothing.")
        named = ContrastivePrompts.of(self.contrastive)
        return ContrastivePrompts(named.positive, named.negative, self.placement)


def make_parser() -> CommandParser:
    """The command's arguments."""
    return CommandParser(
        (ScriptArguments, PairArguments, DLMAConfig, ModelConfig, DatasetMixtureConfig),
        prog="cyclealign dlma",
        description="Aligns a policy by self-rewarding contrastive prompts and margin DPO (DLMA, arXiv 2402.11907).",
    )


def make_trainer(
    script_args: ScriptArguments,
    pair_args: PairArguments,
    training_args: DLMAConfig,
    model_args: ModelConfig,
    mixture_args: DatasetMixtureConfig,
) -> DLMATrainer:
    """The trainer of the last iteration, after those before it have been run to their ends."""
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    add_model_arguments(training_args, model_args)
    splits = {"train": train_dataset, **({} if eval_dataset is None else {"test": eval_dataset})}
    if "prompt" in train_dataset.column_names and "chosen" not in train_dataset.column_names:
        return _iterate(splits, pair_args, training_args, model_args)
    if pair_args.num_iterations > 1:
        raise ValueError("num_iterations takes a data set of prompts to make new pairs of; this one has pairs.")
    return _trainer(model_args.model_name_or_path, splits, training_args, model_args)


def main(argv: Sequence[str]) -> None:
    """Trains as the arguments say."""
    start(__name__, make_parser(), make_trainer, argv)


def _iterate(
    prompts: dict[str, Dataset], pair_args: PairArguments, training_args: DLMAConfig, model_args: ModelConfig
) -> DLMATrainer:
    """Makes pairs and trains, each time from the model of the iteration before."""
    output_dir = Path(training_args.output_dir)
    resuming = str(training_args.resume_from_checkpoint).lower() == "true"
    model: str = model_args.model_name_or_path
    for iteration in range(1, pair_args.num_iterations):
        folder = output_dir / f"iteration-{iteration}"
        finished = folder / "model"
        if not (resuming and (finished / "config.json").exists()):
            args = replace(training_args, output_dir=str(folder), push_to_hub=False)  # type: ignore[call-arg]
            trainer = _trainer(model, _make_pairs(model, prompts, pair_args, args), args, model_args)
            trainer.train(resume_from_checkpoint=resuming and _has_checkpoint(folder))
            _save_whole(trainer, finished)
        model = str(finished)
        # Made anew, they start anew what accelerate knows of this process: DeepSpeed takes one trainer per start.
        training_args = replace(training_args)
    if resuming and not _has_checkpoint(output_dir):  # interrupted before the last iteration had one
        training_args.resume_from_checkpoint = None
    return _trainer(model, _make_pairs(model, prompts, pair_args, training_args), training_args, model_args)


def _make_pairs(
    model: str, prompts: dict[str, Dataset], pair_args: PairArguments, args: DLMAConfig
) -> dict[str, Dataset]:
    """Pairs for each split, whose batches lie in the output directory."""
    pairs = {}
    for split, dataset in prompts.items():
        pairs[split] = generate_contrastive_pairs(
            model,
            dataset,
            pair_args.prompts,
            output_dir=Path(args.output_dir, "pairs", split),
            batch_size=pair_args.generation_batch_size,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length - 1,  # its end-of-sequence token is trained on, too
            temperature=pair_args.temperature,
            chat_template_kwargs=dict_field(args.chat_template_kwargs),
            seed=args.seed,
            device=args.device,
            model_init_kwargs=dict_field(args.model_init_kwargs),
        )
        if args.process_index == 0:
            print(f"Pairs of {split}: {pairs[split].info.description}")
    return pairs


def _trainer(
    model: str, splits: dict[str, Dataset], training_args: DLMAConfig, model_args: ModelConfig
) -> DLMATrainer:
    return DLMATrainer(
        model,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("test"),
        peft_config=get_peft_config(model_args),
    )


def _save_whole(trainer: DLMATrainer, folder: Path) -> None:
    """Saves the model that the next iteration starts from: an adapter goes into its weights."""
    if is_peft_model(trainer.model):
        if trainer.is_world_process_zero():
            trainer.model.merge_and_unload().save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
        trainer.accelerator.wait_for_everyone()
    else:
        trainer.save_model(str(folder))


def _has_checkpoint(folder: Path) -> bool:
    try:
        return bool(last_complete_checkpoint(folder))
    except CheckpointError:
        return False


if __name__ == "__main__":  # what `accelerate launch` runs
    work(make_parser(), make_trainer, sys.argv[1:])
