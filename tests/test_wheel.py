"""The wheel in an environment of its own, outside the clone: what somebody who installs the package gets."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import cyclealign_trl
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import prompts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("cyclealign_trl", "pyproject.toml", "README.md", "LICENSE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the wheel from a copy, and install it next to the dependencies of this environment. Return its folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    # An environment without a recent setuptools downloads it, as `pip install` does.
    recent = int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
    isolation = ["--no-build-isolation"] if recent else []
    pip("wheel", "--no-deps", *isolation, "--wheel-dir", folder, folder / "source")
    shutil.rmtree(folder / "source")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """Run the console script of the installed package in an empty folder."""
    (tmp_path / "empty").mkdir()

    def run_command(*arguments):
        command = [str(installed / "venv" / "bin" / "cyclealign"), *map(str, arguments)]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "empty", env=ENVIRONMENT)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run_command


def test_the_package_is_the_one_of_the_wheel(installed):
    code = "import cyclealign_trl; print(cyclealign_trl.__version__, cyclealign_trl.__file__)"
    python = installed / "venv" / "bin" / "python"
    printed = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=installed, env=ENVIRONMENT)
    version, path = printed.stdout.split()
    assert version == cyclealign_trl.__version__
    assert Path(path).is_relative_to(installed / "venv")


def test_extras_are_added_by_name_without_an_index_entry_of_the_package(installed):
    pip("--python", installed / "venv" / "bin" / "python", "install", "--no-index", "cyclealign-trl[peft,report]")


def test_a_first_run_with_the_file_of_init(run, tmp_path):
    make_model().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    prompts(8).to_json(tmp_path / "prompts.jsonl")
    assert "cyclealign train --config cyclealign.yaml" in run("init")
    settings = ["--config", "cyclealign.yaml", "--model_name_or_path", tmp_path / "policy", "--dataset_name",
                tmp_path / "prompts.jsonl", "--max_prompt_length", 64, "--max_completion_length", 16, "--max_steps", 2,
                "--use_cpu", "--report_to", "none"]  # fmt: skip
    reply = json.dumps({"ranking": ["B", "A", "C"], "improved_response": "better"})
    with LoopbackEndpoint(lambda body: Reply(reply)) as endpoint:
        settings += ["--ranker_base_url", endpoint.base_url]
        assert "Optimiser steps: 2." in run("estimate", *settings)
        assert endpoint.requests == []
        assert "Model saved to outputs/qwen-cyclealign." in run("train", *settings)
        assert len(endpoint.requests) == 16  # 2 steps of 2 micro-batches of 4 prompts
    run("export", "outputs/qwen-cyclealign")
    run("report", "outputs/qwen-cyclealign")
    written = {path.name for path in (tmp_path / "empty" / "outputs" / "qwen-cyclealign").iterdir()}
    assert {"model.safetensors", "interactions", "preference", "report.html"} <= written


@pytest.mark.timeout(900)
def test_the_demo(run, tmp_path):
    run("demo", "--num_train_epochs", 1)
    folder = tmp_path / "empty" / "outputs" / "demo"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["score_after"] > summary["score_before"] + 0.25
    assert (folder / "report.html").is_file()
