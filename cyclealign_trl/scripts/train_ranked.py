"""`cyclealign train-ranked`: train a policy on ranked completions or preference pairs by PRO or RRHF."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from ..offline.ranking_config import RankingConfig
from ..offline.ranking_trainer import RankingTrainer
from .arguments import CommandParser
from .inputs import add_model_init_kwargs, load_splits
from .launch import run_training, train_in_process


def make_parser() -> CommandParser:
    """Create the parser of the command."""
    return CommandParser(
        (ScriptArguments, RankingConfig, ModelConfig, DatasetMixtureConfig),
        prog="cyclealign train-ranked",
        description="Train a policy on ranked completions or preference pairs by PRO (arXiv 2306.17492) or RRHF "
        "(arXiv 2304.05302).",
    )


def make_trainer(
    script_args: ScriptArguments,
    training_args: RankingConfig,
    model_args: ModelConfig,
    mixture_args: DatasetMixtureConfig,
) -> RankingTrainer:
    """Create the trainer from the parsed arguments."""
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    add_model_init_kwargs(training_args, model_args)
    return RankingTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    run_training(__name__, make_parser(), make_trainer, argv)


if __name__ == "__main__":  # in each process that `accelerate launch` starts
    train_in_process(make_parser(), make_trainer, sys.argv[1:])
