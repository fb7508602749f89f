"""Tasks of the demo: a tiny policy with a corpus of its own, and a chat model with everyday questions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from . import corpus, everyday

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY, SMOLLM2 = "tiny", "smollm2"
"""Names of models that need no Hub."""


@dataclass(frozen=True, slots=True)
class DemoTask:
    """A policy, its questions, and the rule that scores its answers.

    Args:
        loading: What loading the policy does, for the terminal.
        load_policy: Function from a seed to a model on the CPU and its tokenizer.
        train_questions: Questions to train on.
        held_out_questions: Questions to evaluate on.
        num_samples: Completions per held-out question.
        score: Function from a question and a completion to a score in [0, 1].
        improve: Function from a question and a completion to a better completion.
        settings: Fields of `CycleAlignConfig`, also for sampling on held-out questions.
        lora_rank: Rank of a LoRA adapter to train. `None` trains all weights.
    """

    loading: str
    load_policy: Callable[[int], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    train_questions: Sequence[str]
    held_out_questions: Sequence[str]
    num_samples: int
    score: Callable[[str, str], float]
    improve: Callable[[str, str], str]
    settings: Mapping[str, Any]
    lora_rank: int | None = None


def make_task(model: str = TINY) -> DemoTask:
    """Return the task for a model.

    Args:
        model: `"tiny"`, `"smollm2"`, or the name or path of a chat model.
    """
    if model == TINY:
        return DemoTask(
            loading="Pretraining a tiny policy on a generated corpus (about half a minute)",
            load_policy=_pretrain_tiny_policy,
            train_questions=corpus.questions("train"),
            held_out_questions=corpus.questions("held_out"),
            num_samples=16,
            score=corpus.score,
            improve=corpus.improve,
            settings={
                "num_train_epochs": 2,
                "per_device_train_batch_size": 16,
                "max_prompt_length": 64,
                "max_completion_length": 48,
                "temperature": 1.0,
                "top_p": 1.0,
                "learning_rate": 4e-4,
            },
        )
    return DemoTask(
        loading=f"Loading {model} (the first time, its file is converted)" if model == SMOLLM2 else f"Loading {model}",
        load_policy=partial(_load_chat_model, model),
        train_questions=everyday.TRAIN_QUESTIONS,
        held_out_questions=everyday.HELD_OUT_QUESTIONS,
        num_samples=2,
        score=everyday.score,
        improve=everyday.improve,
        settings={
            "num_train_epochs": 1,
            "num_interactions": 3,
            "per_device_train_batch_size": 4,
            "max_prompt_length": 128,
            "max_completion_length": 64,
            # At temperature 1, a model of this size writes many words that fit nowhere.
            "temperature": 0.7,
            "top_p": 0.95,
            "learning_rate": 2e-4,
        },
        lora_rank=8,
    )


def _pretrain_tiny_policy(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from .policy import pretrain_policy

    return pretrain_policy(seed)


def _load_chat_model(name: str, _seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a chat model in float32, because bfloat16 is many times slower on most CPUs.

    Raises:
        ImportError: If peft, or the package with the weights of SmolLM2, is not installed.
        OSError: If there is no such model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("The demo trains a chat model with LoRA, but peft is not installed: pip install peft")
    from ..models.loading import load_causal_lm
    from ..models.smollm2 import smollm2_directory

    path = str(smollm2_directory()) if name == SMOLLM2 else name
    return load_causal_lm(path, init_kwargs={"dtype": "float32"})
