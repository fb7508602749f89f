"""File formats, and rows of ranked completions and preference pairs."""

import re

import pytest
from datasets import Dataset, Features, List, Value

from cyclealign_trl.data.formats import check_data_path, completion_text, file_format, ranked_row, text_feature


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


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("prompts.txt", ValueError, r"prompts.txt is not a supported data file. Convert it to .json, .jsonl, "),
        ("table.xlsx", ValueError, "table.xlsx is not a supported data file"),
        ("rows.txt.gz", ValueError, "rows.txt.gz is not a supported data file"),
        ("data.csv", FileNotFoundError, "There is no file data.csv."),
        ("folder/rows.jsonl.gz", FileNotFoundError, "There is no file folder/rows.jsonl.gz."),
        ("./nowhere", FileNotFoundError, "There is no folder ./nowhere. Check the path"),
        ("/nowhere/data", FileNotFoundError, "There is no folder /nowhere/data."),
        ("~/data", FileNotFoundError, "There is no folder ~/data."),
        ("outputs/run/pairs", FileNotFoundError, "There is no folder outputs/run/pairs."),
        ("pairs/", FileNotFoundError, "There is no folder pairs/."),
        ("./prompts.text", FileNotFoundError, "There is no folder ./prompts.text."),
    ],
)
def test_local_data_that_cannot_be_read_raises(tmp_path, monkeypatch, name, error, message):
    monkeypatch.chdir(tmp_path)
    for existing in ("prompts.txt", "table.xlsx", "rows.txt.gz"):
        (tmp_path / existing).write_text("Hi")
    with pytest.raises(error, match=re.escape(message)):
        check_data_path(name)


@pytest.mark.parametrize("name", ["rows.csv", "folder", "./folder", "org/data", "org/data-v1.5", "imdb"])
def test_existing_data_and_names_on_the_hub_are_accepted(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.csv").write_text("prompt")
    check_data_path(name)


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
