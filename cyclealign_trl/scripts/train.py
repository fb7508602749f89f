"""`cyclealign train`: align a policy by CycleAlign."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from ..cycle.cyclealign_config import CycleAlignConfig
from ..cycle.cyclealign_trainer import CycleAlignTrainer
from .arguments import CommandParser, CorrectorArguments, RankerArguments
from .inputs import add_model_init_kwargs, load_splits, make_corrector, make_ranker
from .launch import run_training, train_in_process

DATACLASSES = (
    ScriptArguments,
    RankerArguments,
    CorrectorArguments,
    CycleAlignConfig,
    ModelConfig,
    DatasetMixtureConfig,
)


def make_parser() -> CommandParser:
    """Create the parser of the command."""
    return CommandParser(
        DATACLASSES,
        prog="cyclealign train",
        description="Align a policy with the feedback of a black-box ranker by CycleAlign (arXiv 2310.16271).",
    )


def make_trainer(
    script_args: ScriptArguments,
    ranker_args: RankerArguments,
    corrector_args: CorrectorArguments,
    training_args: CycleAlignConfig,
    model_args: ModelConfig,
    mixture_args: DatasetMixtureConfig,
) -> CycleAlignTrainer:
    """Create the trainer from the parsed arguments."""
    ranker = make_ranker(ranker_args)
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    add_model_init_kwargs(training_args, model_args)
    return CycleAlignTrainer(
        model_args.model_name_or_path,
        ranker,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        corrector=make_corrector(corrector_args, training_args),
    )


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    run_training(__name__, make_parser(), make_trainer, argv)


if __name__ == "__main__":  # in each process that `accelerate launch` starts
    train_in_process(make_parser(), make_trainer, sys.argv[1:])
