"""`cyclealign aligner`: train a model to correct the answers of other models."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from ..aligner.aligner_config import AlignerConfig
from ..aligner.aligner_trainer import AlignerTrainer
from ..aligner.corrections import to_corrections
from .arguments import CommandParser
from .inputs import add_model_init_kwargs, load_splits
from .launch import run_training, train_in_process


def make_parser() -> CommandParser:
    """Create the parser of the command."""
    return CommandParser(
        (ScriptArguments, AlignerConfig, ModelConfig, DatasetMixtureConfig),
        prog="cyclealign aligner",
        description="Train a model to correct the answers of other models (Aligner, arXiv 2402.02416).",
    )


def make_trainer(
    script_args: ScriptArguments,
    training_args: AlignerConfig,
    model_args: ModelConfig,
    mixture_args: DatasetMixtureConfig,
) -> AlignerTrainer:
    """Create the trainer from the parsed arguments."""
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    add_model_init_kwargs(training_args, model_args)
    return AlignerTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=to_corrections(train_dataset),
        eval_dataset=None if eval_dataset is None else to_corrections(eval_dataset),
        peft_config=get_peft_config(model_args),
    )


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    run_training(__name__, make_parser(), make_trainer, argv)


if __name__ == "__main__":  # in each process that `accelerate launch` starts
    train_in_process(make_parser(), make_trainer, sys.argv[1:])
