"""Formats of data with reference orders."""

import json

import pytest

from cyclealign_trl.evaluation.references import ReferenceRanking, read_references

USER = [{"role": "user", "content": "Why?"}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("row", "prompt", "completions", "ranks"),
    [
        ({"prompt": "Why?", "completions": ["a", "b", "c"], "ranks": [2, 0, 1]}, "Why?", "abc", (2, 0, 1)),
        ({"prompt": "Why?", "completions": ["a", "b", "c"], "rewards": [0.1, 2.0, 2.0]}, "Why?", "abc", (1, 0, 0)),
        ({"prompt": "Why?", "completions": ["a", "b", "c"], "ranks": [-1, 1, 0]}, "Why?", "bc", (1, 0)),
        ({"prompt": USER, "completions": [assistant("a"), assistant("b")], "ranks": [1, 0]}, USER, "ab", (1, 0)),
        ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, "Why?", "ab", (0, 1)),
        ({"prompt": USER, "chosen": assistant("a"), "rejected": assistant("b")}, USER, "ab", (0, 1)),
        ({"chosen": USER + assistant("a"), "rejected": USER + assistant("b")}, USER, "ab", (0, 1)),
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
        # Equal texts are merged at their best rank.
        ({"prompt": "Why?", "completions": ["a", "b", "a"], "ranks": [2, 1, 0]}, "Why?", "ab", (0, 1)),
    ],
)  # fmt: skip
def test_each_format(row, prompt, completions, ranks):
    [reference], dropped = read_references([row])
    assert (reference.prompt, reference.completions, reference.ranks) == (prompt, tuple(completions), ranks)
    assert not dropped


def test_only_columns_that_do_not_reveal_the_order_are_metadata():
    row = {"id": "x", "prompt": "Why?", "chosen": ["a"], "rejected": ["b"], "num_correct": 1, "subset": 3}
    [reference], _ = read_references([row])
    assert reference == ReferenceRanking("Why?", ("a", "b"), (0, 1), "3", {"id": "x", "subset": 3})


def test_rows_without_an_ordered_pair_are_counted():
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
        ({"text": "a"}, r"Row 1 has no readable reference order: it needs .* It has \['text'\]"),
        ({"prompt": "Why?", "completions": ["a", "b"]}, "Row 1 .* neither ranks nor rewards"),
        ({"prompt": "Why?", "completions": ["a", "b"], "ranks": [0]}, "Row 1 .* 2 completions but 1 ranks"),
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": [0, 1]}, "Row 1 "),
        ({"prompt": "Why?", "responses": [{"text": "a"}, {"text": None}], "scores": [0, 1]}, "Row 1 .* got None"),
    ],
)
def test_unreadable_row_raises_with_its_number(row, message):
    with pytest.raises(ValueError, match=message):
        read_references([{"prompt": "Why?", "completions": ["a", "b"], "ranks": [1, 0]}, row])


def test_published_pairs_with_subsets(optional_data):
    text = (optional_data / "data" / "hhh_alignment_221.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    references, dropped = read_references(rows)
    assert len(references) + dropped.total() == 221
    assert {reference.subset for reference in references} == {"harmless", "helpful", "honest", "other"}
