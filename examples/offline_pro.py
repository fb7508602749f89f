"""Train a policy by PRO or RRHF on preference pairs, without a ranker, and compare its accuracy before and after.

# The paper's baseline: a subset of HH-RLHF
accelerate launch examples/offline_pro.py \
    --model_name_or_path Qwen/Qwen3-0.6B-Base \
    --dataset_name Anthropic/hh-rlhf \
    --dataset_config harmless-base \
    --eval_strategy epoch \
    --output_dir qwen-pro

Add `--loss_type rrhf` for RRHF. `--dataset_name` also takes a folder or a file of pairs or ranked completions.
"""

from dataclasses import dataclass, field

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import RankingConfig, RankingTrainer
from cyclealign_trl.scripts.inputs import add_model_init_kwargs, load_splits


@dataclass
class EvaluationArguments:
    """Settings of the evaluation, which needs `--eval_strategy`."""

    max_eval_pairs: int = field(default=500, metadata={"help": "Maximum number of held-out pairs to evaluate on."})


def main() -> None:
    """Parse the arguments, evaluate, train, evaluate again and save the policy."""
    parser = TrlParser((ScriptArguments, EvaluationArguments, RankingConfig, ModelConfig, DatasetMixtureConfig))
    script_args, eval_args, training_args, model_args, mixture_args = parser.parse_args_and_config()
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    if eval_dataset is not None:
        number = min(eval_args.max_eval_pairs, len(eval_dataset))
        eval_dataset = eval_dataset.shuffle(seed=training_args.seed).select(range(number))
    add_model_init_kwargs(training_args, model_args)
    trainer = RankingTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    before = None if eval_dataset is None else trainer.evaluate()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if before is not None:
        accuracies = (metrics["eval_ranking/accuracy"] for metrics in (before, trainer.evaluate()))
        trainer.accelerator.print("Held-out ranking accuracy: {:.3f} -> {:.3f}".format(*accuracies))
    trainer.end()


if __name__ == "__main__":
    main()
