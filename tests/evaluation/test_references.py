"""The layouts in which reference orders come."""

import json
import os
from pathlib import Path

import pytest

from cyclealign_trl.evaluation.references import ReferenceRanking, read_references

SHARED = Path(os.environ.get("CYCLEALIGN_SHARED") or Path(__file__).parents[3] / "shared")
HHH = SHARED / "data" / "hhh_alignment_221.jsonl"

USER = [{"role": "user", "content": "Why?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("row", "prompt", "completions", "ranks"),
    [
        ({"prompt": "Why?", "completions": ["a", "b", "c"], "ranks": [2, 0, 1]}, "Why?", "abc", (2, 0, 1)),
        ({"prompt": "Why?", "completions": ["a", "b", "c"], "rewards": [0.1, 2.0, 2.0]}, "Why?", "abc", (1, 0, 0)),
        ({"prompt": "Why?", "completions": ["a", "b", "c"], "ranks": [-1, 1, 0]}, "Why?", "bc", (1, 0)),
        ({"prompt": USER, "completions": [said("a"), said("b")], "ranks": [1, 0]}, USER, "ab", (1, 0)),
        ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, "Why?", "ab", (0, 1)),
        ({"prompt": USER, "chosen": said("a"), "rejected": said("b")}, USER, "ab", (0, 1)),
        ({"chosen": USER + said("a"), "rejected": USER + said("b")}, USER, "ab", (0, 1)),
        ({"chosen": "Q: Why? a", "rejected": "Q: Why? b"}, "Q: Why?", (" a", " b"), (0, 1)),
        (
            {"chosen": "\n\nHuman: Why?\n\nAssistant: It is.", "rejected": "\n\nHuman: Why?\n\nAssistant: It was."},
            USER,
            ("It is.", "It was."),
            (0, 1),
        ),
        (
            {"prompt": "Why?", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1, "subset": "Math"},
            "Why?",
            "abcd",
            (0, 1, 1, 1),
        ),
        ({"prompt": "Why?", "chosen": ["a", "b"], "rejected": ["c"], "num_correct": 2}, "Why?", "abc", (0, 0, 1)),
        (
            {"prompt": "Why?", "responses": [{"model": "m", "text": "a"}, {"text": True}], "scores": [1.5, 9.0],
             "ranking": [1, 0], "has_ties": False},
            "Why?",
            ("a", "True"),
            (1, 0),
        ),
        # Equal texts are one, at their best rank.
        ({"prompt": "Why?", "completions": ["a", "b", "a"], "ranks": [2, 1, 0]}, "Why?", "ab", (0, 1)),
    ],
)  # fmt: skip
def test_each_layout(row, prompt, completions, ranks):
    [reference], dropped = read_references([row])
    assert (reference.prompt, reference.completions, reference.ranks) == (prompt, tuple(completions), ranks)
    assert not dropped


def test_other_columns_are_metadata_and_the_order_is_not():
    row = {"id": "x", "prompt": "Why?", "chosen": ["a"], "rejected": ["b"], "num_correct": 1, "subset": 3}
    [reference], _ = read_references([row])
    assert reference == ReferenceRanking("Why?", ("a", "b"), (0, 1), "3", {"id": "x", "subset": 3})


def test_rows_that_order_nothing_are_counted():
    rows = [
        {"prompt": "Why?", "completions": ["a", "a"], "ranks": [0, 1]},
        {"prompt": "Why?", "completions": ["a", "b"], "ranks": [0, 0]},
        {"prompt": "Why?", "chosen": ["a", "b"], "rejected": []},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Who?\n\nAssistant: So."},
        {"prompt": "Why?", "completions": ["a", "b"], "ranks": [1, 0]},
    ]
    references, dropped = read_references(rows)
    assert len(references) == 1
    assert dropped == {"equal_completions": 1, "all_tied": 2, "different_prompts": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"Row 1 holds no reference order that can be read: it needs .* It has \['text'\]"),
        ({"prompt": "Why?", "completions": ["a", "b"]}, "Row 1 .* neither ranks nor rewards"),
        ({"prompt": "Why?", "completions": ["a", "b"], "ranks": [0]}, "Row 1 .* 2 completions but 1 ranks"),
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": [0, 1]}, "Row 1 "),
        ({"prompt": "Why?", "responses": [{"text": "a"}, {"text": None}], "scores": [0, 1]}, "Row 1 .* got None"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_references([{"prompt": "Why?", "completions": ["a", "b"], "ranks": [1, 0]}, row])


@pytest.mark.skipif(not HHH.exists(), reason=f"{HHH} is not here (see CYCLEALIGN_SHARED)")
def test_real_pairs_with_subsets():
    rows = [json.loads(line) for line in HHH.read_text(encoding="utf-8").splitlines()]
    references, dropped = read_references(rows)
    assert len(references) + dropped.total() == 221
    assert {reference.subset for reference in references} == {"harmless", "helpful", "honest", "other"}
