"""Preference data from corrections: the correction is preferred to the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetInfo, Features

from ..data.drop_reports import dropped_rows
from ..data.formats import text_feature
from ..training.row_checks import read_prompts
from ..types import Prompt, as_completion
from .upstreams import make_upstream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .aligner import Aligner


def bootstrap_preferences(
    upstream: Any,
    aligner: Aligner,
    prompts: Dataset | Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase | None = None,
    **sampling: Any,
) -> Dataset:
    """Answer prompts with an upstream, correct the answers with an aligner, and return preference pairs.

    The pairs can train the upstream itself. Answers that the aligner left unchanged contain no preference. They are
    dropped, and counted in `info.description`.

    Args:
        upstream: Upstream to answer with: a model (with its tokenizer), a pipeline, a function, or an `Upstream`.
        aligner: Aligner to correct with.
        prompts: Prompts as texts or messages, or a data set with a column `prompt`.
        tokenizer: Tokenizer of `upstream`, if that is a model.
        sampling: Sampling parameters for the upstream: `temperature`, `top_p`, `max_tokens`.

    Returns:
        Rows in TRL's preference format, `prompt`, `chosen` (the correction) and `rejected` (the answer), for TRL's
        `DPOTrainer` and for `RankingTrainer`.

    Raises:
        ValueError: If there are no prompts, or some are texts and some messages.
    """
    prompts = prompts if isinstance(prompts, Dataset) else list(prompts)
    if not len(prompts):
        raise ValueError("prompts is empty. Pass at least one prompt.")
    prompts = read_prompts(prompts)
    conversational = not isinstance(prompts[0], str)
    answers = make_upstream(upstream, tokenizer)(prompts, **sampling)
    corrections = aligner.correct(prompts, answers)
    kept = [index for index, answer in enumerate(answers) if corrections[index] != answer]
    columns = {
        "prompt": [prompts[index] for index in kept],
        "chosen": [as_completion(prompts[index], corrections[index]) for index in kept],
        "rejected": [as_completion(prompts[index], answers[index]) for index in kept],
    }
    dropped = dropped_rows(["unchanged"] * (len(prompts) - len(kept)))
    report = f"{len(prompts)} prompts, {len(kept)} pairs; {dropped}"
    features = Features(dict.fromkeys(columns, text_feature(conversational)))
    return Dataset.from_dict(columns, info=DatasetInfo(description=report, features=features))
