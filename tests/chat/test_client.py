"""`ChatClient` as any caller uses it; what it does for rankings, `test_llm.py` tests."""

import json

import pytest

from cyclealign_trl.chat.client import ChatAnswer, ChatClient, ChatFailure, ChatTask
from cyclealign_trl.chat.dialect import ReplySchema
from cyclealign_trl.chat.replies import InvalidReply
from cyclealign_trl.chat.settings import ChatSettings
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply

SCHEMA = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}


def task(question):
    """Asks for one word, and takes no other."""

    def messages(note):
        return [{"role": "user", "content": question if note is None else f"{question} {note}"}]

    def read(reply):
        if reply != "yes":
            raise InvalidReply("wrong_word", f"{reply!r} is not 'yes'")
        return len(reply)

    return ChatTask(messages, read, ReplySchema("a_word", SCHEMA), refusal_note="Say yes.")


@pytest.fixture
def ask():
    """Asks questions of an endpoint that answers by the question's text, and returns the answers by question."""
    opened = []

    def start(respond, *questions):
        endpoint = LoopbackEndpoint(respond).start()
        client = ChatClient(ChatSettings("a-model", endpoint.base_url, max_retries=1))
        opened.extend([client, endpoint])
        answers = dict(client.stream([task(question) for question in questions]))
        return [answers[position] for position in range(len(questions))], endpoint.requests

    yield start
    for resource in opened:
        resource.close()


def test_a_reply_is_what_the_task_reads(ask):
    [answer], [body] = ask(lambda body: Reply("yes"), "Well?")
    assert isinstance(answer, ChatAnswer)
    assert (answer.value, answer.usage.attempts) == (3, 1)
    assert body["messages"] == [{"role": "user", "content": "Well?"}]
    assert body["response_format"]["json_schema"] == {"name": "a_word", "strict": True, "schema": SCHEMA}


def test_what_the_task_refuses_is_asked_again_with_its_words(ask):
    [answer], bodies = ask(lambda body: Reply("yes" if "not valid" in str(body) else "no"), "Well?")
    assert (answer.value, answer.usage.attempts) == (3, 2)
    assert "'no' is not 'yes'" in bodies[1]["messages"][0]["content"]


def test_a_refusal_is_answered_with_the_tasks_note(ask):
    [answer], bodies = ask(lambda body: Reply("yes") if "Say yes." in str(body) else Reply(refusal="Never."), "Well?")
    assert answer.value == 3
    assert len(bodies) == 2


def test_what_stays_wrong_is_a_failure_of_its_task_alone(ask):
    (doomed, fine), _ = ask(lambda body: Reply("no" if "doomed" in json.dumps(body) else "yes"), "doomed", "Well?")
    assert isinstance(doomed, ChatFailure)
    assert (doomed.reason, doomed.usage.attempts) == ("wrong_word", 2)
    assert fine.value == 3
