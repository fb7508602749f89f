"""The Dockerfile: what it copies, its user and its settings; and, where Docker exists, its CPU stage."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTRUCTIONS = re.findall(
    r"^([A-Z]+) (.+)$",
    re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " "),
    re.MULTILINE,
)
IGNORED = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] != "#"]


def stages():
    """Return the instructions of each stage by its name."""
    by_name = {}
    for name, value in INSTRUCTIONS:
        if name == "FROM":
            by_name[value.rpartition(" AS ")[2]] = current = []
        elif by_name:
            current.append((name, " ".join(value.split())))
    return by_name


def copied():
    return {source for name, value in INSTRUCTIONS if name == "COPY" for source in value.split()[:-1]}


def test_every_copied_path_exists_and_is_sent_to_the_build():
    assert IGNORED[0] == "*"
    sent = {line[1:] for line in IGNORED if line[0] == "!"}
    assert copied() == sent
    for path in sent:
        assert (ROOT / path).exists(), path
        assert not any(fnmatch(path, pattern) for pattern in IGNORED[1:] if pattern[0] != "!"), path


def test_the_image_contains_what_the_build_of_the_package_reads():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    read = set(re.findall(r'^readme = "(.+)"$', project, re.MULTILINE))
    read |= set(re.findall(r'^license-files = \["(.+)"\]$', project, re.MULTILINE))
    assert len(read) == 2
    assert read | {"pyproject.toml", "cyclealign_trl", "constraints.txt"} == copied()


def test_the_command_runs_as_a_user_without_privileges():
    cpu, cuda = stages()["cpu"], stages()["cuda"]
    after = cpu[cpu.index(("USER", "cyclealign")) :]
    assert [name for name, _ in after] == ["USER", "WORKDIR", "ENTRYPOINT", "CMD"]
    assert ("ENTRYPOINT", '["cyclealign"]') in after
    assert cuda[0] == ("USER", "root")  # to install a compiler
    assert cuda[-1] == ("USER", "cyclealign")
    assert {value.partition("=")[0] for name, value in cpu if name == "ARG"} == {"TORCH_INDEX", "EXTRAS"}


def test_no_secret_is_written_into_the_image():
    for name, value in INSTRUCTIONS:
        if name in ("ENV", "ARG"):
            assert not re.search(r"key|token|secret|password", value, re.IGNORECASE), value


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_cpu_stage_runs_the_demo_without_a_network():
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        pytest.skip("needs Docker, and its daemon running")
    subprocess.run(["docker", "build", "--target", "cpu", "--tag", "cyclealign:test", "."], cwd=ROOT, check=True)
    command = ["docker", "run", "--rm", "--network", "none", "cyclealign:test"]
    finished = subprocess.run([*command, "demo", "--num_train_epochs", "1"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "Held-out score" in finished.stdout
    user = subprocess.run([*command[:-1], "--entrypoint", "id", command[-1], "-u"], capture_output=True, text=True)
    assert user.stdout.strip() == "1000"
