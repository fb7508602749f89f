"""Align a policy by CycleAlign with a jury: the merged rankings of several LLM judges.

# Set OPENAI_API_KEY first.
accelerate launch examples/jury.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --judges gpt-5-mini gpt-5-nano \
    --output_dir qwen-two-judges

# The same with the command line of the package.
cyclealign train \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --ranker_factory examples.jury.make_ranker \
    --ranker_kwargs '{"judges": ["gpt-5-mini", "gpt-5-nano"]}' \
    --output_dir qwen-two-judges
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, JuryRanker, LLMRanker
from cyclealign_trl.scripts.inputs import add_model_init_kwargs, load_splits


def make_ranker(judges: Sequence[str], base_url: str | None = None) -> JuryRanker:
    """Create a jury of several LLMs of one endpoint."""
    return JuryRanker([LLMRanker(name, base_url) for name in judges])


@dataclass
class JudgeArguments:
    """Settings of the ranker."""

    judges: list[str] = field(metadata={"help": "Names of the ranking LLMs at the endpoint."})
    base_url: str | None = field(default=None, metadata={"help": "Base URL of the endpoint. Defaults to OpenAI's."})


def main() -> None:
    """Parse the arguments, train and save the policy."""
    parser = TrlParser((ScriptArguments, JudgeArguments, CycleAlignConfig, ModelConfig, DatasetMixtureConfig))
    script_args, judge_args, training_args, model_args, mixture_args = parser.parse_args_and_config()
    train_dataset, eval_dataset = load_splits(script_args, mixture_args, training_args)
    add_model_init_kwargs(training_args, model_args)
    trainer = CycleAlignTrainer(
        model_args.model_name_or_path,
        make_ranker(judge_args.judges, judge_args.base_url),
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
