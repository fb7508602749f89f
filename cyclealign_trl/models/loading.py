"""Load pretrained models and tokenizers, place models on devices, and check their settings."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from .._files import is_missing_path
from .renderer import read_turn

logger = logging.getLogger(__name__)

_HUB_KWARGS = ("cache_dir", "local_files_only", "revision", "token", "trust_remote_code")


# Loading


@contextmanager
def loading(name: object) -> Iterator[None]:
    """Name the missing folder if a model or tokenizer cannot be loaded, because the Hub's errors do not.

    Args:
        name: Name or path that is loaded in the block. Anything but a text is a loaded model, and not checked.

    Raises:
        OSError: If there is no such folder, and no such model on the Hub.
    """
    if not isinstance(name, str):
        yield
        return
    if is_missing_path(name):
        raise FileNotFoundError(f"There is no folder {name}. Check the path, or pass the name of a model on the Hub.")
    try:
        yield
    except OSError as error:
        # Errors of the file system have a number. Errors of `from_pretrained` do not.
        if error.errno is not None or os.path.exists(name):
            raise
        raise OSError(f"There is no folder {name}, and it cannot be loaded from the Hub: {error}") from error


def load_model(auto_class: Any, model: str | PreTrainedModel, init_kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """Load a model by name, or return the given model unchanged.

    Args:
        auto_class: Auto class to load with, such as `AutoModelForCausalLM`.
        model: The model, or its name.
        init_kwargs: Keyword arguments of `from_pretrained`. `trust_remote_code` defaults to `False`.

    Raises:
        ValueError: If `init_kwargs` is not empty and `model` is already loaded.
    """
    if isinstance(model, str):
        with loading(model):
            loaded: PreTrainedModel = auto_class.from_pretrained(model, **{"trust_remote_code": False, **init_kwargs})
        return loaded
    if init_kwargs:
        raise ValueError(
            f"`model_init_kwargs` {sorted(init_kwargs)} only apply when a model is loaded by name, but a loaded model "
            "was given. Load it with these arguments, or pass its name."
        )
    return model


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, name: str, init_kwargs: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """Return a copy of the given tokenizer, or load the tokenizer of a model by the model's name.

    The copy keeps our changes (padding side, special tokens) away from the caller's tokenizer.

    Args:
        tokenizer: The tokenizer, or `None` to load it.
        name: Name of the model.
        init_kwargs: Keyword arguments that the model is loaded with.

    Raises:
        TypeError: If `tokenizer` is not a tokenizer.
        ValueError: If there is neither a tokenizer nor a name.
    """
    if tokenizer is not None:
        check_tokenizer("tokenizer", tokenizer)
        return copy.deepcopy(tokenizer)
    if not name:
        raise ValueError("The model was not loaded by name, so its tokenizer cannot be found. Pass `tokenizer`.")
    with loading(name):
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **hub_kwargs(init_kwargs))
    return loaded


def check_tokenizer(name: str, tokenizer: object) -> None:
    """Raise `TypeError` if an argument is not a tokenizer but, for example, a multimodal processor.

    Args:
        name: Name of the argument, for the message.
        tokenizer: The argument.
    """
    if hasattr(tokenizer, "pad_token_id") and not isinstance(tokenizer, type):
        return
    fix = "Load one with AutoTokenizer."
    if isinstance(tokenizer, str):
        fix = f"Pass AutoTokenizer.from_pretrained({tokenizer!r})."
    elif hasattr(tokenizer, "tokenizer"):
        fix = "It is a processor: pass processor.tokenizer."
    raise TypeError(f"{name} must be a tokenizer, got {type(tokenizer).__name__}. {fix}")


def load_causal_lm(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model in evaluation mode, and a tokenizer that is not shared with the caller.

    Args:
        model: The model, or its name.
        tokenizer: The tokenizer. `None` loads it by the model's name.
        init_kwargs: Keyword arguments of `from_pretrained`.

    Raises:
        ValueError: If a loaded model is given together with `init_kwargs`, or has neither a tokenizer nor a name.
    """
    init_kwargs = dict(init_kwargs or {})
    name = model if isinstance(model, str) else model.name_or_path
    return load_model(AutoModelForCausalLM, model, init_kwargs).eval(), load_tokenizer(tokenizer, name, init_kwargs)


def load_policy(name: str, args: TrainingArguments) -> PreTrainedModel:
    """Load a trainer's policy by name, with the `model_init_kwargs` of its arguments."""
    init_kwargs = {"trust_remote_code": False, **dict_field(getattr(args, "model_init_kwargs", None))}
    if args.distributed_state.distributed_type != DistributedType.NO:
        init_kwargs["device_map"] = None  # each process trains a copy of its own
    with loading(name):
        model: PreTrainedModel = create_model_from_path(name, **init_kwargs)
    return model


def dict_field(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Return a copy of a config's dictionary field, empty if the field is not set.

    The field's type includes `str` because a command line passes JSON; `TrainingArguments` has parsed it by now.
    """
    return dict(cast("dict[str, Any]", value or {}))


def hub_kwargs(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that locate files, to load a tokenizer from where its model came.

    `trust_remote_code` defaults to `False`.
    """
    return {"trust_remote_code": False, **{name: init_kwargs[name] for name in _HUB_KWARGS if name in init_kwargs}}


# Devices


def place_model(model: PreTrainedModel, name: str, device: str | torch.device | None = None) -> None:
    """Move a model that each process runs by itself to its device.

    Args:
        model: The model.
        name: Name of the model, for error messages.
        device: The device. `None` means this process's accelerator, or the CPU without one.

    Raises:
        ValueError: If the model's weights are sharded over the processes, or `device` is given for a model that a
            `device_map` has placed.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"DeepSpeed ZeRO-3 has sharded the weights of {name}, but each process needs the whole model for its own "
            "texts. Load the model before the training arguments are created."
        )
    if not hasattr(model, "hf_device_map"):
        model.to(device or default_device())
    elif device is not None:
        raise ValueError(
            f"device={str(device)!r} was given, but a `device_map` has placed {name}: {model.hf_device_map}. "
            "Leave out one of them."
        )


def default_device() -> torch.device:
    """Return this process's accelerator, or the CPU without one."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # it is available
    # accelerate assigns devices in the same way.
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    return torch.device(accelerator.type, index)


# Properties of a model


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model below a PEFT adapter, or a model without an adapter unchanged.

    `accelerate.utils.is_peft_model` would import DeepSpeed, which takes seconds and writes to stdout.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_causal_lm(model: PreTrainedModel) -> None:
    """Check that a model is a causal language model that can be sampled and scored.

    An invalid generation config is corrected, and router logits are turned off. Both are logged as warnings.

    Raises:
        ValueError: If the model is an encoder-decoder, or has no output head or no `generate` method.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder. Pass a decoder-only model, such as one of AutoModelForCausalLM."
        )
    base = without_adapter(model)
    if base.get_output_embeddings() is None or not base.can_generate():
        raise ValueError(
            f"{name} has no language modeling head. Load the model with AutoModelForCausalLM, or pass its name."
        )
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        # Sampling fails with router logits, and the trainers have an objective of their own.
        text_config.output_router_logits = False
        logger.warning(
            "%s has output_router_logits=True, but the load-balancing loss is not part of the objective. It is left "
            "out, and output_router_logits is set to False.",
            name,
        )
    _validate_generation_config(base)


def _validate_generation_config(model: PreTrainedModel) -> None:
    """Correct a generation config that the Trainer could not save."""
    config = model.generation_config
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        if not config.do_sample:
            config.do_sample = True
            try:
                config.validate(strict=True)
            except ValueError:
                pass
            else:
                logger.warning(
                    "The generation config of %s has sampling parameters with do_sample=False, which cannot be saved. "
                    "do_sample is set to True. Sampling in training does not depend on it.",
                    type(model).__name__,
                )
                return
        raise ValueError(
            f"The generation config of {type(model).__name__} is invalid, so the model could not be saved: {error} "
            "Correct model.generation_config."
        ) from error


def sync_special_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Set the same pad token on model and tokenizer, and collect the ids that end a completion.

    Without a pad token, the end-of-sequence token becomes the pad token. If the chat template ends an assistant's turn
    with another token than those that tokenizer and generation config declare, it is added to the generation config.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        chat_template_kwargs: Keyword arguments for the chat template.

    Returns:
        Every end-of-sequence id of the tokenizer, of the generation config and of the chat template, the tokenizer's
        first.

    Raises:
        ValueError: If there is no end-of-sequence id, no token to pad with, the model has no embeddings for tokens of
            the tokenizer, or it is not a causal language model.
    """
    check_causal_lm(model)
    generation_config = model.generation_config
    declared = None if generation_config is None else generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    eos_token_ids = tuple(dict.fromkeys([*own, *declared]))
    if not eos_token_ids:
        raise ValueError(
            f"The tokenizer has no eos_token and the generation config of {type(model).__name__} has no eos_token_id, "
            "so no completion can end. Set tokenizer.eos_token."
        )
    turn = read_turn(tokenizer, chat_template_kwargs)
    if turn.end_id is not None and turn.end_id not in eos_token_ids:
        eos_token_ids = (*eos_token_ids, turn.end_id)
        if generation_config is not None:
            generation_config.eos_token_id = list(eos_token_ids)
        logger.warning(
            "The chat template ends an assistant's turn with %r, but the end-of-sequence token of the tokenizer is "
            "%r. Completions of conversations end with %r, in training, in sampling and in the saved generation "
            "config.",
            turn.end,
            tokenizer.eos_token,
            turn.end,
        )
    elif turn.end_id is None and turn.after.strip():
        logger.warning(
            "The chat template ends an assistant's turn with %r, which contains no special token, so it cannot end a "
            "sample. Completions of conversations end with %r instead. Add the text to the tokenizer as a special "
            "token, and resize the model's embeddings, if it should.",
            turn.after,
            tokenizer.eos_token,
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has neither a pad_token nor an eos_token. Set tokenizer.pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    check_vocabulary(model, tokenizer)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if generation_config is not None:
        generation_config.pad_token_id = tokenizer.pad_token_id
    return eos_token_ids


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model has embeddings for the tokens of a tokenizer.

    Special tokens that neither texts nor the chat template can produce are exempt: some tokenizers of text models have
    a token for images.

    Raises:
        ValueError: If an embedding is missing.
    """
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if embeddings is None:
        return
    tokens = {text: index for text, index in tokenizer.get_vocab().items() if index >= embeddings}
    if not tokens:
        return
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    template = str(tokenizer.chat_template or "")
    missing = {text: index for text, index in tokens.items()
               if index not in special or index in used or text in template}  # fmt: skip
    if missing:
        text, index = max(missing.items(), key=lambda item: item[1])
        raise ValueError(
            f"The tokenizer has {len(missing)} tokens without an embedding, for example {text!r} with id {index}: "
            f"{type(model).__name__} has embeddings for ids below {embeddings}. Use the model's own tokenizer, or "
            f"call model.resize_token_embeddings({index + 1}) before training."
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a model, or `None` if its architecture sets no limit."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions


def check_positions(model: PreTrainedModel, **lengths: int | None) -> None:
    """Check that texts of the configured lengths fit into the model's positions.

    Args:
        model: The model.
        lengths: Settings whose sum is the length of the longest text, in tokens. `None` counts as 0.

    Raises:
        ValueError: If the sum is larger than the number of positions.
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


def digest_weights(model: PreTrainedModel) -> str:
    """Return a hash of the first 16 weights of each tensor, which changes with every training step."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.detach().flatten()[:16].tolist()}".encode())
    return digest.hexdigest()


def short_model_name(model: str | PreTrainedModel) -> str:
    """Return the last part of a model's name, for default output directories."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return str(name).rstrip("/").split("/")[-1] or "model"
