# /// script
# dependencies = ["cyclealign-trl[peft]"]
# ///
"""The cycle with a reward model as the black box, on prompts drawn from HH-RLHF as in the paper.

    accelerate launch examples/reward_model_ranker.py \
        --model_name_or_path Qwen/Qwen3-0.6B --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B \
        --num_prompts 1000 --output_dir qwen-reward-model

A reward model offers no improved completion: the SFT target is the completion that it ranks first.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, TrlParser, get_peft_config

from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, RewardModelRanker, load_hh_rlhf, sample_prompts


@dataclass
class RewardModelArguments:
    """Who ranks, and what."""

    reward_model: str = field(metadata={"help": "A sequence classifier with one output."})
    reward_batch_size: int = field(default=16, metadata={"help": "Texts scored at once."})
    reward_dtype: str = field(default="bfloat16", metadata={"help": "What it is loaded in."})
    num_prompts: int = field(default=1000, metadata={"help": "Prompts, in equal parts from the four subsets."})
    hh_path: str | None = field(default=None, metadata={"help": "A local copy of HH-RLHF. Default: the Hub's."})


def main() -> None:
    """Reads the arguments, trains, saves."""
    parser = TrlParser((RewardModelArguments, CycleAlignConfig, ModelConfig))
    reward_args, training_args, model_args = parser.parse_args_and_config()
    prompts = load_hh_rlhf(split="train", path=reward_args.hh_path, dataset_type="prompt-only")
    trainer = CycleAlignTrainer(
        model_args.model_name_or_path,
        RewardModelRanker(
            reward_args.reward_model,
            batch_size=reward_args.reward_batch_size,
            device="cpu" if training_args.use_cpu else None,
            model_init_kwargs={"dtype": reward_args.reward_dtype},
        ),
        training_args,
        train_dataset=sample_prompts(prompts, reward_args.num_prompts, seed=training_args.seed),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
