"""What a model and its tokenizer are loaded by alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SOURCE = ("cache_dir", "local_files_only", "revision", "token", "trust_remote_code")


def source_of(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say which files and from where; the tokenizer lies beside the model.

    Code from the Hub is run only where `trust_remote_code` is given.
    """
    return {"trust_remote_code": False, **{name: init_kwargs[name] for name in _SOURCE if name in init_kwargs}}
