"""`AnswerStore` alone. `tests/rankers/test_cache.py` tests it with rankings."""

from contextlib import closing

from cyclealign_trl.chat.store import AnswerStore, digest


def test_the_own_answer_comes_first(tmp_path):
    with closing(AnswerStore(tmp_path / "other.sqlite")) as other:
        other.put("key", "theirs")
    with closing(AnswerStore(tmp_path / "own.sqlite", [tmp_path / "other.sqlite", tmp_path / "none.sqlite"])) as store:
        assert list(store.find("key")) == ["theirs"]
        store.put("key", "ours")
        store.put("key", "ours, later")
        assert list(store.find("key")) == ["ours, later", "theirs"]
        assert list(store.find("another")) == []


def test_a_digest_depends_only_on_the_content():
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
