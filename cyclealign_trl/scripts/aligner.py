"""`cyclealign aligner`: a model learns to correct the answers of others, on a data set of corrections."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from ..aligner.aligner_config import AlignerConfig
from ..aligner.aligner_trainer import AlignerTrainer
from ..aligner.corrections import to_corrections
from .arguments import CommandParser
from .inputs import add_model_arguments, load_splits
from .launch import start, work


def make_parser() -> CommandParser:
    """The command's arguments."""
    return CommandParser(
        (ScriptArguments, AlignerConfig, ModelConfig, DatasetMixtureConfig),
        prog="cyclealign aligner",
        description="Trains a model to correct the answers of others (Aligner, arXiv 2402.02416).",
    )


def make_trainer(
    script_args: ScriptArguments,
    training_args: AlignerConfig,
    model_args: ModelConfig,
    mixture_args: DatasetMixtureConfig,
) -> AlignerTrainer:
    """The trainer that the arguments describe."""
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    add_model_arguments(training_args, model_args)
    return AlignerTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=to_corrections(train_dataset),
        eval_dataset=None if eval_dataset is None else to_corrections(eval_dataset),
        peft_config=get_peft_config(model_args),
    )


def main(argv: Sequence[str]) -> None:
    """Trains as the arguments say."""
    start(__name__, make_parser(), make_trainer, argv)


if __name__ == "__main__":  # what `accelerate launch` runs
    work(make_parser(), make_trainer, sys.argv[1:])
