"""Checks and defaults that the configs of all trainers share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise `ValueError` if a field has none of its legal values."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_config_class(trainer: object, args: object, config_class: type[TrainingArguments]) -> None:
    """Raise `TypeError` if a trainer is given arguments of another trainer.

    Subclasses of `config_class` outside the package are accepted.
    """
    package = __package__.partition(".")[0]
    own = (cls for cls in type(args).__mro__ if cls.__module__.partition(".")[0] == package)
    if next(own, None) is not config_class:
        given = f"the class {args.__name__}" if isinstance(args, type) else type(args).__name__
        raise TypeError(
            f"{type(trainer).__name__} needs a {config_class.__name__} as args, got {given}. Pass "
            f"args={config_class.__name__}(...)."
        )


def check_init_kwargs(model_init_kwargs: object) -> None:
    """Raise `ValueError` if `model_init_kwargs` contain a token, which reports and logs would show."""
    if isinstance(model_init_kwargs, dict) and "token" in model_init_kwargs:
        raise ValueError(
            "model_init_kwargs must not contain a token, because reports and logs show them: set HF_TOKEN, or log in "
            "with `hf auth login`."
        )


def check_trainer_settings(args: TrainingArguments, strategies: Iterable[str] = ("random",)) -> None:
    """Raise `ValueError` for settings of the Trainer that need tensors or labels in batches, which have none.

    Liger kernels are used without their fused loss, which would replace the forward pass that log-probabilities need.

    Args:
        args: The arguments.
        strategies: Legal values of `train_sampling_strategy`.
    """
    check_choice("train_sampling_strategy", args.train_sampling_strategy, strategies)
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no effect on this loss. Leave it at 0."
        )
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise ValueError(
            "dispatch_batches=True cannot split batches of lists between processes. Leave it out of "
            "accelerator_config: every process then loads its own rows."
        )
    if args.use_liger_kernel:
        if any(importlib.util.find_spec(name) is None for name in ("liger_kernel", "triton")):
            raise ValueError(
                "use_liger_kernel=True needs Liger and Triton, which needs a GPU: pip install liger-kernel triton."
            )
        unfused = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), **unfused}


def default_bf16(args: TrainingArguments) -> bool:
    """Return whether to train in bfloat16 if `bf16` is not set: yes, if the accelerator supports it."""
    return not args.fp16 and not args.use_cpu and is_torch_bf16_gpu_available()


def state_without_tokens(args: TrainingArguments) -> dict[str, Any]:
    """Return the state of the arguments for pickling, without tokens.

    The Trainer pickles its arguments next to the weights, and publishes both.
    """
    return {name: None if name.endswith("_token") else value for name, value in vars(args).items()}
