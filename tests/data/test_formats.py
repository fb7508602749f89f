"""File formats, and rows of ranked completions and preference pairs."""

import pytest
from datasets import Dataset, Features, List, Value

from cyclealign_trl.data.formats import completion_text, file_format, ranked_row, text_feature


def message(role, content):
    return [{"role": role, "content": content}]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("rows.json", "json"),
        ("rows.jsonl", "json"),
        ("rows.jsonl.gz", "json"),
        ("folder.csv/rows.parquet", "parquet"),
        ("rows.csv.gz", "csv"),
        ("rows.txt", None),
        ("folder", None),
    ],
)
def test_the_suffix_gives_the_format(path, expected):
    assert file_format(path) == expected


def test_rewards_give_ranks_with_ties():
    row = ranked_row({"prompt": "A", "completions": ["x", "y", "z"], "rewards": [0.0, 2.0, 0.0]})
    assert (row["ranks"], row["rewards"]) == ((1, 0, 1), [0.0, 2.0, 0.0])


def test_given_ranks_take_precedence_over_rewards():
    row = ranked_row({"prompt": "A", "completions": ["x", "y"], "ranks": [1, 0], "rewards": [3.0, 0.5]})
    assert (row["ranks"], row["rewards"]) == ([1, 0], [3.0, 0.5])


def test_rewards_are_optional():
    row = ranked_row({"prompt": "A", "completions": ["x", "y"], "ranks": [1, 0], "rewards": None})
    assert (row["ranks"], row["rewards"]) == ([1, 0], None)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": message("user", "Hi"), "chosen": message("assistant", "a"), "rejected": message("assistant", "b")},
        {  # the prompt is the common beginning
            "chosen": message("user", "Hi") + message("assistant", "a"),
            "rejected": message("user", "Hi") + message("assistant", "b"),
        },
    ],
)
def test_a_preference_pair_is_two_ranked_completions(row):
    expected = {"prompt": message("user", "Hi"), "completions": ["a", "b"], "ranks": [0, 1], "rewards": None}
    assert ranked_row(row) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": [1, 0, 2]}, "2 completions but 3 ranks"),
        ({"ranks": [0]}, "2 completions but 1 ranks"),
        ({"rewards": [1.0]}, "2 completions but 1 rewards"),
        ({}, "neither ranks nor rewards; its prompt is 'A'"),
        ({"rewards": [float("nan"), 1.0]}, r"must be finite numbers, got \[nan, 1.0\]; the prompt is 'A'"),
        ({"rewards": [None, 1.0]}, "must be finite numbers"),
        ({"ranks": [0, -2]}, r"must be integers, 0 = best and -1 = absent, got \[0, -2\]"),
        ({"ranks": [0, None]}, "must be integers"),
    ],
)
def test_rows_with_invalid_ranks_or_rewards_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        ranked_row({"prompt": "A", "completions": ["x", "y"], **changes})


def test_a_completion_is_a_text_or_one_message():
    assert completion_text("x") == completion_text(message("assistant", "x")) == "x"
    for invalid in (7, ["x"], message("assistant", "x") + message("user", "y")):
        with pytest.raises(ValueError, match="must be a text or a list of one assistant message, got"):
            completion_text(invalid)


def test_features_of_texts_and_of_messages():
    rows = {False: "Hi", True: message("user", "Hi")}
    for conversational, prompt in rows.items():
        features = Features({"prompt": text_feature(conversational)})
        assert Dataset.from_list([{"prompt": prompt}]).cast(features)[0]["prompt"] == prompt
    assert text_feature(False) == Value("string")
    assert text_feature(True) == List({"role": Value("string"), "content": Value("string")})
