"""Keep one model in memory at a time, which adapters over the same base share."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from .loading import load_model, load_tokenizer, loading, place_model, without_adapter

# Files of a model's folder that determine what it writes, by their beginnings
_FILES = ("adapter_", "chat_template", "config.json", "generation_config", "model", "pytorch_model", "special_tokens",
          "tokenizer", "vocab", "merges")  # fmt: skip
_BLOCK, _NUM_BLOCKS = 4096, 64


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model, or a PEFT adapter and the model below it.

    Args:
        name: Name or path that both were found by.
        base: Name or path of the model.
        peft_type: Kind of the adapter, such as `"LORA"`. `None` for a model without one.
    """

    name: str
    base: str
    peft_type: str | None

    @classmethod
    def find(cls, name: str) -> ModelReference:
        """Find out whether a name or path is one of a model or of an adapter.

        Raises:
            OSError: If there is no such folder, and no such model on the Hub.
            ValueError: If an adapter does not name its base.
        """
        with loading(name):
            path = find_adapter_config_file(name)
        # A folder with both is a model that loads its adapter itself.
        if path is None or os.path.isfile(Path(name, "config.json")):
            return cls(name, name, None)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        if not base:
            raise ValueError(
                f"The adapter {name} does not name its base model. Add base_model_name_or_path to {path}."
            )
        return cls(name, str(base), str(config.get("peft_type")))

    @property
    def identity(self) -> dict[str, str]:
        """Name what the replies of the model depend on: names on the Hub, and hashes of local weights."""
        identity = {"model": _identify(self.base)}
        return identity if self.peft_type is None else {**identity, "adapter": _identify(self.name)}


class ModelPool:
    """Load models when they are used, and free the one before. Adapters over the same base share it.

    Args:
        device: Device of the models. `None` means this process's accelerator, or the CPU without one.
        model_init_kwargs: Keyword arguments for loading the models.
    """

    def __init__(
        self, device: str | torch.device | None = None, model_init_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._device = device
        self._init_kwargs = dict(model_init_kwargs or {})
        self._base: str | None = None
        self._model: Any = None  # PreTrainedModel, or PeftModel once an adapter was used
        self._generation_config: Any = None
        self._num_adapters = 0

    @contextmanager
    def use(self, reference: ModelReference) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """Load a model and its tokenizer for the block. It stays in memory afterwards, without its adapter."""
        peft_types = {config.peft_type for config in getattr(self._model, "peft_config", {}).values()}
        mixes_types = reference.peft_type is not None and bool(peft_types - {reference.peft_type})
        if self._base != reference.base or mixes_types:
            self.free()
            self._model = load_model(AutoModelForCausalLM, reference.base, self._init_kwargs).eval()
            place_model(self._model, reference.base, self._device)
            self._base = reference.base
            self._generation_config = copy.deepcopy(self._model.generation_config)
        # Whoever samples adds the end-of-sequence tokens of a tokenizer, which another adapter does not have.
        without_adapter(self._model).generation_config = copy.deepcopy(self._generation_config)
        with self._adapter(reference):
            yield self._model, self._load_tokenizer(reference)

    def free(self) -> None:
        """Free the memory of the model."""
        self._model = self._base = self._generation_config = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    @contextmanager
    def _adapter(self, reference: ModelReference) -> Iterator[None]:
        """Apply the adapter of a reference, or none, in the block."""
        is_wrapped = hasattr(self._model, "get_base_model")
        if reference.peft_type is None:
            disabled: AbstractContextManager[Any] = self._model.disable_adapter() if is_wrapped else nullcontext()
            with disabled:
                yield
            return
        from peft import PeftModel

        # PEFT writes adapters into the base, so the wrapper stays. The next adapter replaces the one before.
        earlier = [*self._model.peft_config] if is_wrapped else []
        self._num_adapters += 1
        name = f"adapter_{self._num_adapters}"
        if is_wrapped:
            self._model.load_adapter(reference.name, name)
            self._model.set_adapter(name, inference_mode=True)
            for each in earlier:
                self._model.delete_adapter(each)
        else:
            self._model = PeftModel.from_pretrained(self._model, reference.name, name)
        self._model.eval()
        yield

    def _load_tokenizer(self, reference: ModelReference) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the adapter if it was saved with one, else the one of the base."""
        has_own = reference.peft_type is not None and os.path.isfile(Path(reference.name, "tokenizer_config.json"))
        return load_tokenizer(None, reference.name if has_own else reference.base, self._init_kwargs)


def _identify(name: str) -> str:
    """Return a hash of the files of a local model, which no copying changes, or the name of a model on the Hub.

    Of a large file, evenly spaced blocks are read: training changes all of them.
    """
    if not os.path.isdir(name):
        return name
    digest = hashlib.sha256()
    for path in sorted(Path(name).iterdir()):
        if not (path.is_file() and path.name.startswith(_FILES)):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_BLOCK, size // _NUM_BLOCKS)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return f"sha256:{digest.hexdigest()[:16]}"
