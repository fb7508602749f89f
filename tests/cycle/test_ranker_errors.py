"""A ranker that raises `RankerError` in the middle of a run, or that never ranks anything."""

import json
import logging
from contextlib import closing
from pathlib import Path

import pytest

from cyclealign_trl import LLMRanker, RankerError, TooManyFailuresError
from cyclealign_trl.chat import client
from cyclealign_trl.cycle import guards
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.cycle.stubs import DigestRanker, make_trainer, prompts, read_log

VALID = Reply('{"ranking": ["B", "C", "A"], "improved_response": "better"}')
SETTINGS = {"stub_generation": True, "num_interactions": 1, "cache_rankings": False}  # 2 prompts in a step


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)


def error(status, message="no", **fields):
    return Reply(status=status, body=json.dumps({"error": {"message": message, **fields}}))


class Revoked:
    """Endpoint that answers a number of calls, and then rejects all until it is open again."""

    def __init__(self, reply, num_calls):
        self.reply, self.num_calls, self.open = reply, num_calls, False
        self.calls = 0

    def __call__(self, body):
        self.calls += 1
        return VALID if self.open or self.calls <= self.num_calls else self.reply


def run(folder, endpoint, resume=None, number=24, **changes):
    with closing(LLMRanker("judge", endpoint.base_url, max_concurrency=1)) as ranker:
        trainer = make_trainer(folder, ranker, prompts(number), **SETTINGS, **changes)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("reply", "step"),
    [(error(401, "Incorrect API key"), 4), (error(403, "Forbidden"), 7), (error(404, "no such model"), 7)],
    ids=["key", "permission", "model"],
)
def test_a_judge_that_is_withdrawn_stops_the_run_with_a_checkpoint(tmp_path, reply, step):
    """Three steps are ranked. HTTP 403 and 404 are fatal after eight in a row, in the fourth step after that."""
    respond = Revoked(reply, 6)
    with LoopbackEndpoint(respond) as endpoint:
        with pytest.raises(RankerError, match=rf"HTTP {reply.status}.* Resume with .*checkpoint-{step}'"):
            run(tmp_path, endpoint, max_ranking_failures=1.0)
        assert (tmp_path / f"checkpoint-{step}" / "cyclealign.complete").exists()
        respond.open = True
        resumed = run(tmp_path, endpoint, resume=True)
    assert resumed.state.global_step == 12
    rows = read_log(tmp_path)
    assert [row["failure"] is None for row in rows] == [True] * 6 + [False] * 2 * (step - 3) + [True] * 2 * (12 - step)


class Poisoned(DigestRanker):
    """Raises for one of the prompts."""

    fingerprint = None

    def rank(self, requests):
        if any(request.prompt == self.poison for request in requests):
            raise RankerError("The ranker is lost.")
        return super().rank(requests)


def test_a_prompt_that_always_raises_does_not_end_every_resume(tmp_path):
    ranker = Poisoned()
    ranker.poison = None
    probe = make_trainer(tmp_path / "probe", ranker, prompts(8), **SETTINGS)
    probe.train()
    ranker.poison = ranker.requests[4].prompt  # in the third step
    with pytest.raises(RankerError, match=r"lost\. Resume with .*checkpoint-3"):
        make_trainer(tmp_path / "run", ranker, prompts(8), **SETTINGS).train()
    resumed = make_trainer(tmp_path / "run", ranker, prompts(8), **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert [row["failure"] for row in read_log(tmp_path / "run")] == [None] * 4 + ["RankerError"] * 2 + [None] * 2


def test_an_error_in_an_evaluation_saves_the_run(tmp_path):
    ranker = Poisoned()
    ranker.poison = "Question 99:"
    evaluated = prompts(100).select([99])
    trainer = make_trainer(
        tmp_path, ranker, prompts(8), eval_dataset=evaluated, eval_strategy="steps", eval_steps=3, **SETTINGS
    )
    with pytest.raises(RankerError, match=r"lost\. Resume with .*checkpoint-3") as caught:
        trainer.train()
    assert caught.value.__cause__ is None
    assert (tmp_path / "checkpoint-3" / "cyclealign.complete").exists()
    with pytest.raises(RankerError, match=r"^The ranker is lost\.$"):
        make_trainer(tmp_path / "alone", ranker, prompts(8), eval_dataset=evaluated, **SETTINGS).evaluate()


REFUSED = {
    "flagged": (error(403, "input was flagged"), "refusal"),
    "prompt": (error(400, "Invalid prompt", code="invalid_prompt"), "refusal"),
    "inspection": (error(400, "no", code="data_inspection_failed"), "refusal"),
    "llama.cpp": (error(400, "the request exceeds the available context size"), "too_long"),
    "TGI": (error(422, "inputs tokens + max_new_tokens must be <= 4096"), "too_long"),
    "unknown": (error(422, "no"), "rejected"),
}


@pytest.mark.parametrize(("reply", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refused_prompt_is_skipped(tmp_path, reply, reason):
    with LoopbackEndpoint(lambda body: reply if "Question 5:" in str(body) else VALID) as endpoint:
        trainer = run(tmp_path, endpoint, number=8, use_dynamic_demonstrations=False)
    assert trainer.state.global_step == 4
    failures = {row["prompt"]: row["failure"] for row in read_log(tmp_path)}
    assert failures.pop("Question 5:") == reason
    assert set(failures.values()) == {None}


def exhausted(body):
    """Reply of a model that spends all tokens on reasoning."""
    limit = body["max_tokens"]
    usage = {"prompt_tokens": 9, "completion_tokens": limit, "completion_tokens_details": {"reasoning_tokens": limit}}
    return Reply("", finish_reason="length", usage=usage)


ALWAYS_FAILING = {
    "reasoning": (exhausted, r"truncated: 8.*8,192 of its tokens are reasoning"),
    "garbage": (lambda body: Reply("I like them all."), r"unparsable: 8.*I like them all"),
    "server": (lambda body: error(500, "out of order"), r"server_error: 8.*HTTP 500: out of order"),
}


@pytest.mark.parametrize(("respond", "message"), ALWAYS_FAILING.values(), ids=ALWAYS_FAILING)
def test_a_run_stops_if_its_first_rankings_all_fail(tmp_path, respond, message):
    with LoopbackEndpoint(respond) as endpoint, pytest.raises(TooManyFailuresError, match=message):
        run(tmp_path, endpoint)
    assert {path.name for path in Path(tmp_path).glob("checkpoint-*")} == {"checkpoint-4"}


@pytest.mark.parametrize(("respond", "message"), ALWAYS_FAILING.values(), ids=ALWAYS_FAILING)
def test_a_short_run_that_learned_nothing_ends_with_an_error_in_the_log(tmp_path, caplog, respond, message):
    with (
        LoopbackEndpoint(respond) as endpoint,
        caplog.at_level(logging.ERROR, logger=guards.__name__),
    ):
        run(tmp_path, endpoint, number=4)
    [record] = [record for record in caplog.records if record.name == guards.__name__]
    assert record.levelno == logging.ERROR
    assert "LEARNED NOTHING" in record.getMessage()
    assert message.partition(":")[0] in record.getMessage()


def test_a_run_with_one_ranking_ends_without_an_error(tmp_path, caplog):
    with LoopbackEndpoint(Revoked(Reply("?"), 1)) as endpoint:
        run(tmp_path, endpoint, number=4)
    assert "LEARNED NOTHING" not in caplog.text
