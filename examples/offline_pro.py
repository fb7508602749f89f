# /// script
# dependencies = ["cyclealign-trl[peft]"]
# ///
"""Train a policy by PRO or RRHF on the preference pairs of HH-RLHF: the paper's baseline, without a ranker.

accelerate launch examples/offline_pro.py \
    --model_name_or_path Qwen/Qwen3-0.6B-Base \
    --subsets harmless-base helpful-base \
    --output_dir qwen-pro

Add `--loss_type rrhf` for RRHF, and `--hh_path path/to/hh-rlhf` to read a local copy of the dataset.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, TrlParser, get_peft_config

from cyclealign_trl import RankingConfig, RankingTrainer, load_hh_rlhf


@dataclass
class DataArguments:
    """Settings of the dataset."""

    subsets: list[str] | None = field(default=None, metadata={"help": "Subsets of HH-RLHF. Defaults to all four."})
    hh_path: str | None = field(
        default=None, metadata={"help": "Folder with a copy of HH-RLHF. Defaults to the dataset on the Hub."}
    )
    max_eval_pairs: int = field(default=500, metadata={"help": "Maximum number of held-out pairs to evaluate on."})


def main() -> None:
    """Parse the arguments, evaluate, train, evaluate again and save the policy."""
    parser = TrlParser((DataArguments, RankingConfig, ModelConfig))
    data_args, training_args, model_args = parser.parse_args_and_config()
    train, test = (load_hh_rlhf(data_args.subsets, split, data_args.hh_path) for split in ("train", "test"))
    trainer = RankingTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=train,
        eval_dataset=test.shuffle(seed=training_args.seed).select(range(min(data_args.max_eval_pairs, len(test)))),
        peft_config=get_peft_config(model_args),
    )
    trainer.accelerator.print(train.info.description)
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    after = trainer.evaluate()
    trainer.save_model()
    accuracies = (metrics["eval_ranking/accuracy"] for metrics in (before, after))
    trainer.accelerator.print("Held-out ranking accuracy: {:.3f} -> {:.3f}".format(*accuracies))
    trainer.end()


if __name__ == "__main__":
    main()
