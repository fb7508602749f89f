"""Uploads of all trainers to a Hub on loopback, and what is downloaded from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub import StandInHub

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
TOKEN = "hf_a-secret-token"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Publish every kind of run; return the Hub, the results of `publisher.py`, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("published")
    with StandInHub(TOKEN) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,  # read when huggingface_hub is imported, so the publisher is a process of its own
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(folder / "home"),
            "HF_DATASETS_CACHE": str(folder / "home" / "datasets"),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("HF_TOKEN", None)
        command = [sys.executable, "-m", "tests.training.publisher", str(folder), TOKEN]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{done.stderr[-6000:]}\n{hub.unknown}"
        yield hub, json.loads((folder / "results.json").read_text()), folder


def test_everything_that_was_pushed_can_be_loaded(published):
    hub, results, _ = published
    address = results["full"].pop("address")
    assert address == f"{hub.url}/datasets/tester/full-interactions"
    for part, checks in results.items():
        for check, passed in checks.items():
            assert passed, f"{part}: {check}"
    assert hub.unknown == []


def test_a_model_is_pushed_with_its_card_and_demonstrations_and_nothing_else(published):
    hub, _, folder = published
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    common = {"README.md", "agreement.png", "training_args.bin", *tokenizer}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(hub.files("models/tester/full")) == common | model | {"demonstrations.json"}
    assert set(hub.files("models/tester/adapter")) == common | adapter
    assert set(hub.files("models/tester/ranked")) == (common | model) - {"agreement.png"}
    assert set(hub.files("models/tester/aligner")) == (common | model | {"aligner_template.json"}) - {"agreement.png"}
    assert set(hub.files("models/tester/aligner-again")) == tokenizer | model | {"aligner_template.json"}
    assert (folder / "full" / "rankings-0.sqlite").exists()
    assert (folder / "full" / "interactions").exists()


def test_pushes_while_training_follow_the_hub_strategy(published):
    hub, *_ = published
    uploaded = {name: hub.files(f"models/tester/{name}") for name in ("every_save", "checkpoint", "all_checkpoints")}
    for name, files in uploaded.items():
        assert {"README.md", "agreement.png", "model.safetensors", "tokenizer.json"} <= set(files), name
        assert "| optimiser steps | 2 |" in files["README.md"].decode()
    folders = {name: {path.split("/")[0] for path in files if "/" in path} for name, files in uploaded.items()}
    assert folders == {
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-1", "checkpoint-2"},
    }
    assert hub.files("models/tester/end") == {}


def test_the_metadata_of_pushed_repositories(published):
    hub, *_ = published
    full = ModelCard(hub.files("models/tester/full")["README.md"].decode()).data
    assert (full.license, full.datasets, full.library_name) == ("apache-2.0", ["org/questions"], "transformers")
    adapter = ModelCard(hub.files("models/tester/adapter")["README.md"].decode()).data
    assert (adapter.base_model, adapter.library_name, adapter.license) == ("tester/base", "peft", None)
    assert hub.repositories["datasets/tester/other-log"].private
    assert not hub.repositories["datasets/tester/full-interactions"].private


def test_nothing_private_is_pushed(published):
    hub, _, folder = published
    for name, repository in hub.repositories.items():
        for path, content in repository.files.items():
            assert not path.endswith((".sqlite", ".tmp")), f"{name}/{path}"
            assert TOKEN.encode() not in content, f"{name}/{path}"
            assert str(folder).encode() not in content or path.endswith("training_args.bin"), f"{name}/{path}"
            if name.startswith("models/"):
                assert not path.startswith(("interactions", "preference", "runs")), f"{name}/{path}"
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
