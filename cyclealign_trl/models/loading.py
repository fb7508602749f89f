"""What everything that runs a pretrained model does alike: where it comes from, where it runs, what ends a text."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from .._compat import create_model_from_path, get_config_model_id

_SOURCE = ("cache_dir", "local_files_only", "revision", "token", "trust_remote_code")


def hub_kwargs(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say which files and from where; the tokenizer lies beside the model.

    Code from the Hub is run only where `trust_remote_code` is given.
    """
    return {"trust_remote_code": False, **{name: init_kwargs[name] for name in _SOURCE if name in init_kwargs}}


def load_causal_lm(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model by its name, or as it is given, to be run, and a tokenizer that nobody else changes.

    Args:
        model: The model, or its name.
        tokenizer: The tokenizer; by default the one of the model's name.
        init_kwargs: Keyword arguments of `from_pretrained`.

    Raises:
        ValueError: If a loaded model is given with arguments for loading, or without a tokenizer or name.
    """
    init_kwargs = dict(init_kwargs or {})
    name = model if isinstance(model, str) else model.name_or_path
    return load_model(AutoModelForCausalLM, model, init_kwargs).eval(), load_tokenizer(tokenizer, name, init_kwargs)


def load_model(auto_class: Any, model: str | PreTrainedModel, init_kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a name, or as it is given.

    Raises:
        ValueError: If a loaded model is given with arguments for loading.
    """
    if isinstance(model, str):
        loaded: PreTrainedModel = auto_class.from_pretrained(model, **{"trust_remote_code": False, **init_kwargs})
        return loaded
    if init_kwargs:
        raise ValueError(
            f"`model_init_kwargs` {sorted(init_kwargs)} say how to load a model, but a loaded one was given. "
            "Load it with them, or pass its name."
        )
    return model


def load_tokenizer(
    given: PreTrainedTokenizerBase | None, name: str, init_kwargs: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """A tokenizer that nobody else changes or uses at the same time: a copy, or the one of the model's name."""
    if given is not None:
        return copy.deepcopy(given)
    if not name:
        raise ValueError("The model was not loaded by name, so its tokenizer is not known. Pass `tokenizer`.")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **hub_kwargs(init_kwargs))
    return tokenizer


def place_model(model: PreTrainedModel, name: str, device: str | torch.device | None = None) -> None:
    """Moves a model that each process runs for itself to its device: `None` means this process's accelerator, if any.

    Raises:
        ValueError: If the model's weights are split among the processes, or a `device_map` has placed it elsewhere.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"DeepSpeed ZeRO-3 has split the weights of {name} among the processes, each of which runs it on texts of "
            "its own. Load it before the training arguments are made."
        )
    if not hasattr(model, "hf_device_map"):
        model.to(device or default_device())
    elif device is not None:
        raise ValueError(f"{name} was placed by a `device_map`, {model.hf_device_map}. Leave out `device` or that.")


def default_device() -> torch.device:
    """This process's accelerator, or the CPU where there is none."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # it is available
    # As accelerate chooses it.
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    return torch.device(accelerator.type, index)


def sync_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Makes model and tokenizer agree on padding.

    Returns:
        Every id that ends a completion, the tokenizer's own first.

    Raises:
        ValueError: If there is none, or nothing to pad with.
    """
    generation_config = model.generation_config
    declared = None if generation_config is None else generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    eos_token_ids = tuple(dict.fromkeys([*own, *declared]))
    if not eos_token_ids:
        raise ValueError(
            f"The tokenizer has no eos_token and {type(model).__name__}'s generation config no eos_token_id, so no "
            "completion could ever end. Set tokenizer.eos_token."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has neither a pad_token nor an eos_token. Set tokenizer.pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if generation_config is not None:
        generation_config.pad_token_id = tokenizer.pad_token_id
    return eos_token_ids


def digest_weights(model: PreTrainedModel) -> str:
    """A text that differs between the models of any two training steps, made of the first weights of each tensor."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.detach().flatten()[:16].tolist()}".encode())
    return digest.hexdigest()


def load_policy(name: str, args: TrainingArguments) -> PreTrainedModel:
    """Load the policy that a trainer was given by name, as its `model_init_kwargs` say."""
    init_kwargs = {"trust_remote_code": False, **dict_field(getattr(args, "model_init_kwargs", None))}
    if args.distributed_state.distributed_type != DistributedType.NO:
        init_kwargs["device_map"] = None  # each process holds a model of its own
    model: PreTrainedModel = create_model_from_path(name, **init_kwargs)
    return model


def dict_field(kwargs: dict[str, Any] | str | None) -> dict[str, Any]:
    """A dictionary field after `TrainingArguments` has parsed what came from a command line."""
    return dict(cast("dict[str, Any]", kwargs or {}))


def short_model_name(model: str | PreTrainedModel) -> str:
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return str(name).rstrip("/").split("/")[-1] or "model"


def max_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has, or `None` if its architecture sets no limit."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions


def check_positions(model: PreTrainedModel, **lengths: int | None) -> None:
    """Check that texts of the configured lengths fit into the model's positions.

    Args:
        model: The model.
        lengths: The settings whose sum is the longest text, in tokens. `None` counts as 0.

    Raises:
        ValueError: If they do not fit.
    """
    positions, longest = max_positions(model), sum(length or 0 for length in lengths.values())
    if positions is None or longest <= positions:
        return
    several = len(lengths) > 1
    settings = " + ".join(f"{name} ({length})" for name, length in lengths.items()) if several else next(iter(lengths))
    raise ValueError(
        f"{settings} is {longest} tokens, but {type(model).__name__} has {positions} positions. "
        f"Lower {'one of them' if several else 'it'}."
    )
