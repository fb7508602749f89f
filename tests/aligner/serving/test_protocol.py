"""Parsing request bodies and building response bodies."""

import json

import pytest

from cyclealign_trl.aligner.serving.protocol import BadRequestError, completion_body, read_request

USER = {"role": "user", "content": "Hi"}


def read(**changes):
    return read_request(json.dumps({"model": "served", "messages": [USER], **changes}).encode(), "served")


def test_reads_messages_and_sampling_parameters():
    request = read(
        messages=[{"role": "developer", "content": "Be kind."}, {"role": "assistant", "content": "Yes?"}, USER],
        temperature=0, top_p=0.5, max_tokens=7, max_completion_tokens=None,
    )  # fmt: skip
    assert [message["role"] for message in request.messages] == ["system", "assistant", "user"]
    assert request.sampling == {"temperature": 0, "top_p": 0.5, "max_tokens": 7}


def test_joins_text_parts():
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]
    assert read(messages=[{"role": "user", "content": parts}]).messages[0]["content"] == "What now?"


def test_replaces_lone_surrogates():
    read(messages=[{"role": "user", "content": "a\ud800b"}]).messages[0]["content"].encode()


def test_accepts_unsupported_fields_with_neutral_values():
    read(stream=False, n=1, stop=None, tools=[], logprobs=False, response_format={"type": "text"}, user="me", seed=3)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b"[" * 10**5], ids=["empty", "broken", "array", "not UTF-8", "deep"]
)
def test_a_body_that_is_not_a_json_object_raises(text):
    with pytest.raises(BadRequestError, match="JSON object") as raised:
        read_request(text, "served")
    assert raised.value.status == 400


@pytest.mark.parametrize(
    ("changes", "param", "status"),
    [
        ({"model": None}, "model", 400),
        ({"model": 3}, "model", 400),
        ({"model": "other"}, "model", 404),
        ({"messages": None}, "messages", 400),
        ({"messages": []}, "messages", 400),
        ({"messages": "Hi"}, "messages", 400),
        ({"messages": ["Hi"]}, "messages[0]", 400),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", 400),
        ({"messages": [{"role": [], "content": "Hi"}]}, "messages[0].role", 400),
        ({"messages": [USER, {"role": "tool", "content": "Hi"}]}, "messages[1].role", 400),
        ({"messages": [{"role": "user"}]}, "messages[0].content", 400),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", 400),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", 400),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages", 400),
        ({"stream": 0}, "stream", 400),
        ({"n": 2}, "n", 400),
        ({"n": True}, "n", 400),
        ({"stop": ["a"]}, "stop", 400),
        ({"tools": [{"type": "function"}]}, "tools", 400),
        ({"response_format": {"type": "json_object"}}, "response_format", 400),
        ({"temperature": "hot"}, "temperature", 400),
        ({"temperature": -1}, "temperature", 400),
        ({"temperature": float("nan")}, "temperature", 400),
        ({"temperature": True}, "temperature", 400),
        ({"top_p": 1.5}, "top_p", 400),
        ({"max_tokens": 0}, "max_tokens", 400),
        ({"max_tokens": 1.5}, "max_tokens", 400),
        ({"max_completion_tokens": "9"}, "max_completion_tokens", 400),
        ({"seed": 1.5}, "seed", 400),
        ({"seed": True}, "seed", 400),
        ({"stream": "yes"}, "stream", 400),
        ({"stream_options": {"include_usage": True}}, "stream_options", 400),
        ({"stream": True, "stream_options": []}, "stream_options", 400),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", 400),
        ({"stream": True, "stream_options": {"chunk_size": 3}}, "stream_options", 400),
        # Parameters that change nothing
        ({"frequency_penalty": 0.5}, "frequency_penalty", 400),
        ({"presence_penalty": -1}, "presence_penalty", 400),
        ({"logit_bias": {"5": 100}}, "logit_bias", 400),
        ({"top_logprobs": 3}, "top_logprobs", 400),
        ({"tool_choice": "required"}, "tool_choice", 400),
        ({"function_call": {"name": "f"}}, "function_call", 400),
        ({"reasoning_effort": "low"}, "reasoning_effort", 400),
        ({"verbosity": "low"}, "verbosity", 400),
        ({"prediction": {"type": "content"}}, "prediction", 400),
        ({"web_search_options": {}}, "web_search_options", 400),
        ({"store": True}, "store", 400),
        ({"service_tier": "flex"}, "service_tier", 400),
        ({"top_k": 5}, "top_k", 400),
        ({"min_p": 0.1}, "min_p", 400),
        ({"repetition_penalty": 1.1}, "repetition_penalty", 400),
        ({"guided_json": {}}, "guided_json", 400),
        ({"temprature": 0.5}, "temprature", 400),
    ],
)
def test_errors_name_the_invalid_field(changes, param, status):
    with pytest.raises(BadRequestError) as raised:
        read(**changes)
    assert (raised.value.param, raised.value.status) == (param, status)
    assert param.split(".")[0].split("[")[0] in str(raised.value) or param == "messages"


@pytest.mark.parametrize(
    "fields",
    [{"stream": True}, {"stream": False}, {"stream": True, "stream_options": {"include_usage": True}},
     {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}, {"tool_choice": "auto", "tools": []},
     {"parallel_tool_calls": True}, {"store": False, "service_tier": "auto"}, {"metadata": {"a": "b"}},
     {"safety_identifier": "x", "prompt_cache_key": "y", "user": "z"}, {"top_k": None}],
)  # fmt: skip
def test_accepts_what_clients_send_by_default(fields):
    request = read(**fields)
    assert request.sampling == {}
    assert request.stream == fields.get("stream", False)
    assert request.include_usage == ("stream_options" in fields)


def test_completion_body():
    body = completion_body("served", "Hello.", 3, 2)
    assert body["choices"][0]["message"]["content"] == "Hello."
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert body["id"] != completion_body("served", "Hello.", 3, 2)["id"]
