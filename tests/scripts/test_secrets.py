"""Runs against an endpoint that echoes the API key: no file, log, output or error may contain the key."""

import base64
import json
import logging
import random
import re
import sqlite3
import traceback
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest

from cyclealign_trl import LLMRanker, RankerError, RankingRequest
from cyclealign_trl.chat import client
from cyclealign_trl.cli import main
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import prompts
from tests.evaluation.stubs import make_rows

KEY = "sk-very+secret/0123456789=abcdef"
SHORTEST = 12  # number of consecutive characters of the key that count as a leak


def encoded(text):
    """Yield the part of the Base64 text that does not depend on the surrounding text, for each alignment."""
    for before in range(3):
        whole = base64.b64encode(b"x" * before + text.encode() + b"yy").decode()
        yield whole[4 * (before > 0) : (before + len(text)) // 3 * 4]


FORMS = [
    *(KEY[start : start + SHORTEST] for start in range(0, len(KEY) - SHORTEST + 1, 4)),
    quote(KEY, safe="")[4:24],
    *(form[:20] for form in encoded(KEY)),
    *(form[:20].translate(str.maketrans("+/", "-_")) for form in encoded(KEY)),
]


def leaks(text):
    return [form for form in FORMS if form in text]


def texts_of(path):
    """Yield the content of a file, raw and decoded."""
    yield path.read_bytes().decode("latin-1")
    if path.suffix == ".parquet":
        yield str(pq.read_table(path).to_pylist())
    if path.suffix == ".sqlite":
        with sqlite3.connect(path) as database:
            yield "\n".join(database.iterdump())
        database.close()


def echoes(body):
    """Return replies that contain the key: rankings, errors, refusals and malformed replies."""
    header = f"Authorization: Bearer {KEY}"
    in_base64 = (base64.b64encode(f"{pad}{header}".encode()).decode() for pad in ("", " ", "  "))
    other = " ".join([quote(KEY, safe=""), *in_base64])
    labels = re.findall(
        r"# Completion ([A-Z]+)$", body["messages"][-1]["content"].rpartition("### Inst")[2], re.MULTILINE
    )
    ranking = {"ranking": labels, "improved_response": f"Better. {header} {other}"}
    valid = Reply(json.dumps(ranking), headers={"X-Echo": header})
    return [
        valid, valid, valid,
        Reply(f"{header} {other}", status=500, headers={"X-Echo": header}),
        Reply(f"{header} {other}", status=429, headers={"Retry-After": KEY}),
        Reply(status=503, body=f"<html>{header} {other}\x1b[31m</html>"),
        Reply(f"{header} {other}"),
        Reply(json.dumps({**ranking, "ranking": [header, other]})),
        Reply(refusal=f"{header} {other}"),
        Reply(f"{header} {other}", finish_reason="length"),
        Reply(body=f"{header} {other}"),
        Reply(body=json.dumps({"choices": [], "echo": header})),
    ]  # fmt: skip


@pytest.fixture
def echoing(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.001)
    rng = random.Random(0)
    with LoopbackEndpoint(lambda body: rng.choice(echoes(body)), api_key=KEY) as endpoint:
        yield endpoint


@pytest.fixture
def output(caplog, capfd):
    """Return a function that reads all printed and logged text."""
    caplog.set_level(logging.DEBUG)

    def read():
        out, err = capfd.readouterr()
        formatter = logging.Formatter()
        records = [f"{formatter.format(record)} {record.args}" for record in caplog.records]
        return "\n".join([out, err, *records])

    return read


def assert_no_leaks(folder, text):
    files = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts]
    assert files
    for path in files:
        for content in texts_of(path):
            assert not leaks(content), path
    assert not leaks(text)


def test_the_leak_search_finds_all_forms_of_the_key(tmp_path):
    for pad in ("", "a", "ab"):
        assert leaks(base64.b64encode(f"{pad}Bearer {KEY}".encode()).decode())
        assert leaks(base64.urlsafe_b64encode(f"{pad}{KEY}{pad}".encode()).decode())
    assert leaks(quote(KEY, safe=""))
    assert leaks(KEY[3:25])
    with sqlite3.connect(tmp_path / "a.sqlite") as database:
        database.execute(f"CREATE TABLE '{KEY}' (a)")
    database.close()
    with pytest.raises(AssertionError, match=r"a\.sqlite"):
        assert_no_leaks(tmp_path, "")


def test_training_does_not_leak_the_key(tmp_path, echoing, output):
    make_model().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    prompts(4).to_json(tmp_path / "prompts.jsonl")
    main(["train", "--model_name_or_path", str(tmp_path / "policy"), "--dataset_name", str(tmp_path / "prompts.jsonl"),
          "--output_dir", str(tmp_path / "out"), "--ranker_model", "judge", "--ranker_base_url", echoing.base_url,
          "--ranker_kwargs", '{"max_retries": 1}', "--max_prompt_length", "32", "--max_completion_length", "8",
          "--per_device_train_batch_size", "4", "--max_steps", "6", "--save_steps", "2", "--logging_steps", "1",
          "--num_generations", "3", "--num_interactions", "2", "--max_ranking_failures", "1.0", "--use_cpu",
          "--log_completions", "--report_to", "none"])  # fmt: skip
    logged = [row for path in (tmp_path / "out" / "interactions").iterdir() for row in pq.read_table(path).to_pylist()]
    improved = [row["improved_completion"] for row in logged if row["improved_completion"]]
    assert len(improved) > 5
    assert all("Better. Authorization: Bearer [API key] [API key] " in text for text in improved)
    assert len({row["failure"] for row in logged}) > 3
    assert (tmp_path / "out" / "checkpoint-6" / "training_args.bin").is_file()
    assert_no_leaks(tmp_path, output())


def test_judging_does_not_leak_the_key(tmp_path, echoing, output):
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(60)))
    main(["judge", "--dataset_name", str(tmp_path / "ranked.jsonl"), "--output_dir", str(tmp_path / "out"),
          "--ranker_model", "judge", "--ranker_base_url", echoing.base_url, "--ranker_kwargs", '{"max_retries": 1}',
          "--max_demonstrations", "1"])  # fmt: skip
    lines = (tmp_path / "out" / "rankings.jsonl").read_text()
    assert len({json.loads(line)["failure"] for line in lines.splitlines()}) > 3
    assert "[API key]" in lines
    assert_no_leaks(tmp_path / "out", output())


@pytest.mark.parametrize(("command", "status"), [("train", 401), ("judge", 400), ("judge", 401), ("judge", 404)])
def test_a_fatal_error_does_not_leak_the_key(tmp_path, output, monkeypatch, status, command):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(4)))
    make_model().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    shape = json.dumps({"error": {"message": f"Incorrect key {KEY}\x1b[2J", "code": KEY, "param": KEY}})
    arguments = ["--dataset_name", str(tmp_path / "ranked.jsonl"), "--output_dir", str(tmp_path / "out")]
    if command == "train":
        arguments += ["--model_name_or_path", str(tmp_path / "policy"), "--max_prompt_length", "32", "--use_cpu",
                      "--max_completion_length", "8", "--per_device_train_batch_size", "4"]  # fmt: skip
    with (
        LoopbackEndpoint(lambda body: Reply(status=status, body=shape)) as endpoint,
        pytest.raises(SystemExit) as stop,
    ):
        main([command, *arguments, "--ranker_model", "judge", "--ranker_base_url", endpoint.base_url])
    assert "[API key]" in stop.value.code
    assert "\x1b" not in stop.value.code
    everything = "".join(traceback.format_exception(stop.value)) + output()
    assert_no_leaks(tmp_path, everything)


def test_the_key_is_not_sent_to_a_redirect_target(output):
    with LoopbackEndpoint(lambda body: Reply('{"ranking": ["A", "B"]}'), api_key=KEY) as target:
        headers = {"Location": f"{target.base_url}/chat/completions"}
        with LoopbackEndpoint(lambda body: Reply(f"Go. {KEY}", status=307, headers=headers)) as endpoint:
            ranker = LLMRanker("judge", endpoint.base_url, KEY, max_retries=0)
            try:
                text = str(ranker.rank([RankingRequest("Why?", ("a", "b"))]))
            except RankerError as error:
                text = "".join(traceback.format_exception(error))
            ranker.close()
        assert len(endpoint.requests) == 1
        assert not target.requests
    assert not leaks(text + output())


@pytest.mark.parametrize("command", ["train", "judge"])
def test_an_address_with_a_key_does_not_leak_it(tmp_path, output, command):
    (tmp_path / "ranked.jsonl").write_text(json.dumps(make_rows(1)[0]))
    address = f"http://127.0.0.1:9/v1?key={KEY}"
    with pytest.raises(SystemExit) as stop:
        main([command, "--dataset_name", str(tmp_path / "ranked.jsonl"), "--output_dir", str(tmp_path / "out"),
              "--ranker_model", "judge", "--ranker_base_url", address])  # fmt: skip
    assert "without user, password or query" in stop.value.code
    assert not leaks("".join(traceback.format_exception(stop.value)) + output())


def test_a_key_that_is_a_common_word_stays_in_texts():
    reply = json.dumps({"ranking": ["A", "B"], "improved_response": "There is none."})
    with LoopbackEndpoint(lambda body: Reply(reply)) as endpoint:
        ranker = LLMRanker("judge", endpoint.base_url, "none")
        [outcome] = ranker.rank([RankingRequest("Why?", ("a", "b"))])
        ranker.close()
    assert outcome.improved_completion == "There is none."
