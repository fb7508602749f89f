"""Preference data out of corrections: the corrected answer over the original one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetInfo, Features

from ..data.drop_reports import dropped_rows
from ..data.formats import text_feature
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
    """Has an upstream answer prompts and an aligner correct the answers, as preference data for training the upstream.

    Pairs whose answer the aligner left as it was hold no preference: they are left out, and counted in
    `info.description`.

    Args:
        upstream: Who answers: a model (with its tokenizer), a pipeline, a function, or an `Upstream`.
        aligner: Who corrects.
        prompts: The prompts, or a data set with a column `prompt`: text or messages.
        tokenizer: The tokenizer of a model that is given.
        sampling: How the upstream is to sample: `temperature`, `top_p`, `max_tokens`.

    Returns:
        TRL's preference format: `prompt`, `chosen` (the correction), `rejected` (the answer); for TRL's `DPOTrainer`
        and for `RankingTrainer`.

    Raises:
        ValueError: If there are no prompts, or text and messages are mixed.
    """
    prompts = list(prompts["prompt"]) if isinstance(prompts, Dataset) else list(prompts)
    if not prompts:
        raise ValueError("There are no prompts to answer.")
    conversational = not isinstance(prompts[0], str)
    if any(isinstance(prompt, str) is conversational for prompt in prompts):
        raise ValueError("Some prompts are texts and some are messages: give all of them in one format.")
    answers = make_upstream(upstream, tokenizer)(prompts, **sampling)
    corrections = aligner.correct(prompts, answers)
    kept = [index for index, answer in enumerate(answers) if corrections[index] != answer]
    text = text_feature(conversational)
    columns = {
        "prompt": [prompts[index] for index in kept],
        "chosen": [as_completion(prompts[index], corrections[index]) for index in kept],
        "rejected": [as_completion(prompts[index], answers[index]) for index in kept],
    }
    dropped = dropped_rows(["unchanged"] * (len(prompts) - len(kept)))
    report = f"{len(prompts)} prompts, {len(kept)} pairs; {dropped}"
    features = Features(dict.fromkeys(columns, text))
    return Dataset.from_dict(columns, info=DatasetInfo(description=report, features=features))
