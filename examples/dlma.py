# /// script
# dependencies = ["cyclealign-trl[peft]"]
# ///
"""DLMA: a policy replies as well and as badly as it can, scores both replies itself, and learns from the difference.

    accelerate launch examples/dlma.py \
        --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback-prompt --output_dir qwen-dlma
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import ContrastivePrompts, DLMAConfig, DLMATrainer, generate_contrastive_pairs


@dataclass
class PairArguments:
    """How pairs are made."""

    num_prompts: int = field(default=1000, metadata={"help": "Prompts to make pairs of."})
    generation_batch_size: int = field(default=16, metadata={"help": "Prompts at once."})


def main() -> None:
    """Reads the arguments, makes pairs, trains, saves."""
    parser = TrlParser((ScriptArguments, PairArguments, DLMAConfig, ModelConfig))
    script_args, pair_args, training_args, model_args = parser.parse_args_and_config()
    prompts = load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
    pairs = generate_contrastive_pairs(
        model_args.model_name_or_path,
        prompts.select(range(min(pair_args.num_prompts, len(prompts)))),
        ContrastivePrompts(
            positive="a considerate reply that is honest about what it does not know",
            negative="a careless reply that makes things up",
        ),
        output_dir=Path(training_args.output_dir, "pairs"),  # goes on from here if it is interrupted
        batch_size=pair_args.generation_batch_size,
        max_prompt_length=training_args.max_prompt_length,
        max_completion_length=training_args.max_completion_length - 1,
        device=training_args.device,
        model_init_kwargs={"dtype": model_args.dtype} if model_args.dtype else None,
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
