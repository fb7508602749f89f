"""Runs that are killed with SIGKILL and resumed end bit for bit like an uninterrupted one."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cycle import killed_run
from tests.cycle.stubs import read_log

# The fork server imports everything once, which saves seconds per run.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["tests.cycle.killed_run", "cyclealign_trl.cycle.cyclealign_trainer"])


def run(folder, phase=None, count=0):
    """Start or resume a run in a process of its own, and return the exit status."""
    process = FORK_SERVER.Process(target=killed_run.run, args=(str(folder), phase, count))
    process.start()
    process.join()
    return process.exitcode


def run_on_two(folder, phase=None, count=0):
    """Start or resume a run on two processes, and return the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    kill = [] if phase is None else [phase, str(count)]
    finished = subprocess.run(
        [*command, "-m", "tests.cycle.killed_run", str(folder), *kill],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return finished.returncode


def final_state(folder):
    """Return weights, demonstrations, random state and log. Usage differs, because resumed runs read the cache."""
    ends = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("end-*.json"))]
    rows = [{name: value for name, value in row.items() if name != "usage"} for row in read_log(folder)]
    return ends, rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(folder) == 0
    ends, rows = final_state(folder)
    assert ends[0]["steps"] == 12
    assert len(rows) == 12 * 4
    return ends, rows


@pytest.mark.parametrize("phase", killed_run.PHASES)
def test_a_run_killed_in_any_phase_resumes(tmp_path, uninterrupted, phase):
    # There are 24 micro-batches and 12 steps; a checkpoint is written six times.
    count = {"generate": 9, "rank": 9, "backward": 9, "log": 4, "merge": 11, "unlink": 7}.get(phase, 2)
    assert run(tmp_path / "run", phase, count) == -signal.SIGKILL
    assert run(tmp_path / "run") == 0
    assert final_state(tmp_path / "run") == uninterrupted


@pytest.mark.slow
def test_a_run_killed_on_two_processes_resumes(tmp_path):
    assert run_on_two(tmp_path / "uninterrupted") == 0
    assert run_on_two(tmp_path / "run", "backward", 7) != 0
    assert not list((tmp_path / "run").glob("end-*.json"))
    assert run_on_two(tmp_path / "run") == 0
    assert final_state(tmp_path / "run") == final_state(tmp_path / "uninterrupted")


def random_kills(seed, number):
    """Yield random phases and counts."""
    rng = random.Random(seed)
    for _ in range(number):
        phase = rng.choice(killed_run.PHASES)
        yield phase, rng.randrange(8 if phase in ("generate", "rank", "backward", "log") else 3)


def kill_and_resume(folder, kills, run, expected):
    """Resume a run after each kill, and return the number of kills. A run that ends first starts over."""
    killed = 0
    for phase, count in kills:
        if run(folder, phase, count) != 0:
            killed += 1
            continue
        assert final_state(folder) == expected
        for path in folder.glob("checkpoint-*"):
            (path / "cyclealign.complete").unlink()
    return killed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_twenty_times_resumes(tmp_path, uninterrupted, seed):
    assert kill_and_resume(tmp_path / "run", random_kills(seed, 20), run, uninterrupted) >= 15
    assert run(tmp_path / "run") == 0
    assert final_state(tmp_path / "run") == uninterrupted


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_eight_times_on_two_processes_resumes(tmp_path):
    assert run_on_two(tmp_path / "uninterrupted") == 0
    expected = final_state(tmp_path / "uninterrupted")
    assert [end["steps"] for end in expected[0]] == [6, 6]
    assert kill_and_resume(tmp_path / "run", random_kills(11, 8), run_on_two, expected) >= 4
    assert run_on_two(tmp_path / "run") == 0
    assert final_state(tmp_path / "run") == expected
