"""`ChatClient` and its settings. `tests/rankers/test_llm.py` tests the client with rankings."""

import json
from dataclasses import FrozenInstanceError

import pytest

from cyclealign_trl.chat.client import ChatAnswer, ChatClient, ChatFailure, ChatTask
from cyclealign_trl.chat.dialect import ReplySchema
from cyclealign_trl.chat.replies import InvalidReply
from cyclealign_trl.chat.settings import ChatSettings
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply

SCHEMA = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}


def yes_task(question):
    """Return a task that accepts no reply but "yes"."""

    def messages(note):
        return [{"role": "user", "content": question if note is None else f"{question} {note}"}]

    def read(reply):
        if reply != "yes":
            raise InvalidReply("wrong_word", f"{reply!r} is not 'yes'")
        return len(reply)

    return ChatTask(messages, read, ReplySchema("a_word", SCHEMA), refusal_note="Say yes.")


@pytest.fixture
def ask():
    """Return a function that runs tasks at an endpoint, and returns their answers and the request bodies."""
    opened = []

    def start(respond, *tasks):
        endpoint = LoopbackEndpoint(respond).start()
        client = ChatClient(ChatSettings("a-model", endpoint.base_url, max_retries=1))
        opened.extend([client, endpoint])
        answers = dict(client.stream(tasks))
        return [answers[position] for position in range(len(tasks))], endpoint.requests

    yield start
    for resource in opened:
        resource.close()


def test_an_answer_is_the_value_that_the_task_reads(ask):
    [answer], [body] = ask(lambda body: Reply("yes"), yes_task("Well?"))
    assert isinstance(answer, ChatAnswer)
    assert (answer.value, answer.usage.attempts) == (3, 1)
    assert body["messages"] == [{"role": "user", "content": "Well?"}]
    assert body["response_format"]["json_schema"] == {"name": "a_word", "strict": True, "schema": SCHEMA}


def test_an_invalid_reply_is_retried_with_the_error_message(ask):
    [answer], bodies = ask(lambda body: Reply("yes" if "not valid" in str(body) else "no"), yes_task("Well?"))
    assert (answer.value, answer.usage.attempts) == (3, 2)
    assert "'no' is not 'yes'" in bodies[1]["messages"][0]["content"]


def test_a_refusal_is_retried_with_the_note_of_the_task(ask):
    respond = lambda body: Reply("yes") if "Say yes." in str(body) else Reply(refusal="Never.")  # noqa: E731
    [answer], bodies = ask(respond, yes_task("Well?"))
    assert answer.value == 3
    assert len(bodies) == 2


def test_a_persistent_error_fails_only_its_task(ask):
    respond = lambda body: Reply("no" if "doomed" in json.dumps(body) else "yes")  # noqa: E731
    (doomed, fine), _ = ask(respond, yes_task("doomed"), yes_task("Well?"))
    assert isinstance(doomed, ChatFailure)
    assert (doomed.reason, doomed.usage.attempts) == ("wrong_word", 2)
    assert fine.value == 3


def test_a_task_without_a_schema_sends_only_its_own_fields(ask):
    plain = ChatTask(lambda note: [{"role": "user", "content": "Well?"}], str, fields={"top_p": 0.5})
    [answer], [body] = ask(lambda body: Reply("It depends on", finish_reason="length"), plain)
    assert (answer.value, answer.usage.attempts) == ("It depends on", 1)
    assert body == {"model": "a-model", "messages": [{"role": "user", "content": "Well?"}], "top_p": 0.5}


def test_settings_do_not_show_secrets():
    settings = ChatSettings("a-model", api_key="sk-secret", extra_body={"token": "secret"})
    assert "secret" not in repr(settings)


def test_settings_are_immutable():
    extra_body = {"top_k": 5}
    settings = ChatSettings("a-model", extra_body=extra_body)
    extra_body["top_k"] = 6
    assert settings.extra_body == {"top_k": 5}
    with pytest.raises(FrozenInstanceError):
        settings.seed = 1
