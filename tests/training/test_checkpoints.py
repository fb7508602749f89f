"""Which checkpoints are whole, and what is said of those that are not."""

import logging

import pytest

from cyclealign_trl.training import checkpoints


def make_checkpoint(folder, step, processes=1):
    path = folder / f"checkpoint-{step}"
    for process in range(processes):
        checkpoints.save(path, process, {"seed": 1}, {"process": process})
    checkpoints.mark_complete(path, processes)
    (path / checkpoints.TRAINER_STATE).write_text("{}")
    return path


def test_the_state_comes_back(tmp_path):
    path = make_checkpoint(tmp_path, 3, processes=2)
    assert [checkpoints.load(path, process, 2, {"seed": 1}) for process in (0, 1)] == [{"process": 0}, {"process": 1}]


@pytest.mark.parametrize("torn", ["no mark", "empty mark", "no trainer state", "half a trainer state", "empty folder"])
def test_a_torn_checkpoint_is_skipped_with_a_message(tmp_path, caplog, torn):
    whole, newer = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    if torn == "no mark":
        (newer / checkpoints.COMPLETE).unlink()
    elif torn == "empty mark":
        (newer / checkpoints.COMPLETE).write_text("")
    elif torn == "no trainer state":
        (newer / checkpoints.TRAINER_STATE).unlink()
    elif torn == "half a trainer state":
        (newer / checkpoints.TRAINER_STATE).write_text('{"epoch": 1.0, "glob')
    else:
        for path in newer.iterdir():
            path.unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.last_complete_checkpoint(tmp_path) == whole
    assert caplog.messages == [f"{newer} was not written to its end: resuming from checkpoint-9 instead."]
    with pytest.raises(ValueError, match="checkpoint-10 cannot be resumed from"):
        checkpoints.load(newer, 0, 1, {"seed": 1})


def test_the_newest_whole_one_is_taken_in_silence(tmp_path, caplog):
    for step in (2, 10, 9):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.last_complete_checkpoint(tmp_path).name == "checkpoint-10"
    assert caplog.messages == []


def test_one_that_is_being_overwritten_is_not_whole(tmp_path):
    path = make_checkpoint(tmp_path, 1)
    checkpoints.mark_incomplete(path)
    assert not checkpoints.is_complete(path)
    with pytest.raises(ValueError, match="nothing to resume from"):
        checkpoints.last_complete_checkpoint(tmp_path)


@pytest.mark.parametrize(("saved", "now"), [(1, 2), (2, 1)])
def test_another_number_of_processes_raises(tmp_path, saved, now):
    path = make_checkpoint(tmp_path, 1, saved)
    with pytest.raises(ValueError, match=f"saved by {saved} processes, and this run has {now}"):
        checkpoints.load(path, 0, now, {"seed": 1})


def test_another_setting_raises_with_both_values(tmp_path):
    path = make_checkpoint(tmp_path, 1)
    with pytest.raises(ValueError, match=r"seed was 1 and is 2; new was None and is 'x'\. Set them back"):
        checkpoints.load(path, 0, 1, {"seed": 2, "new": "x"})


def test_another_version_raises(tmp_path, monkeypatch):
    path = make_checkpoint(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "VERSION", 99)
    with pytest.raises(ValueError, match="has version 2; this package reads version 99"):
        checkpoints.load(path, 0, 1, {"seed": 1})
