"""The recipes for Slurm and Kubernetes: syntax, flags, and keys that come from the environment alone."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from cyclealign_trl.scripts import init, train

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "examples" / "launch" / "slurm.sh"
KUBERNETES = ROOT / "examples" / "launch" / "kubernetes.yaml"
ZERO2 = ROOT / "examples" / "accelerate_configs" / "zero2.yaml"
NAMES = {"SLURM_NNODES": "2", "RESUME": "true", "OUTPUT_DIR": "out", "MAIN_ADDRESS": "node-0"}


def kubernetes():
    service, job = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return service, job, container


def scripts():
    (kubernetes_script,) = kubernetes()[2]["args"]
    return {"slurm": SLURM.read_text(encoding="utf-8"), "kubernetes": kubernetes_script}


def training_arguments(script):
    """Return the arguments of `cyclealign train` in a script, with a value for each variable."""
    (command,) = re.findall(r"cyclealign train ((?:[^\n]*\\\n)*[^\n]*)", script)
    command = command.replace("\\\n", " ").replace("$((8 * SLURM_NNODES))", "16")
    return shlex.split(re.sub(r"\$(\w+)", lambda match: NAMES.get(match[1], "1"), command))


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_bash_can_read_the_script(name):
    checked = subprocess.run(["bash", "-n"], input=scripts()[name], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_the_parsers_know_every_flag(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init.main([])
    for folder in (tmp_path / "examples" / "accelerate_configs", tmp_path / "configs"):
        shutil.copytree(ZERO2.parent, folder)
    shutil.copy("cyclealign.yaml", "configs")
    arguments = [re.sub("^/configs/", "configs/", part) for part in training_arguments(scripts()[name])]
    own, launcher = train.make_parser().split(arguments)
    launch = launch_command_parser().parse_args([*launcher, "script"])
    assert (launch.num_machines, launch.num_processes, launch.machine_rank) == (2, 16, 1)
    assert launch.main_process_ip == ("node-0" if name == "slurm" else "cyclealign-0.cyclealign")
    assert Path(launch.config_file).is_file()
    _, _, _, args, *_ = train.make_parser().parse([*own, "--use_cpu", "true", "--bf16", "false"])
    assert (args.output_dir, args.resume_from_checkpoint, args.ddp_timeout) == ("out", "true", 900)
    assert args.ranking_timeout < args.ddp_timeout


def test_the_pods_find_each_other_and_the_volume():
    service, job, container = kubernetes()
    assert (service["spec"]["clusterIP"], job["spec"]["completionMode"]) == ("None", "Indexed")
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--main_process_ip {name}-0.{pod['subdomain']} " in scripts()["kubernetes"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert job["spec"]["completions"] * container["resources"]["limits"]["nvidia.com/gpu"] == 16
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", [SLURM, KUBERNETES], ids=lambda path: path.name)
def test_keys_come_from_the_environment_or_a_secret(path):
    text = path.read_text(encoding="utf-8")
    assert "OPENAI_API_KEY" in text
    assert "api_key" not in text
    assert not re.search(r"OPENAI_API_KEY=[\"']?[^.\"'\s]", text)
    (variable,) = [entry for entry in kubernetes()[2]["env"] if entry["name"] == "OPENAI_API_KEY"]
    assert set(variable) == {"name", "valueFrom"}


@pytest.mark.parametrize("path", [SLURM, KUBERNETES], ids=lambda path: path.name)
def test_the_recipes_are_documented_as_not_run(path):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"`examples/launch/{path.name}`" in page
    assert "Not run on a real cluster." in path.read_text(encoding="utf-8")
