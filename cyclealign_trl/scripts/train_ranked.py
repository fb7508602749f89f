"""`cyclealign train-ranked`: offline PRO or RRHF, on a data set of ranked completions or preference pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from ..offline.ranking_config import RankingConfig
from ..offline.ranking_trainer import RankingTrainer
from .arguments import CommandParser
from .inputs import add_model_arguments, load_splits
from .launch import start, work


def make_parser() -> CommandParser:
    """The command's arguments."""
    return CommandParser(
        (ScriptArguments, RankingConfig, ModelConfig, DatasetMixtureConfig),
        prog="cyclealign train-ranked",
        description="Trains a policy on ranked completions by PRO (arXiv 2306.17492) or RRHF (arXiv 2304.05302).",
    )


def make_trainer(
    script_args: ScriptArguments,
    training_args: RankingConfig,
    model_args: ModelConfig,
    mixture_args: DatasetMixtureConfig,
) -> RankingTrainer:
    """The trainer that the arguments describe."""
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    add_model_arguments(training_args, model_args)
    return RankingTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )


def main(argv: Sequence[str]) -> None:
    """Trains as the arguments say."""
    start(__name__, make_parser(), make_trainer, argv)


if __name__ == "__main__":  # what `accelerate launch` runs
    work(make_parser(), make_trainer, sys.argv[1:])
