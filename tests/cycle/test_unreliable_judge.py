"""Runs with a judge that returns invalid replies and errors over HTTP."""

import json
import re
from collections import Counter
from contextlib import closing

import pytest

from cyclealign_trl import LLMRanker, RankerError, TooManyFailuresError
from cyclealign_trl.chat import client
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.cycle.stubs import make_trainer, prompts, read_log

KEY = "sk-secret-0123456789"
VALID = {"ranking": ["B", "C", "A"], "improved_response": "better"}

FAULTS = {
    "garbage": Reply("I would rather talk about the weather."),
    "unknown label": Reply(json.dumps({"ranking": ["B", "Z", "A"]})),
    "repeated label": Reply(json.dumps({"ranking": ["B", "B", "A"]})),
    "truncated object": Reply('{"ranking": ["B", "C", "A"], "improved_resp', finish_reason="length"),
    "refusal": Reply(refusal="I cannot rank these."),
    "HTTP 500": Reply("out of order", status=500),
    "HTTP 429": Reply("slow down", status=429, headers={"Retry-After": "0.05"}),
    "connection reset": Reply(reset=True),
    "hang": Reply(json.dumps(VALID), delay=3.0),
}
REASONS = {
    "garbage": "unparsable",
    "unknown label": "invalid_ranking",
    "repeated label": "invalid_ranking",
    "truncated object": "truncated",
    "refusal": "refusal",
    "HTTP 500": "server_error",
    "HTTP 429": "rate_limited",
    "connection reset": "connection",
    "hang": "timeout",
}


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)


def prompt_number(body):
    """Return the number of the prompt to rank, which is the last one in the request."""
    return int(re.findall(r"Question (\d+):", body["messages"][-1]["content"])[-1])


def test_prompts_without_a_valid_reply_are_logged_and_make_no_demonstration(tmp_path):
    faults = list(FAULTS)
    number = 5 * len(faults)

    def respond(body):
        index = prompt_number(body)
        return FAULTS[faults[index // 5]] if index % 5 == 0 else Reply(json.dumps(VALID))

    with (
        LoopbackEndpoint(respond, api_key=KEY) as endpoint,
        closing(LLMRanker("judge", endpoint.base_url, KEY, timeout=0.6, max_retries=1)) as ranker,
    ):
        trainer = make_trainer(
            tmp_path, ranker, prompts(number), per_device_train_batch_size=9, stub_generation=True,
            save_strategy="steps", save_steps=5,
        )  # fmt: skip
        trainer.train()

    expected = {f"Question {5 * i}:": REASONS[fault] for i, fault in enumerate(faults)}
    rows = read_log(tmp_path)
    assert len(rows) == 2 * number
    for row in rows:
        assert row["failure"] == expected.get(row["prompt"]), row
        if row["failure"] is not None:
            assert row["black_box_order"] is row["agreement"] is row["improved_completion"] is None
            assert row["usage"]["attempts"] == 2
    logged = Counter()
    for log in trainer.state.log_history[:-1]:
        logged.update({name: count for name, count in log.items() if name.startswith("failures/")})
    assert logged == {f"failures/{reason}": 2 * count for reason, count in Counter(expected.values()).items()}

    # Every demonstration in a request is an agreement in the log, and none is of a prompt with failures.
    agreed = {json.dumps(row["prompt"]) for row in rows if row["agreement"] and len(row["agreement"]) >= 2}
    demonstrated = {
        json.dumps(f"Question {number}:")
        for body in endpoint.requests
        for number in re.findall(r"Question (\d+):", body["messages"][-1]["content"])[:-1]
    }
    assert demonstrated <= agreed
    assert demonstrated.isdisjoint(map(json.dumps, expected))

    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_a_run_stopped_by_failures_resumes_when_the_judge_works_again(tmp_path):
    broken = True

    def respond(body):
        return FAULTS["HTTP 500"] if broken and prompt_number(body) % 4 else Reply(json.dumps(VALID))

    settings = {"num_train_epochs": 4, "stub_generation": True}
    with (
        LoopbackEndpoint(respond) as endpoint,
        closing(LLMRanker("judge", endpoint.base_url, max_retries=0)) as ranker,
    ):
        with pytest.raises(TooManyFailuresError, match=r"8 of the last 8 .*server_error") as error:
            make_trainer(tmp_path, ranker, **settings).train()
        checkpoint = re.search(r"resume_from_checkpoint='(.+)'", str(error.value)).group(1)
        broken = False
        resumed = make_trainer(tmp_path, ranker, **settings)
        resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 4 * 4 * 2
    assert [row["failure"] for row in read_log(tmp_path)][8:] == [None] * (4 * 8 * 2 - 8)


def test_a_wrong_key_raises(tmp_path):
    with (
        LoopbackEndpoint(lambda body: Reply(json.dumps(VALID)), api_key="another") as endpoint,
        closing(LLMRanker("judge", endpoint.base_url, KEY)) as ranker,
        pytest.raises(RankerError, match="401") as error,
    ):
        make_trainer(tmp_path, ranker).train()
    assert KEY not in str(error.value)
    assert error.value.__cause__ is None
