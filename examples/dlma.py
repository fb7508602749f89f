"""Align a policy by DLMA: it writes a good and a bad completion per prompt, scores both, and trains on the pairs.

accelerate launch examples/dlma.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --output_dir qwen-dlma

No ranker is needed. An interrupted run continues from the pairs that it has written to `<output_dir>/pairs`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import ContrastivePrompts, DLMAConfig, DLMATrainer, generate_contrastive_pairs
from cyclealign_trl.scripts.inputs import add_model_init_kwargs, load_splits


@dataclass
class PairArguments:
    """Settings for making pairs."""

    num_prompts: int = field(default=1000, metadata={"help": "Number of prompts to make pairs from."})
    generation_batch_size: int = field(default=16, metadata={"help": "Number of prompts per generated batch."})


def main() -> None:
    """Parse the arguments, make pairs, train and save the policy."""
    parser = TrlParser((ScriptArguments, PairArguments, DLMAConfig, ModelConfig, DatasetMixtureConfig))
    script_args, pair_args, training_args, model_args, mixture_args = parser.parse_args_and_config()
    prompts, _ = load_splits(script_args, mixture_args, training_args)
    add_model_init_kwargs(training_args, model_args)
    pairs = generate_contrastive_pairs(
        model_args.model_name_or_path,
        prompts.select(range(min(pair_args.num_prompts, len(prompts)))),
        ContrastivePrompts(
            positive="a considerate reply that is honest about what it does not know",
            negative="a careless reply that makes things up",
        ),
        output_dir=Path(training_args.output_dir, "pairs"),
        batch_size=pair_args.generation_batch_size,
        max_prompt_length=training_args.max_prompt_length,
        max_completion_length=training_args.max_completion_length - 1,  # leaves room for the end-of-sequence token
        device=training_args.device,
        model_init_kwargs=training_args.model_init_kwargs,
    )
    trainer = DLMATrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=pairs,
        peft_config=get_peft_config(model_args),
    )
    trainer.accelerator.print(pairs.info.description)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
