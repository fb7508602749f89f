# /// script
# dependencies = ["cyclealign-trl[peft]"]
# ///
"""A ranker of your own: two judges whose orders are merged, so that neither one's taste decides alone.

    accelerate launch examples/custom_ranker.py \
        --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback-prompt \
        --judges gpt-5-mini gpt-5-nano --output_dir qwen-two-judges

The same with the package's own command:

    cyclealign train --ranker_factory examples.custom_ranker.make_ranker \
        --ranker_kwargs '{"judges": ["gpt-5-mini", "gpt-5-nano"]}' \
        --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback-prompt --output_dir qwen-two-judges
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from cyclealign_trl import (
    CycleAlignConfig,
    CycleAlignTrainer,
    LLMRanker,
    Ranker,
    RankingFailure,
    RankingRequest,
    RankingResult,
)
from cyclealign_trl.types import ranks_from_scores


class BordaRanker:
    """Merges the orders of several rankers by the sum of their ranks (Borda's count); equal sums are ties.

    A request fails where any of them fails: half a verdict is no verdict. The improved completion is the first
    ranker's.

    Args:
        *rankers: The rankers to merge.
    """

    def __init__(self, *rankers: Ranker) -> None:
        self.rankers = rankers

    def rank(self, requests: Sequence[RankingRequest]) -> list[RankingResult | RankingFailure]:
        """Ranks each request with every ranker."""
        verdicts = zip(*(ranker.rank(requests) for ranker in self.rankers), strict=True)
        return [self._merge(answers) for answers in verdicts]

    def _merge(self, answers: Sequence[RankingResult | RankingFailure]) -> RankingResult | RankingFailure:
        results = [answer for answer in answers if isinstance(answer, RankingResult)]
        if len(results) < len(answers):
            return next(answer for answer in answers if isinstance(answer, RankingFailure))
        points = [-sum(ranks) for ranks in zip(*(result.resolved_ranks for result in results), strict=True)]
        ranks = ranks_from_scores(points)
        order = tuple(sorted(range(len(ranks)), key=ranks.__getitem__))
        return RankingResult(order, ranks, improved_completion=results[0].improved_completion)


def make_ranker(judges: Sequence[str], base_url: str | None = None) -> BordaRanker:
    """Several LLMs of one endpoint as one ranker."""
    return BordaRanker(*(LLMRanker(name, base_url) for name in judges))


@dataclass
class JudgeArguments:
    """Who ranks."""

    judges: list[str] = field(metadata={"help": "Names of the ranking models at the endpoint."})
    base_url: str | None = field(default=None, metadata={"help": "The endpoint. Default: OpenAI's."})


def main() -> None:
    """Reads the arguments, trains, saves."""
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
