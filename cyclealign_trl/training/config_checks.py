"""Checks and defaults that the configs share."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises `ValueError` if a field holds none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def default_bf16(args: TrainingArguments) -> bool:
    """Whether to use bfloat16 where nobody says: where the accelerator has it."""
    return not args.fp16 and not args.use_cpu and is_torch_bf16_gpu_available()


def state_without_tokens(args: TrainingArguments) -> dict[str, Any]:
    """What is pickled of the arguments: the Trainer does so next to the weights, and publishes both."""
    return {name: None if name.endswith("_token") else value for name, value in vars(args).items()}


def check_init_kwargs(model_init_kwargs: object) -> None:
    """Raises `ValueError` if they hold a token."""
    if isinstance(model_init_kwargs, dict) and "token" in model_init_kwargs:
        raise ValueError(
            "model_init_kwargs must hold no token, which reports and logs would show: set HF_TOKEN, or log in with "
            "`hf auth login`."
        )
