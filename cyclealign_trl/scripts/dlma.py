"""`cyclealign dlma`: align a policy with its own scores of contrastive pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from .._compat import saving_on_this_process
from ..data.hh_rlhf import is_published, read_published
from ..dlma.contrastive_pairs import generate_contrastive_pairs
from ..dlma.dlma_config import DLMAConfig
from ..dlma.dlma_trainer import DLMATrainer
from ..errors import CheckpointError
from ..models.chat_templates import set_chat_template
from ..models.loading import dict_field, load_tokenizer
from ..rankers.contrastive_prompts import ContrastivePrompts
from ..training.resumption import newest_checkpoint
from .arguments import CommandParser
from .inputs import add_model_init_kwargs, load_splits
from .launch import run_training, train_in_process


@dataclass
class PairArguments:
    """Settings for making pairs from a dataset of prompts. They have no effect on a dataset of pairs."""

    contrastive: str = field(
        default="harmless",
        metadata={
            "help": 'Built-in descriptions of a good and a bad completion: "harmless" or "helpful". Ignored if '
            "positive and negative are set."
        },
    )
    positive: str | None = field(
        default=None,
        metadata={"help": 'Description of a good completion, as a noun phrase such as "a kind reply".'},
    )
    negative: str | None = field(default=None, metadata={"help": "Description of a bad completion."})
    placement: Literal["reply", "system"] = field(
        default="reply",
        metadata={"help": 'Place of the description: close to the "reply", or in the "system" message.'},
    )
    num_iterations: int = field(
        default=1,
        metadata={"help": "Number of iterations. Each makes pairs with the current policy and trains on them."},
    )
    generation_batch_size: int = field(default=16, metadata={"help": "Number of prompts per generated batch."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature for the pairs."})

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {self.num_iterations}.")

    @property
    def contrastive_prompts(self) -> ContrastivePrompts:
        """Contrastive prompts made from `positive` and `negative`, or from `contrastive` if both are unset.

        Raises:
            ValueError: If only one of `positive` and `negative` is set, or `contrastive` is unknown.
        """
        if self.positive is not None and self.negative is not None:
            return ContrastivePrompts(self.positive, self.negative, self.placement)
        if self.positive is not None or self.negative is not None:
            raise ValueError("--positive and --negative must be set together.")
        built_in = ContrastivePrompts.of(self.contrastive)
        return ContrastivePrompts(built_in.positive, built_in.negative, self.placement)


def make_parser() -> CommandParser:
    """Create the parser of the command."""
    return CommandParser(
        (ScriptArguments, PairArguments, DLMAConfig, ModelConfig, DatasetMixtureConfig),
        prog="cyclealign dlma",
        description="Align a policy with its own scores of contrastive pairs, by margin DPO (DLMA, arXiv 2402.11907).",
    )


def make_trainer(
    script_args: ScriptArguments,
    pair_args: PairArguments,
    training_args: DLMAConfig,
    model_args: ModelConfig,
    mixture_args: DatasetMixtureConfig,
) -> DLMATrainer:
    """Run all iterations but the last one, and create the trainer of the last one from the parsed arguments."""
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    add_model_init_kwargs(training_args, model_args)
    splits = {"train": train_dataset, **({} if eval_dataset is None else {"test": eval_dataset})}
    if training_args.margin_weight and is_published(train_dataset):  # its pairs have no self-rewards
        splits = _read_prompts(splits, training_args, model_args)
    columns = splits["train"].column_names
    if "prompt" in columns and "chosen" not in columns:
        return _run_iterations(splits, pair_args, training_args, model_args)
    if pair_args.num_iterations > 1:
        raise ValueError(
            f"num_iterations={pair_args.num_iterations} needs a dataset of prompts to make new pairs in each "
            "iteration, but this dataset has pairs. Leave num_iterations out."
        )
    return _make_trainer(model_args.model_name_or_path, splits, training_args, model_args)


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    run_training(__name__, make_parser(), make_trainer, argv)


def _read_prompts(
    splits: dict[str, Dataset], training_args: DLMAConfig, model_args: ModelConfig
) -> dict[str, Dataset]:
    """Return the prompts of dialogues of HH-RLHF, as messages if the model has a chat template."""
    tokenizer = load_tokenizer(None, model_args.model_name_or_path, dict_field(training_args.model_init_kwargs))
    conversational = tokenizer.chat_template is not None or training_args.chat_template is not None
    prompts = {name: read_published(dataset, "prompt-only", conversational) for name, dataset in splits.items()}
    if training_args.process_index == 0:
        for name, dataset in prompts.items():
            print(f"Prompts of HH-RLHF, {name}: {dataset.info.description}")
    return prompts


def _run_iterations(
    prompts: dict[str, Dataset], pair_args: PairArguments, training_args: DLMAConfig, model_args: ModelConfig
) -> DLMATrainer:
    """Make pairs and train, each time from the model of the previous iteration; return the untrained last trainer."""
    output_dir = Path(training_args.output_dir)
    resuming = str(training_args.resume_from_checkpoint).lower() == "true"
    model: str = model_args.model_name_or_path
    for iteration in range(1, pair_args.num_iterations):
        folder = output_dir / f"iteration-{iteration}"
        trained_model = folder / "model"
        # On all machines, which can have an output directory each.
        if not (resuming and all(gather_object([(trained_model / "config.json").exists()]))):
            args = replace(training_args, output_dir=str(folder), push_to_hub=False)  # type: ignore[call-arg]
            trainer = _make_trainer(model, _make_pairs(model, prompts, pair_args, args), args, model_args)
            trainer.train(resume_from_checkpoint=resuming and _has_checkpoint(folder))
            _save_merged(trainer, trained_model)
        model = str(trained_model)
        # A new copy resets accelerate's state of this process, because DeepSpeed accepts one trainer per state.
        training_args = replace(training_args)
    if resuming and not _has_checkpoint(output_dir):  # interrupted before the first checkpoint of the last iteration
        training_args.resume_from_checkpoint = None
    return _make_trainer(model, _make_pairs(model, prompts, pair_args, training_args), training_args, model_args)


def _make_pairs(
    model: str, prompts: dict[str, Dataset], pair_args: PairArguments, args: DLMAConfig
) -> dict[str, Dataset]:
    """Make pairs for each split, or read finished batches of pairs from the output directory."""
    init_kwargs = dict_field(args.model_init_kwargs)
    tokenizer = load_tokenizer(None, model, init_kwargs)
    template_kwargs = dict_field(args.chat_template_kwargs)
    if args.chat_template is not None:
        # The folder of the pairs then records the template.
        template_kwargs["chat_template"] = set_chat_template(tokenizer, args.chat_template)
    pairs = {}
    for split, dataset in prompts.items():
        pairs[split] = generate_contrastive_pairs(
            model,
            dataset,
            pair_args.contrastive_prompts,
            tokenizer,
            output_dir=Path(args.output_dir, "pairs", split),
            batch_size=pair_args.generation_batch_size,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length - 1,  # leaves room for the end-of-sequence token
            temperature=pair_args.temperature,
            chat_template_kwargs=template_kwargs,
            seed=args.seed,
            device=args.device,
            model_init_kwargs=init_kwargs,
        )
        if args.process_index == 0:
            print(f"Pairs of {split}: {pairs[split].info.description}")
    return pairs


def _make_trainer(
    model: str, splits: dict[str, Dataset], training_args: DLMAConfig, model_args: ModelConfig
) -> DLMATrainer:
    return DLMATrainer(
        model,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("test"),
        peft_config=get_peft_config(model_args),
    )


def _save_merged(trainer: DLMATrainer, folder: Path) -> None:
    """Save the model for the next iteration, with an adapter merged into its weights."""
    if is_peft_model(trainer.model):
        if trainer.args.should_save:
            model = trainer.model.merge_and_unload()
            with saving_on_this_process(model):
                model.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
        trainer.accelerator.wait_for_everyone()
    else:
        trainer.save_model(str(folder))


def _has_checkpoint(folder: Path) -> bool:
    try:
        return bool(newest_checkpoint(folder, PartialState().process_index))
    except CheckpointError:
        return False


if __name__ == "__main__":  # in each process that `accelerate launch` starts
    train_in_process(make_parser(), make_trainer, sys.argv[1:])
