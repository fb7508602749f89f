"""Align a policy by CycleAlign, with a reward model as the ranker, on prompts of HH-RLHF as in the paper.

accelerate launch examples/reward_model_ranker.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B \
    --dataset_name Anthropic/hh-rlhf \
    --dataset_config harmless-base \
    --num_prompts 1000 \
    --output_dir qwen-reward-model

A reward model writes no improved completions, so the SFT target is the completion that it ranks first. Policy and
reward model share the GPU.
"""

from dataclasses import dataclass, field

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, RewardModelRanker
from cyclealign_trl.scripts.inputs import add_model_init_kwargs, load_splits


@dataclass
class RewardModelArguments:
    """Settings of the reward model and of the prompts."""

    reward_model: str = field(metadata={"help": "Name or path of a sequence classifier with one output."})
    reward_batch_size: int = field(default=16, metadata={"help": "Number of texts per scored batch."})
    reward_dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the weights of the reward model."})
    num_prompts: int = field(default=1000, metadata={"help": "Number of prompts, drawn at random."})


def main() -> None:
    """Parse the arguments, train and save the policy."""
    parser = TrlParser((ScriptArguments, RewardModelArguments, CycleAlignConfig, ModelConfig, DatasetMixtureConfig))
    script_args, reward_args, training_args, model_args, mixture_args = parser.parse_args_and_config()
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    number = min(reward_args.num_prompts, len(train_dataset))
    add_model_init_kwargs(training_args, model_args)
    trainer = CycleAlignTrainer(
        model_args.model_name_or_path,
        RewardModelRanker(
            reward_args.reward_model,
            batch_size=reward_args.reward_batch_size,
            device="cpu" if training_args.use_cpu else None,
            model_init_kwargs={"dtype": reward_args.reward_dtype},
        ),
        training_args,
        train_dataset=train_dataset.shuffle(seed=training_args.seed).select(range(number)),
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
