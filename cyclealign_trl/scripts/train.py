"""`cyclealign train`: the cycle, on a data set of prompts with a ranker."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from ..cycle.cyclealign_config import CycleAlignConfig
from ..cycle.cyclealign_trainer import CycleAlignTrainer
from .arguments import CommandParser, CorrectorArguments, RankerArguments
from .inputs import add_model_arguments, load_splits, make_corrector, make_ranker
from .launch import start, work

SECTIONS = (ScriptArguments, RankerArguments, CorrectorArguments, CycleAlignConfig, ModelConfig, DatasetMixtureConfig)


def make_parser() -> CommandParser:
    """The command's arguments."""
    return CommandParser(
        SECTIONS,
        prog="cyclealign train",
        description="Aligns a policy with a black-box ranker by CycleAlign (arXiv 2310.16271).",
    )


def make_trainer(
    script_args: ScriptArguments,
    ranker_args: RankerArguments,
    corrector_args: CorrectorArguments,
    training_args: CycleAlignConfig,
    model_args: ModelConfig,
    mixture_args: DatasetMixtureConfig,
) -> CycleAlignTrainer:
    """The trainer that the arguments describe."""
    ranker = make_ranker(ranker_args)
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    add_model_arguments(training_args, model_args)
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
    """Trains as the arguments say."""
    start(__name__, make_parser(), make_trainer, argv)


if __name__ == "__main__":  # what `accelerate launch` runs
    work(make_parser(), make_trainer, sys.argv[1:])
