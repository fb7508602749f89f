"""Compare two models by a judge's verdicts on their replies."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ..aligner.upstreams import Upstream
from ..rankers.base import Ranker, ranker_name
from .comparison import ReplyPair, compare_replies
from .comparison_report import ComparisonReport
from .intervals import check_confidence_level
from .pairwise_judge import PairwiseJudge
from .prompts import PromptSet, load_prompts
from .replies import collect_replies
from .sources import ReplySettings, ReplySource, UpstreamSource, parse_source


def compare_models(
    model_a: str | Upstream | ReplySource,
    model_b: str | Upstream | ReplySource,
    judge: Ranker,
    prompts: PromptSet | None = None,
    *,
    criteria: Sequence[str] = (),
    output_dir: str | PathLike[str] = "outputs/comparison",
    settings: ReplySettings | None = None,
    confidence_level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> ComparisonReport:
    """Compare two models: a judge is shown their replies to the same prompts, in both orders.

    Replies are stored in `output_dir` as soon as their batch is finished, and verdicts as they arrive. An interrupted,
    repeated or extended comparison generates and pays for only what is missing. Verdicts of a judge without a
    `fingerprint` are not stored.

    Args:
        model_a: Text that `parse_source` reads (a model, an adapter, an endpoint, an aligner, a data set of replies),
            an `Upstream`, or a `ReplySource`.
        model_b: The same, for the model that `model_a` is compared with.
        judge: A `PairwiseJudge`, or any ranker. A ranker that shuffles hides its position bias.
        prompts: Prompts in groups, from `load_prompts` or `read_prompts`. `None` loads the test prompts of HH-RLHF's
            four subsets.
        criteria: Criteria to judge by, one after another, as in `PairwiseJudge`. By default, those of the judge.
        output_dir: Folder of replies and verdicts.
        settings: How replies are generated. `None` means greedily, with up to 128 tokens.
        confidence_level: Coverage of the intervals.
        n_resamples: Number of bootstrap resamples of the prompts.
        seed: Seed of the resamples.

    Raises:
        ValueError: If an argument is invalid, stored replies have other settings, or `criteria` are given for a ranker
            that is no `PairwiseJudge`.
        RankerError: If the judge cannot answer at all.
        UpstreamError: If an endpoint of a model does not answer.
    """
    check_confidence_level(confidence_level)
    judges = judges_by_criteria(judge, criteria)
    sources = [_make_source(model, label) for model, label in ((model_a, "A"), (model_b, "B"))]
    pairs, without_reply = collect_pairs(sources[0], sources[1], prompts, output_dir, settings)
    path = None if getattr(judge, "fingerprint", None) is None else Path(output_dir) / "verdicts.sqlite"
    return ComparisonReport(
        sources[0].name,
        sources[1].name,
        ranker_name(judge),
        {name: compare_replies(each, pairs, path) for name, each in judges.items()},
        without_reply,
        confidence_level,
        n_resamples,
        seed,
    )


def collect_pairs(
    source_a: ReplySource,
    source_b: ReplySource,
    prompts: PromptSet | None,
    output_dir: str | PathLike[str],
    settings: ReplySettings | None,
) -> tuple[list[ReplyPair], int]:
    """Return the replies of two models to the same prompts, and the number of prompts that one of them did not answer.

    Raises:
        ValueError: See `collect_replies`.
        UpstreamError: If an endpoint does not answer.
    """
    asked = (prompts or load_prompts()).prompts
    replies = collect_replies([source_a, source_b], asked, output_dir, settings)
    pairs = [
        ReplyPair(prompt, reply_a.completion, reply_b.completion)
        for prompt, reply_a, reply_b in zip(asked, replies[source_a.name], replies[source_b.name], strict=True)
        if not (reply_a.failed or reply_b.failed)
    ]
    return pairs, len(asked) - len(pairs)


def judges_by_criteria(judge: Ranker, criteria: Sequence[str]) -> dict[str, Ranker]:
    """Return a judge for each of several criteria, by their names.

    Raises:
        ValueError: If criteria are repeated or unknown, or given for a ranker that is no `PairwiseJudge`.
    """
    if not criteria:
        return {judge.criteria if isinstance(judge, PairwiseJudge) else "verdicts": judge}
    if not isinstance(judge, PairwiseJudge):
        raise ValueError(
            f"criteria {', '.join(map(repr, criteria))} need a PairwiseJudge; {type(judge).__name__} has its own."
        )
    if len(set(criteria)) < len(criteria):
        raise ValueError(f"criteria must be distinct, got {', '.join(map(repr, criteria))}.")
    return {name: judge.with_criteria(name) for name in criteria}


def _make_source(model: str | Upstream | ReplySource, label: str) -> ReplySource:
    if isinstance(model, str):
        return parse_source(model)
    return UpstreamSource(label, model) if isinstance(model, Upstream) else model
