"""Align a policy by CycleAlign: what `cyclealign train` does, as a script to edit. It takes the same arguments.

# OpenAI's API. Set OPENAI_API_KEY first.
accelerate launch examples/cyclealign.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --ranker_model gpt-5-mini \
    --output_dir qwen-cyclealign

# A LoRA adapter, prompts in a file, and a ranker served by vLLM (vllm serve Qwen/Qwen3-32B).
accelerate launch examples/cyclealign.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name prompts.jsonl \
    --use_peft \
    --ranker_model Qwen/Qwen3-32B \
    --ranker_base_url http://localhost:8000/v1 \
    --ranker_kwargs '{"criteria": "helpful first of all", "max_concurrency": 64}' \
    --output_dir qwen-cyclealign

# Four GPUs, with a configuration of accelerate or of DeepSpeed.
accelerate launch --config_file examples/accelerate_configs/zero2.yaml --num_processes 4 examples/cyclealign.py ...
accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml --num_processes 4 examples/cyclealign.py \
    --deepspeed examples/deepspeed/zero2.json ...
"""

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer
from cyclealign_trl.scripts.arguments import RankerArguments
from cyclealign_trl.scripts.inputs import add_model_init_kwargs, load_splits, make_ranker


def main() -> None:
    """Parse the arguments, train and save the policy."""
    parser = TrlParser((ScriptArguments, RankerArguments, CycleAlignConfig, ModelConfig, DatasetMixtureConfig))
    script_args, ranker_args, training_args, model_args, mixture_args = parser.parse_args_and_config()
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    add_model_init_kwargs(training_args, model_args)
    trainer = CycleAlignTrainer(
        model_args.model_name_or_path,
        make_ranker(ranker_args),
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
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
