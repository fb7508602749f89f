"""Atomic writes."""

import pytest

from cyclealign_trl._files import atomic_write


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder" / "data.json"
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent
        assert temporary.name.endswith(".tmp")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_neither_the_file_nor_a_temporary_one(tmp_path, written):
    path = tmp_path / "data.json"

    def write():
        with atomic_write(path) as temporary:
            if written:
                temporary.write_text("half")
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_an_existing_file(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("old")

    def write():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
