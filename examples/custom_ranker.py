"""Align a policy by CycleAlign with a ranker of your own, which merges the rankings of several LLM judges.

# Set OPENAI_API_KEY first.
accelerate launch examples/custom_ranker.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --judges gpt-5-mini gpt-5-nano \
    --output_dir qwen-two-judges

# The same with the command line of the package.
cyclealign train \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback-prompt \
    --ranker_factory examples.custom_ranker.make_ranker \
    --ranker_kwargs '{"judges": ["gpt-5-mini", "gpt-5-nano"]}' \
    --output_dir qwen-two-judges
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import (
    CycleAlignConfig,
    CycleAlignTrainer,
    LLMRanker,
    Ranker,
    RankingFailure,
    RankingRequest,
    RankingResult,
    ranks_from_scores,
)
from cyclealign_trl.scripts.inputs import add_model_init_kwargs, load_splits


class BordaRanker:
    """Rank completions by the sum of their ranks from several rankers (Borda count). Equal sums are ties.

    A request fails if one of the rankers fails. The improved completion is the one of the first ranker.

    Args:
        *rankers: Rankers to merge.
    """

    def __init__(self, *rankers: Ranker) -> None:
        self.rankers = rankers

    def rank(self, requests: Sequence[RankingRequest]) -> list[RankingResult | RankingFailure]:
        """Rank each request with every ranker and merge the results."""
        outcomes = zip(*(ranker.rank(requests) for ranker in self.rankers), strict=True)
        return [self._merge(outcomes_of_request) for outcomes_of_request in outcomes]

    def _merge(self, outcomes: Sequence[RankingResult | RankingFailure]) -> RankingResult | RankingFailure:
        results = [outcome for outcome in outcomes if isinstance(outcome, RankingResult)]
        if len(results) < len(outcomes):
            return next(outcome for outcome in outcomes if isinstance(outcome, RankingFailure))
        points = [-sum(ranks) for ranks in zip(*(result.resolved_ranks for result in results), strict=True)]
        ranks = ranks_from_scores(points)
        order = tuple(sorted(range(len(ranks)), key=ranks.__getitem__))
        return RankingResult(order, ranks, improved_completion=results[0].improved_completion)


def make_ranker(judges: Sequence[str], base_url: str | None = None) -> BordaRanker:
    """Create a ranker that merges the rankings of several LLMs of one endpoint."""
    return BordaRanker(*(LLMRanker(name, base_url) for name in judges))


@dataclass
class JudgeArguments:
    """Settings of the ranker."""

    judges: list[str] = field(metadata={"help": "Names of the ranking LLMs at the endpoint."})
    base_url: str | None = field(default=None, metadata={"help": "Base URL of the endpoint. Defaults to OpenAI's."})


def main() -> None:
    """Parse the arguments, train and save the policy."""
    parser = TrlParser((ScriptArguments, JudgeArguments, CycleAlignConfig, ModelConfig, DatasetMixtureConfig))
    script_args, judge_args, training_args, model_args, mixture_args = parser.parse_args_and_config()
    train_dataset, _ = load_splits(script_args, mixture_args, training_args)
    add_model_init_kwargs(training_args, model_args)
    trainer = CycleAlignTrainer(
        model_args.model_name_or_path,
        make_ranker(judge_args.judges, judge_args.base_url),
        training_args,
        train_dataset=train_dataset,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.end()


if __name__ == "__main__":
    main()
