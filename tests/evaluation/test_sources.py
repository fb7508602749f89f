"""What writes replies, named by texts."""

import json

import pytest

from cyclealign_trl.evaluation.sources import (
    AlignedSource,
    DatasetSource,
    EndpointSource,
    ModelSource,
    ReplySettings,
    match_key,
    parse_source,
)


def described(source):
    """Return the class of a source, its name, and what it refers to."""
    fields = {name: value for name, value in vars(source).items() if name not in ("name", "upstream", "split")}
    upstream = source.upstream and described(source.upstream)
    return (type(source), source.name, *fields.values(), *([upstream] if upstream else []))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/model", (ModelSource, "org/model", "org/model")),
        ("before=org/model", (ModelSource, "before", "org/model")),
        ("endpoint:gpt-5-mini", (EndpointSource, "gpt-5-mini", "gpt-5-mini", None)),
        (
            "GPT=endpoint:org/gpt@http://localhost:8000/v1",
            (EndpointSource, "GPT", "org/gpt", "http://localhost:8000/v1"),
        ),
        ("dataset:org/replies", (DatasetSource, "org/replies", "org/replies")),
        (
            "org/aligner+org/model",
            (AlignedSource, "org/aligner+org/model", "org/aligner", (ModelSource, "org/model", "org/model")),
        ),
        (
            "twice=a+b+endpoint:gpt@http://h:1/v1",
            (
                *(AlignedSource, "twice", "a"),
                (AlignedSource, "b+gpt", "b", (EndpointSource, "gpt", "gpt", "http://h:1/v1")),
            ),
        ),
    ],
)
def test_a_text_names_a_source(text, expected):
    assert described(parse_source(text)) == expected


def test_a_file_or_folder_wins_over_the_grammar(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b+c").mkdir()
    (tmp_path / "replies.jsonl").touch()
    assert described(parse_source("a=b+c")) == (ModelSource, "a=b+c", "a=b+c")
    assert described(parse_source("replies.jsonl")) == (DatasetSource, "replies.jsonl", "replies.jsonl")


@pytest.mark.parametrize("text", ["", " ", "x=", "--flag", "endpoint:", "endpoint:@http://h", "dataset:", "a+", "+a"])
def test_an_incomplete_text_raises_with_the_grammar(text):
    with pytest.raises(ValueError, match=r"names no model.*endpoint:MODEL@URL"):
        parse_source(text)


def test_a_missing_file_raises():
    with pytest.raises(FileNotFoundError, match=r"There is no file replies\.jsonl"):
        parse_source("replies.jsonl")


def test_the_identity_of_an_endpoint_has_no_credentials():
    source = parse_source("endpoint:gpt@http://user:secret@localhost:1/v1")
    with pytest.raises(ValueError, match="without user, password"):
        source.identity(ReplySettings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"prompt_format": "html"}, "got 'html'"),
    ],
)
def test_settings_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=message):
        ReplySettings(**options)


def test_both_formats_of_a_prompt_match():
    messages = [{"role": "user", "content": "Hi"}]
    assert match_key(messages) == match_key("\n\nHuman: Hi\n\nAssistant:") == match_key("\n\nHuman: Hi\n\nAssistant: ")
    assert match_key(messages) != match_key([{"role": "system", "content": "Hi"}])


def test_several_replies_to_one_prompt_warn_once(tmp_path, caplog):
    path = tmp_path / "replies.jsonl"
    rows = [{"prompt": f"Q{index // 3}", "completion": str(index)} for index in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    assert list(parse_source(str(path)).completions.values()) == ["0", "3"]
    assert [record.message.removeprefix(str(path)) for record in caplog.records] == [
        " has several replies to some prompts. The first one counts, and 4 others do not."
    ]
