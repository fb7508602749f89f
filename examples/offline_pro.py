# /// script
# dependencies = ["cyclealign-trl[peft]"]
# ///
"""The paper's baseline: PRO (or RRHF, with --loss_type rrhf) on the preferences of HH-RLHF, no ranker at all.

    accelerate launch examples/offline_pro.py \
        --model_name_or_path Qwen/Qwen3-0.6B-Base --subsets harmless-base helpful-base --output_dir qwen-pro

With a local copy of the data set: --hh_path path/to/hh-rlhf
"""

from dataclasses import dataclass, field

from trl import ModelConfig, TrlParser, get_peft_config

from cyclealign_trl import RankingConfig, RankingTrainer, load_hh_rlhf


@dataclass
class DataArguments:
    """What is trained on."""

    subsets: list[str] | None = field(default=None, metadata={"help": "Subsets of HH-RLHF. Default: all four."})
    hh_path: str | None = field(default=None, metadata={"help": "A local copy. Default: the Hub's."})
    max_eval_pairs: int = field(default=500, metadata={"help": "Held-out pairs to evaluate on."})


def main() -> None:
    """Reads the arguments, evaluates, trains, evaluates, saves."""
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
