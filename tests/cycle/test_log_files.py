"""Files of the interaction log: merging, crashes, and repeated steps."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from cyclealign_trl.cycle import log_files
from cyclealign_trl.cycle.interaction import InteractionResult
from cyclealign_trl.cycle.interaction_log import InteractionLog


@pytest.fixture
def fan_in(monkeypatch):
    """Merge blocks of 3, 9, 27, ... steps."""
    monkeypatch.setattr(log_files, "FAN_IN", 3)


def write(folder, step, process_index=0, version=0):
    """Write two rows of one step."""
    results = [InteractionResult(f"{step} of {process_index}, {row}", (f"v{version}", "b"), (0, 1)) for row in (0, 1)]
    InteractionLog(folder, process_index).write(step, 0, results)


def rows(log):
    """Return step, prompt, and version of each row."""
    return [(row["step"], row["prompt"], row["completions"][0]) for row in log.read().to_pylist()]


def expected(versions, num_processes=1):
    """Return the rows of steps, of which each has a version."""
    return [
        (step, f"{step} of {process_index}, {row}", f"v{version}")
        for step, version in versions.items()
        for process_index in range(num_processes)
        for row in (0, 1)
    ]


def test_files_of_a_block_are_merged(tmp_path):
    log = InteractionLog(tmp_path)
    for step in range(2050):
        write(tmp_path, step)
        if step == 40:
            assert [path.name for path in log.paths] == [
                "step-000000-000031-0.parquet",
                *(f"step-{number:06d}-0.parquet" for number in range(32, 41)),
            ]
    assert [path.name for path in log.paths] == [
        "step-000000-001023-0.parquet",
        "step-001024-002047-0.parquet",
        "step-002048-0.parquet",
        "step-002049-0.parquet",
    ]
    assert rows(log) == expected(dict.fromkeys(range(2050), 0))
    assert pq.ParquetFile(log.paths[0]).num_row_groups == 2  # groups of about 1,024 rows


@pytest.mark.usefixtures("fan_in")
def test_each_process_merges_its_own_files(tmp_path):
    steps = 30
    rng = random.Random(0)
    for first in range(0, steps, 5):  # the processes are at most 5 steps apart
        for process_index in rng.sample(range(12), 12):
            for step in range(first, first + 5):
                write(tmp_path, step, process_index)
    log = InteractionLog(tmp_path)
    assert rows(log) == expected(dict.fromkeys(range(steps), 0), 12)
    assert len(log.paths) == 12 * 2  # 27 steps, 3 steps
    files = str(tmp_path / "interactions" / "*.parquet")
    assert load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path)).num_rows == 2 * 12 * steps


class KilledError(Exception):
    """The process was killed."""


@pytest.mark.usefixtures("fan_in")
@pytest.mark.parametrize("crash_step", [8, 26])
@pytest.mark.parametrize("resume_step", [0, 4, 7, 8])
def test_a_crash_at_any_point_loses_and_duplicates_nothing(tmp_path, monkeypatch, crash_step, resume_step):
    """Crash before each operation on a file of the step, then repeat the steps after the checkpoint."""
    operations = 0
    crash_at = -1

    def counted(function):
        def wrapped(*args, **kwargs):
            nonlocal operations
            if operations >= crash_at >= 0:  # a dead process cleans nothing up
                raise KilledError
            operations += 1
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(pq.ParquetWriter, "write_table", counted(pq.ParquetWriter.write_table))
    for point in range(100):
        folder = tmp_path / str(point)
        crash_at = -1
        for step in range(crash_step):
            write(folder, step)
        operations, crash_at = 0, point
        try:
            write(folder, crash_step)
        except KilledError:
            pass
        else:
            break
        crash_at = -1
        log = InteractionLog(folder)
        found = rows(log)
        complete = expected(dict.fromkeys(range(crash_step + 1), 0))
        assert found in (complete, complete[:-2])  # the last step is there or not
        for step in range(resume_step, crash_step):
            write(folder, step, version=1)
            versions = {number: int(resume_step <= number <= step) for number in range(crash_step)}
            assert rows(log)[: 2 * crash_step] == expected(versions)
        for step in range(crash_step, 2 * crash_step):
            write(folder, step, version=1)
        assert rows(log) == expected({step: int(step >= resume_step) for step in range(2 * crash_step)})
        assert sum(pq.read_metadata(path).num_rows for path in log.paths) == 2 * 2 * crash_step  # no leftovers
    assert point > 6


@pytest.mark.usefixtures("fan_in")
@pytest.mark.parametrize("seed", range(5))
def test_random_restarts_end_with_the_newest_rows(tmp_path, seed):
    rng = random.Random(seed)
    versions: dict[int, int] = {}
    step = 0
    for version in range(12):
        step = rng.randrange(max(0, step - 12), step + 1)
        for _ in range(rng.randrange(1, 16)):
            write(tmp_path, step, version=version)
            versions[step] = version
            step += 1
        assert rows(InteractionLog(tmp_path)) == expected(dict(sorted(versions.items())))


def test_files_of_an_earlier_version_with_other_columns_are_left(tmp_path):
    for step in range(31):
        write(tmp_path, step)
    old = InteractionLog(tmp_path).paths[3]
    pq.write_table(pq.read_table(old).drop_columns(["consistency"]), old)
    write(tmp_path, 31)
    assert len(InteractionLog(tmp_path).paths) == 32
    assert InteractionLog(tmp_path).read(["step"])["step"].to_pylist() == [step for step in range(32) for _ in (0, 1)]


def test_a_log_is_read_while_another_process_merges(tmp_path, monkeypatch):
    for step in range(31):
        write(tmp_path, step, 1)
        write(tmp_path, step, 0)
    open_file = log_files._open
    pending = [31]

    def open_after_merge(path):
        if pending and path.name == "step-000004-1.parquet":
            write(tmp_path, pending.pop(), 1)
        return open_file(path)

    monkeypatch.setattr(log_files, "_open", open_after_merge)
    steps = InteractionLog(tmp_path).read(["step"])["step"].to_pylist()
    assert not pending
    assert steps == [step for step in range(31) for _ in range(4)] + [31, 31]


def test_a_step_costs_the_same_early_and_late(tmp_path, monkeypatch):
    """Count the opened, written and deleted files of 64 steps at the start and after 2,048 steps."""
    operations: list[str] = []

    def counted(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            operations.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    counted(Path, "replace")
    counted(Path, "glob")
    counted(log_files, "_open")
    counts = []
    for step in range(2048 + 64):
        if step in (64, 2048):
            operations.clear()
        write(tmp_path, step)
        if step in (127, 2048 + 63):
            counts.append(len(operations))
    assert counts[0] == counts[1]
    assert len(list((tmp_path / "interactions").iterdir())) == 4


def test_a_published_log_is_read_as_it_is(tmp_path):
    folder = tmp_path / "interactions"
    folder.mkdir()
    table = pa.table({"step": [5, 4], "prompt": ["a", "b"]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    assert InteractionLog(tmp_path).read(["prompt"]).to_pydict() == {"prompt": ["a", "b"]}
