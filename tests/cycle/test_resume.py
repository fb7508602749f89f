"""Runs killed with SIGKILL wherever they are, and resumed, end as one that was never killed, bit for bit."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cycle import mortal
from tests.cycle.stubs import read_log

# A process that has imported everything once, and forks.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.cycle.mortal", "cyclealign_trl.cycle.cyclealign_trainer"])


def run(folder, phase=None, count=0):
    """Exit status of one life."""
    process = FORKS.Process(target=mortal.run, args=(str(folder), phase, count))
    process.start()
    process.join()
    return process.exitcode


def run_on_two(folder, phase=None, count=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    when = [] if phase is None else [phase, str(count)]
    finished = subprocess.run(
        [*command, "-m", "tests.cycle.mortal", str(folder), *when],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return finished.returncode


def left_behind(folder):
    """What must be the same: weights, pool, random state, and the log but for what the rankings took."""
    ends = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("end-*.json"))]
    rows = [{name: value for name, value in row.items() if name != "usage"} for row in read_log(folder)]
    return ends, rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0
    ends, rows = left_behind(folder)
    assert ends[0]["steps"] == 12
    assert len(rows) == 12 * 4
    return ends, rows


@pytest.mark.parametrize("phase", mortal.PHASES)
def test_killed_in_each_phase(tmp_path, whole, phase):
    # The second occasion is early, the fourth in the middle; a checkpoint is written six times.
    count = {"generate": 9, "rank": 9, "backward": 9, "log": 4}.get(phase, 2)
    assert run(tmp_path / "run", phase, count) == -signal.SIGKILL
    assert run(tmp_path / "run") == 0
    assert left_behind(tmp_path / "run") == whole


def test_killed_on_two_processes(tmp_path):
    assert run_on_two(tmp_path / "whole") == 0
    assert run_on_two(tmp_path / "run", "backward", 7) != 0
    assert not list((tmp_path / "run").glob("end-*.json"))
    assert run_on_two(tmp_path / "run") == 0
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")


def random_deaths(seed, number):
    chance = random.Random(seed)
    for _ in range(number):
        phase = chance.choice(mortal.PHASES)
        yield phase, chance.randrange(8 if phase in ("generate", "rank", "backward", "log") else 3)


def die_again_and_again(folder, deaths, run, expected):
    """Resumes after each death; returns how many there were. A run that comes through to its end starts over."""
    killed = 0
    for phase, count in deaths:
        if run(folder, phase, count) != 0:
            killed += 1
            continue
        assert left_behind(folder) == expected
        for path in folder.glob("checkpoint-*"):
            (path / "cyclealign.complete").unlink()
    return killed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(4))
def test_twenty_random_kills(tmp_path, whole, seed):
    assert die_again_and_again(tmp_path / "run", random_deaths(seed, 20), run, whole) >= 15
    assert run(tmp_path / "run") == 0
    assert left_behind(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_kills_on_two_processes(tmp_path):
    assert run_on_two(tmp_path / "whole") == 0
    expected = left_behind(tmp_path / "whole")
    assert [end["steps"] for end in expected[0]] == [6, 6]
    assert die_again_and_again(tmp_path / "run", random_deaths(11, 8), run_on_two, expected) >= 4
    assert run_on_two(tmp_path / "run") == 0
    assert left_behind(tmp_path / "run") == expected
