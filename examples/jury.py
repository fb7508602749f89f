# /// script
# dependencies = ["cyclealign-trl[peft]"]
# ///
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

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import CycleAlignConfig, CycleAlignTrainer, JuryRanker, LLMRanker


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
    parser = TrlParser((ScriptArguments, CycleAlignConfig, ModelConfig, JudgeArguments))
    script_args, training_args, model_args, judge_args = parser.parse_args_and_config()
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = CycleAlignTrainer(
        model_args.model_name_or_path,
        make_ranker(judge_args.judges, judge_args.base_url),
        training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
