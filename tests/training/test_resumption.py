"""The processes of several machines resume from the same checkpoint, or all of them raise."""

import pytest

from cyclealign_trl import CheckpointError
from cyclealign_trl.training import checkpoints, resumption
from tests.training.processes import Processes


def write(folder, step, processes, complete=True):
    """Write what some of two processes write into the checkpoint of one machine."""
    path = folder / f"checkpoint-{step}"
    for process in processes:
        checkpoints.save(path, process, {"seed": 1}, {"process": process})
    if complete:
        checkpoints.mark_complete(path, 2)
        (path / checkpoints.TRAINER_STATE).write_text("{}")
    return path


def on_both(monkeypatch, act):
    processes = Processes(2)
    monkeypatch.setattr(resumption, "gather_object", processes.gather_object)
    return processes.run(act)


def choose(monkeypatch, folders, requested=(True, True)):
    def act(index):
        return resumption.choose_checkpoint(requested[index], folders[index], index)

    return on_both(monkeypatch, act)


def messages(errors):
    assert all(type(error) is CheckpointError for error in errors)
    return [str(error) for error in errors]


def test_the_newest_checkpoint_that_both_machines_completed_is_chosen(tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(folders):
        write(folder, 2, [index])
        write(folder, 4, [index])
        write(folder, 6, [index], complete=index == 0)  # the other machine died before the last file
    assert choose(monkeypatch, folders) == [folder / "checkpoint-4" for folder in folders]


def test_a_shared_directory_has_the_states_of_both(tmp_path, monkeypatch):
    path = write(tmp_path, 2, [0, 1])
    assert choose(monkeypatch, [tmp_path] * 2) == [path] * 2


def test_a_machine_without_a_complete_checkpoint_stops_all(tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    write(folders[0], 2, [0])
    write(folders[1], 2, [1], complete=False)
    errors = messages(choose(monkeypatch, folders))
    assert all("of step 2, is not complete for processes 1." in error for error in errors)
    assert all("save_on_each_node=True" in error for error in errors)


def test_machines_that_swapped_ranks_stop(tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(folders):
        write(folder, 2, [1 - index])
    errors = messages(choose(monkeypatch, folders))
    assert all("not complete for processes 0, 1." in error and "the rank that it had" in error for error in errors)

    paths = [folder / "checkpoint-2" for folder in folders]

    def load(index):
        return resumption.load_state(paths[index], index, 2, {"seed": 1})

    errors = messages(on_both(monkeypatch, load))
    assert errors[0].startswith(f"{paths[0] / 'cyclealign-0.json'}, the state of process 0, is missing.")


def test_nothing_to_resume_from_stops_all(tmp_path, monkeypatch):
    errors = messages(choose(monkeypatch, [tmp_path / "a", tmp_path / "b"]))
    assert all("No complete checkpoint found" in error for error in errors)


@pytest.mark.parametrize("others", [None, "checkpoint-4"])
def test_different_requests_stop_all(tmp_path, monkeypatch, others):
    requested = (tmp_path / "a" / "checkpoint-2", others and tmp_path / "b" / others)
    errors = messages(choose(monkeypatch, [tmp_path] * 2, requested))
    assert all(f"process 0 was started with checkpoint-2, process 1 with {others}" in error for error in errors)


def test_each_machine_can_name_the_checkpoint_in_its_own_directory(tmp_path, monkeypatch):
    requested = (tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    assert tuple(choose(monkeypatch, [tmp_path] * 2, requested)) == requested
    assert choose(monkeypatch, [tmp_path] * 2, (None, None)) == [None, None]


def test_a_state_that_one_process_cannot_read_stops_all(tmp_path, monkeypatch):
    path = write(tmp_path, 2, [0])

    def load(index):
        return resumption.load_state(path, index, 2, {"seed": 1})

    errors = messages(on_both(monkeypatch, load))
    assert errors[1].startswith(f"{path / 'cyclealign-1.json'}, the state of process 1, is missing.")
    assert errors[0] == f"Process 1 cannot resume. {errors[1]}"
    write(tmp_path, 2, [1])
    assert on_both(monkeypatch, load) == [{"process": 0}, {"process": 1}]
