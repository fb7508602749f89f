"""Output directories of several machines: shared or separate, and whether `save_on_each_node` fits."""

from types import SimpleNamespace

import pytest

from cyclealign_trl.training import machines
from tests.training.processes import Processes

PER_MACHINE = 2


def check(monkeypatch, directories, save_on_each_node=False, save_strategy="steps"):
    """Check the directories, one per machine of two processes, and return the message on each process."""
    processes = Processes(PER_MACHINE * len(directories))
    monkeypatch.setattr(machines, "gather_object", processes.gather_object)
    monkeypatch.setattr(machines, "_WAIT", 0.1)

    def act(index):
        machines.check_output_dir(
            SimpleNamespace(
                output_dir=str(directories[index // PER_MACHINE]),
                world_size=PER_MACHINE * len(directories),
                process_index=index,
                local_process_index=index % PER_MACHINE,
                save_on_each_node=save_on_each_node,
                save_strategy=save_strategy,
            )
        )

    outcomes = processes.run(act)
    assert all(list(directory.iterdir()) == [] for directory in directories if directory.exists())
    assert all(error is None or type(error) is ValueError for error in outcomes)
    return [error and str(error) for error in outcomes]


@pytest.mark.parametrize("launcher", [True, False], ids=["torchrun", "other"])
def test_one_machine_is_not_checked(tmp_path, monkeypatch, launcher):
    if launcher:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert check(monkeypatch, [tmp_path / "out"], save_on_each_node=True) == [None] * 2
    assert not (tmp_path / "out").exists()


def test_a_shared_directory_needs_no_setting(tmp_path, monkeypatch):
    assert check(monkeypatch, [tmp_path / "out"] * 3) == [None] * 6


def test_a_shared_directory_with_save_on_each_node_raises_on_all_processes(tmp_path, monkeypatch):
    messages = check(monkeypatch, [tmp_path / "a", tmp_path / "b", tmp_path / "a"], save_on_each_node=True)
    assert len(messages) == 6
    assert all("several machines (those of processes 0, 4)" in message for message in messages)


def test_separate_directories_need_save_on_each_node(tmp_path, monkeypatch):
    directories = [tmp_path / "a", tmp_path / "b", tmp_path / "a"]
    messages = check(monkeypatch, directories)
    assert all("not one directory for all 3 machines: the machines of processes 2 do" in text for text in messages)
    assert all("save_on_each_node=True" in message for message in messages)
    assert check(monkeypatch, directories[:2], save_on_each_node=True) == [None] * 4


def test_separate_directories_without_checkpoints_are_silent(tmp_path, monkeypatch):
    assert check(monkeypatch, [tmp_path / "a", tmp_path / "b"], save_strategy="no") == [None] * 4


@pytest.mark.parametrize("rank", [1, 2])
def test_a_file_that_appears_late_is_found(tmp_path, monkeypatch, rank):
    calls = []

    def exists(path):
        calls.append(path)
        return len(calls) > rank

    monkeypatch.setattr(machines.Path, "exists", exists)
    assert machines._appears(tmp_path / "file")
    assert len(calls) == rank + 1
