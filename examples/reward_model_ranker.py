# /// script
# dependencies = ["cyclealign-trl[peft]"]
# ///
"""Align a policy by CycleAlign, with a reward model as the ranker, on prompts of HH-RLHF as in the paper.

accelerate launch examples/reward_model_ranker.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B \
    --num_prompts 1000 \
    --output_dir qwen-reward-model

A reward model writes no improved completions, so the SFT target is the completion that it ranks first. Policy and
reward model share the GPU.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, TrlParser, get_peft_config

from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, RewardModelRanker, load_hh_rlhf, sample_prompts


@dataclass
class RewardModelArguments:
    """Settings of the reward model and of the prompts."""

    reward_model: str = field(metadata={"help": "Name or path of a sequence classifier with one output."})
    reward_batch_size: int = field(default=16, metadata={"help": "Number of texts per scored batch."})
    reward_dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the weights of the reward model."})
    num_prompts: int = field(
        default=1000, metadata={"help": "Number of prompts, in equal parts from the four subsets of HH-RLHF."}
    )
    hh_path: str | None = field(
        default=None, metadata={"help": "Folder with a copy of HH-RLHF. Defaults to the dataset on the Hub."}
    )


def main() -> None:
    """Parse the arguments, train and save the policy."""
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
