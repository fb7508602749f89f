"""What goes to the Hub and comes back, over HTTP to a stand-in on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cyclealign_trl import DemonstrationPool
from cyclealign_trl.cycle.interaction_log import SUMMARY_COLUMNS, InteractionLog, schema, summarize
from cyclealign_trl.cycle.publishing import DATA_FILE, interaction_sections, interactions_card, save_demonstrations
from tests.cycle.stubs import DigestRanker, make_trainer
from tests.hub import StandInHub

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
TOKEN = "hf_a-secret-of-ours"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The stand-in after everything was pushed, what its reader found, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("published")
    with StandInHub(TOKEN) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,  # read when the client is imported, so the client is in a process of its own
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


def test_what_was_pushed_comes_back(published):
    hub, results, _ = published
    address = results["full"].pop("address")
    assert address == f"{hub.url}/datasets/tester/full-interactions"
    for part, checks in results.items():
        for check, passed in checks.items():
            assert passed, f"{part}: {check}"
    assert hub.unknown == []


def test_a_model_goes_with_its_card_and_demonstrations_and_nothing_else(published):
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


def test_pushes_while_training(published):
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


def test_the_metadata_of_what_was_pushed(published):
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


def test_the_card_of_a_log():
    card = interactions_card("org/log", 1234, {"ranker": "`judge`"})
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "train", "path": DATA_FILE}]
    assert "license" not in card.data.to_dict()
    assert "The 1,234 interactions" in card.text
    assert "| ranker | `judge` |" in card.text
    for column in schema(conversational=True).names:
        assert f"| `{column}` | " in card.text


def test_without_matplotlib_the_curve_is_a_table(tmp_path, monkeypatch):
    make_trainer(tmp_path, max_steps=2).train()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    summary = summarize(InteractionLog(tmp_path, 0).read(SUMMARY_COLUMNS).to_pylist(), 2)
    text = "\n".join(interaction_sections(summary, tmp_path))
    assert "| up to step | agreement |" in text
    assert f"| 1 | {summary.curve(10)[-1][1]:.3f} |" in text
    assert not (tmp_path / "agreement.png").exists()


def test_failures_are_told_by_kind(tmp_path):
    ranker = DigestRanker(fail=lambda request: "timeout" if request.prompt == "Question 1:" else None)
    make_trainer(tmp_path, ranker=ranker, num_interactions=1, max_ranking_failures=1.0).train()
    summary = summarize(InteractionLog(tmp_path, 0).read(SUMMARY_COLUMNS).to_pylist(), 2)
    assert "| rankings that failed | 1 (timeout: 1) |" in "\n".join(interaction_sections(summary, tmp_path))


def test_demonstrations_of_a_prompt_are_not_published(tmp_path):
    save_demonstrations(DemonstrationPool(scope="run"), tmp_path)
    assert (tmp_path / "demonstrations.json").exists()
    save_demonstrations(DemonstrationPool(scope="prompt"), tmp_path)
    assert not (tmp_path / "demonstrations.json").exists()


def test_a_failure_of_the_main_process_leaves_nobody_waiting(tmp_path, monkeypatch):
    reached = []

    def broadcast(values):
        reached.append(values)
        return [None]

    trainer = make_trainer(tmp_path)
    monkeypatch.setattr("cyclealign_trl.cycle.cyclealign_trainer.broadcast_object_list", broadcast)
    with pytest.raises(FileNotFoundError):
        trainer.push_interactions_to_hub()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    with pytest.raises(RuntimeError, match="main process"):
        trainer.push_interactions_to_hub()
    assert reached == [[None], [None]]


def test_a_run_without_a_log_has_none_to_publish(tmp_path):
    with pytest.raises(FileNotFoundError, match="train first"):
        make_trainer(tmp_path).push_interactions_to_hub()
