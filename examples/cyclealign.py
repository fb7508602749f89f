# /// script
# dependencies = ["cyclealign-trl[peft]"]
# ///
"""Align a policy by CycleAlign, with an LLM behind an OpenAI-compatible API as the ranker.

# OpenAI's API. Set OPENAI_API_KEY first.
accelerate launch examples/cyclealign.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --ranker_model gpt-5-mini \
    --output_dir qwen-cyclealign

# A LoRA adapter, and a ranker served by vLLM (vllm serve Qwen/Qwen3-32B).
accelerate launch examples/cyclealign.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --use_peft \
    --ranker_model Qwen/Qwen3-32B \
    --ranker_base_url http://localhost:8000/v1 \
    --output_dir qwen-cyclealign

# Four GPUs, with a configuration of accelerate or of DeepSpeed.
accelerate launch --config_file examples/accelerate_configs/zero2.yaml --num_processes 4 examples/cyclealign.py ...
accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml --num_processes 4 examples/cyclealign.py \
    --deepspeed examples/deepspeed/zero2.json ...
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, LLMRanker


@dataclass
class RankerArguments:
    """Settings of the ranker."""

    ranker_model: str = field(metadata={"help": "Name of the ranking LLM at its endpoint."})
    ranker_base_url: str | None = field(
        default=None, metadata={"help": "Base URL of the endpoint. Defaults to OpenAI's."}
    )
    ranker_criteria: str | None = field(
        default=None, metadata={"help": "Description of what makes a completion better."}
    )
    ranker_max_concurrency: int = field(default=32, metadata={"help": "Maximum number of concurrent rankings."})
    ranker_timeout: float = field(default=60.0, metadata={"help": "Timeout of a ranking in seconds."})


def main() -> None:
    """Parse the arguments, train and save the policy."""
    parser = TrlParser((ScriptArguments, CycleAlignConfig, ModelConfig, RankerArguments))
    script_args, training_args, model_args, ranker_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = CycleAlignTrainer(
        model_args.model_name_or_path,
        LLMRanker(
            ranker_args.ranker_model,
            ranker_args.ranker_base_url,
            criteria=ranker_args.ranker_criteria,
            max_concurrency=ranker_args.ranker_max_concurrency,
            timeout=ranker_args.ranker_timeout,
        ),
        training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main()
