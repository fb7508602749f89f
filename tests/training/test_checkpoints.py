"""Complete and incomplete checkpoints, and errors of checkpoints that cannot be resumed."""

import logging

import pytest

from cyclealign_trl import CheckpointError
from cyclealign_trl.training import checkpoints
from cyclealign_trl.training.resumption import newest_checkpoint


def make_checkpoint(folder, step, num_processes=1):
    path = folder / f"checkpoint-{step}"
    for process in range(num_processes):
        checkpoints.save(path, process, {"seed": 1}, {"process": process})
    checkpoints.mark_complete(path, num_processes)
    (path / checkpoints.TRAINER_STATE).write_text("{}")
    return path


def test_each_process_loads_its_own_state(tmp_path):
    path = make_checkpoint(tmp_path, 3, num_processes=2)
    assert [checkpoints.load(path, process, 2, {"seed": 1}) for process in (0, 1)] == [{"process": 0}, {"process": 1}]


@pytest.mark.parametrize(
    "damage", ["no marker", "empty marker", "no trainer state", "half a trainer state", "empty folder"]
)
def test_an_incomplete_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, damage):
    complete, newer = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    if damage == "no marker":
        (newer / checkpoints.COMPLETE).unlink()
    elif damage == "empty marker":
        (newer / checkpoints.COMPLETE).write_text("")
    elif damage == "no trainer state":
        (newer / checkpoints.TRAINER_STATE).unlink()
    elif damage == "half a trainer state":
        (newer / checkpoints.TRAINER_STATE).write_text('{"epoch": 1.0, "glob')
    else:
        for path in newer.iterdir():
            path.unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path, 0) == complete
    assert caplog.messages == [f"{newer} is incomplete: resuming from checkpoint-9 instead."]
    with pytest.raises(
        CheckpointError, match=r"checkpoint-10 is not a complete checkpoint: .*the run was killed while it was written"
    ):
        checkpoints.load(newer, 0, 1, {"seed": 1})


def test_the_newest_complete_checkpoint_is_chosen_without_a_warning(tmp_path, caplog):
    for step in (2, 10, 9):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path, 0).name == "checkpoint-10"
    assert caplog.messages == []


def test_a_checkpoint_that_is_being_overwritten_is_incomplete(tmp_path):
    path = make_checkpoint(tmp_path, 1)
    checkpoints.mark_incomplete(path)
    assert not checkpoints.is_complete(path)
    with pytest.raises(CheckpointError, match=r"No complete checkpoint found in .*: there is nothing to resume from"):
        newest_checkpoint(tmp_path, 0)


@pytest.mark.parametrize(("saved", "now"), [(1, 2), (2, 1)])
def test_another_number_of_processes_raises(tmp_path, saved, now):
    path = make_checkpoint(tmp_path, 1, saved)
    with pytest.raises(CheckpointError, match=f"saved by {saved} processes, and this run has {now}"):
        checkpoints.load(path, 0, now, {"seed": 1})


def test_changed_settings_raise_with_both_values(tmp_path):
    path = make_checkpoint(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"seed was 1 and is 2; new was None and is 'x'\. Restore them"):
        checkpoints.load(path, 0, 1, {"seed": 2, "new": "x"})


def test_another_version_raises(tmp_path, monkeypatch):
    path = make_checkpoint(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "VERSION", 99)
    with pytest.raises(CheckpointError, match="has version 2; this package reads version 99"):
        checkpoints.load(path, 0, 1, {"seed": 1})


def test_the_checkpoints_of_an_earlier_run_are_loaded_only_by_name(tmp_path, caplog):
    path = make_checkpoint(tmp_path, 4)
    with caplog.at_level(logging.WARNING):
        checkpoints.set_aside(tmp_path)
    assert caplog.messages == [f"{path} belongs to an earlier run. It is resumed only if it is passed by name."]
    with pytest.raises(CheckpointError, match="No complete checkpoint"):
        newest_checkpoint(tmp_path, 0)
    assert checkpoints.load(path, 0, 1, {"seed": 1}) == {"process": 0}


def test_folders_of_earlier_runs_are_numbered(tmp_path):
    folder = tmp_path / "interactions"
    checkpoints.set_folder_aside(folder)
    for number in range(3):
        folder.mkdir()
        (folder / "run").write_text(str(number))
        checkpoints.set_folder_aside(folder)
    assert not folder.exists()
    assert {path.name: (path / "run").read_text() for path in tmp_path.iterdir()} == {
        "interactions-1": "0",
        "interactions-2": "1",
        "interactions-3": "2",
    }
