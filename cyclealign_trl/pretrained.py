"""Loading what is pretrained: what a model and its tokenizer are loaded by alike, and where the model goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SOURCE = ("cache_dir", "local_files_only", "revision", "token", "trust_remote_code")


def source_of(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say which files and from where; the tokenizer lies beside the model.

    Code from the Hub is run only where `trust_remote_code` is given.
    """
    return {"trust_remote_code": False, **{name: init_kwargs[name] for name in _SOURCE if name in init_kwargs}}


def placed(model: PreTrainedModel, device: str | torch.device | None = None) -> PreTrainedModel:
    """Moves a model to a device: by default to this process's accelerator, or the CPU where there is none.

    Raises:
        ValueError: If a device is named for a model that a `device_map` has placed.
    """
    if not hasattr(model, "hf_device_map"):
        model.to(device or _default_device())
    elif device is not None:
        raise ValueError(
            f"{model.name_or_path} was placed by a `device_map`, {model.hf_device_map}. Leave out `device` or that."
        )
    return model


def _default_device() -> torch.device:
    import torch

    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # it is available
    # As accelerate chooses it.
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    return torch.device(accelerator.type, index)
