"""The server over real HTTP."""

import asyncio
import contextlib
import json
import threading
import time
import urllib.request
from urllib.error import HTTPError

import openai
import pytest
from aiohttp import web

from cyclealign_trl import AlignedUpstream, EndpointUpstream, ModelUpstream
from cyclealign_trl.aligner.serving.server import AlignedServer
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.aligner.test_upstreams import Shouter, echo
from tests.conftest import make_model, make_tokenizer

KEY = "sk-of-the-server"


@contextlib.contextmanager
def serving(upstream, corrector=Shouter, **settings):
    """Run a server in a thread, and yield its address."""
    aligner = corrector(make_model(), make_tokenizer(), "labels")
    server = AlignedServer(AlignedUpstream(upstream, aligner), "aligned", **settings)
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), []

    async def start():
        runner = web.AppRunner(server.make_app(), handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        port.append(runner.addresses[0][1])
        ready.set()
        return runner

    def run():
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(10)
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def client(url, key="any", **settings):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, **{"max_retries": 0, **settings})


def ask(url, text="Hi", **settings):
    with client(url) as asking:
        messages = [{"role": "user", "content": text}]
        return asking.chat.completions.create(model="aligned", messages=messages, **settings)


def send(url, path, body=None, method=None, headers=None):
    """Send any request, and return the status and the body of the response."""
    request = urllib.request.Request(url + path, body, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_returns_the_corrected_answer():
    with serving(echo) as url:
        reply = ask(url, "How are you?")
        assert reply.choices[0].message.content == "How are you?!"
        assert reply.choices[0].finish_reason == "stop"
        assert reply.model == "aligned"
        usage = reply.usage  # one token per character
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (12, 13, 25)


def test_lists_its_model_and_reports_health():
    with serving(echo) as url, client(url) as asking:
        assert [model.id for model in asking.models.list()] == ["aligned"]
        assert send(url, "/health") == (200, {"status": "ok"})


def test_sampling_parameters_reach_the_upstream():
    def dump_sampling(prompts, **sampling):
        return [json.dumps(sampling)] * len(prompts)

    with serving(dump_sampling) as url:
        content = ask(url, temperature=0.5, top_p=0.9, max_tokens=5).choices[0].message.content
        assert json.loads(content.rstrip("!")) == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 5}


def test_a_parameter_that_the_upstream_does_not_support_is_a_bad_request():
    with serving(echo) as url, pytest.raises(openai.BadRequestError, match="does not support temperature"):
        ask(url, temperature=0.5)


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "message"),
    [
        ("/v1/chat/completions", "POST", b"{", 400, "JSON object"),
        ("/v1/chat/completions", "POST", b'{"model": "aligned", "messages": []}', 400, "at least one message"),
        (
            "/v1/chat/completions",
            "POST",
            b'{"model": "x", "messages": []}',
            404,
            "'x' does not exist. This server only has 'aligned'",
        ),
        ("/v1/chat/completions", "POST", b"x" * 2000, 413, "larger than 1,000 bytes"),
        ("/v1/chat/completions", "GET", None, 405, "Use POST"),
        ("/v1/models", "POST", b"{}", 405, "Use GET"),
        ("/v1/completions", "POST", b"{}", 404, "Use /v1/chat/completions"),
        ("/", "GET", None, 404, "/ does not exist"),
    ],
)
def test_invalid_requests_get_clear_errors(path, method, body, status, message):
    with serving(echo, max_body_size=1000) as url:
        code, answer = send(url, path, body, method)
    assert code == status
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_the_openai_client_raises_matching_errors():
    with serving(echo) as url:
        for error, settings in (
            (openai.BadRequestError, {"n": 2}),
            (openai.BadRequestError, {"temperature": 3}),
        ):
            with pytest.raises(error, match=next(iter(settings))):
                ask(url, **settings)
        with pytest.raises(openai.NotFoundError, match="does not exist"), client(url) as asking:
            asking.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "Hi"}])


def test_requests_need_the_api_key_if_one_is_set():
    with serving(echo, api_key=KEY) as url:
        for key in ("wrong", KEY[:-1], KEY + "x", "ключ"):
            code, answer = send(url, "/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
            assert (code, answer["error"]["code"]) == (401, "invalid_api_key")
            assert KEY not in answer["error"]["message"]
        assert send(url, "/v1/models")[0] == 401
        assert send(url, "/health")[0] == 200
        with client(url, KEY) as asking:
            assert next(iter(asking.models.list())).id == "aligned"


def test_a_failed_upstream_is_a_502_without_details(caplog):
    def respond(body):
        return Reply(f"internal: {body['messages'][-1]['content']} with sk-upstream", status=500)

    with (
        LoopbackEndpoint(respond) as endpoint,
        serving(EndpointUpstream("gpt", endpoint.base_url, "sk-upstream", max_retries=0)) as url,
        pytest.raises(openai.InternalServerError) as raised,
    ):
        ask(url)
    assert raised.value.status_code == 502
    assert raised.value.response.json() == {
        "error": {
            "message": "The upstream model failed.", "type": "server_error", "param": None,
            "code": "upstream_error",
        }
    }  # fmt: skip
    assert "HTTP 500" in caplog.text
    assert "sk-upstream" not in caplog.text


def test_a_bad_prompt_does_not_fail_the_others():
    def picky(prompts):
        texts = echo(prompts)
        if "bad" in texts:
            raise RuntimeError("cannot")
        return texts

    async def main(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as asking:
            calls = (
                asking.chat.completions.create(model="aligned", messages=[{"role": "user", "content": text}])
                for text in ("a", "bad", "b", "c")
            )
            return await asyncio.gather(*calls, return_exceptions=True)

    with serving(picky) as url:
        first, bad, *others = asyncio.run(main(url))
    assert [reply.choices[0].message.content for reply in (first, *others)] == ["a!", "b!", "c!"]
    assert isinstance(bad, openai.InternalServerError)


def test_a_failed_aligner_is_a_500_without_details():
    class Broken(Shouter):
        def correct(self, prompts, answers):
            raise RuntimeError("secret of the aligner")

    with serving(echo, Broken) as url, pytest.raises(openai.InternalServerError) as raised:
        ask(url)
    assert raised.value.status_code == 500
    assert "secret" not in raised.value.response.text


def test_two_hundred_concurrent_requests_get_their_own_answers():
    def slowly(prompts):
        time.sleep(0.01)
        return echo(prompts)

    async def main(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as asking:

            async def one(index):
                messages = [{"role": "user", "content": f"Question {index}"}]
                return await asking.chat.completions.create(model="aligned", messages=messages)

            return await asyncio.gather(*map(one, range(200)))

    with serving(slowly) as url:
        replies = asyncio.run(main(url))
    assert [reply.choices[0].message.content for reply in replies] == [f"Question {index}!" for index in range(200)]


def test_too_many_requests_in_flight_are_a_503():
    started, go_on = threading.Event(), threading.Event()

    def wait(prompts):
        started.set()
        go_on.wait(10)
        return echo(prompts)

    with serving(wait, max_in_flight=1) as url:
        thread = threading.Thread(target=ask, args=(url,))
        thread.start()
        started.wait(10)
        with pytest.raises(openai.InternalServerError, match="Try again later") as raised:
            ask(url)
        go_on.set()
        thread.join()
    assert raised.value.status_code == 503


# Streams


@pytest.mark.parametrize("include_usage", [None, False, True])
@pytest.mark.parametrize("text", ["Hi", "Zwei\nZeilen \u2026", ""])
def test_streams_the_corrected_answer(text, include_usage):
    options = {} if include_usage is None else {"stream_options": {"include_usage": include_usage}}
    with serving(lambda prompts: [text] * len(prompts)) as url, client(url) as asking:
        messages = [{"role": "user", "content": "Hi"}]
        chunks = list(asking.chat.completions.create(model="aligned", messages=messages, stream=True, **options))
        whole = asking.chat.completions.create(model="aligned", messages=messages)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert usages == ([whole.usage] if include_usage else [])


def test_the_stream_is_made_of_server_sent_events():
    body = json.dumps({"model": "aligned", "messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
    with serving(echo) as url, urllib.request.urlopen(f"{url}/v1/chat/completions", body, timeout=10) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_the_stream_helper_of_the_openai_client_works():
    messages = [{"role": "user", "content": "Hi"}]
    with (
        serving(echo) as url,
        client(url) as asking,
        asking.chat.completions.stream(model="aligned", messages=messages) as stream,
    ):
        assert stream.get_final_completion().choices[0].message.content == "Hi!"


def test_an_error_before_a_stream_has_its_status():
    with (
        LoopbackEndpoint(lambda body: Reply("broken", status=500)) as endpoint,
        serving(EndpointUpstream("gpt", endpoint.base_url, max_retries=0)) as url,
        pytest.raises(openai.InternalServerError) as raised,
    ):
        ask(url, stream=True)
    assert raised.value.status_code == 502


# The upstream's outcome


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "passed_on"),
    [("stop", "stop"), ("length", "length"), ("MAX_TOKENS", "length"), ("content_filter", "content_filter"),
     ("end_turn", "stop"), ("eos", "stop"), (None, "stop")],
)  # fmt: skip
def test_the_finish_reason_of_the_upstream_is_passed_on(reason, passed_on, stream):
    with (
        LoopbackEndpoint(lambda body: Reply("It depends", finish_reason=reason)) as endpoint,
        serving(EndpointUpstream("gpt", endpoint.base_url)) as url,
        client(url) as asking,
    ):
        messages = [{"role": "user", "content": "Hi"}]
        reply = asking.chat.completions.create(model="aligned", messages=messages, stream=stream)
        choice = list(reply)[-1].choices[0] if stream else reply.choices[0]
    assert choice.finish_reason == passed_on


@pytest.mark.parametrize(("max_tokens", "reason"), [(1, "length"), (3, "length")])
def test_a_model_in_this_process_states_its_finish_reason(max_tokens, reason):
    with serving(ModelUpstream(make_model(), make_tokenizer(), seed=0)) as url:
        assert ask(url, temperature=0, max_tokens=max_tokens).choices[0].finish_reason == reason


def test_stacked_aligners_keep_the_finish_reason():
    with LoopbackEndpoint(lambda body: Reply("It depends", finish_reason="length")) as endpoint:
        inner = AlignedUpstream(
            EndpointUpstream("gpt", endpoint.base_url), Shouter(make_model(), make_tokenizer(), "labels")
        )
        with serving(inner) as url:
            choice = ask(url).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("It depends!!", "length")


def failure(status, message="no", headers=None, **fields):
    return Reply(status=status, body=json.dumps({"error": {"message": message, **fields}}), headers=headers or {})


UPSTREAM_FAILURES = {
    "content filter": (failure(400, code="content_filter"), 400, "content_filter"),
    "flagged": (failure(403, "input was flagged"), 400, "content_filter"),
    "invalid prompt": (failure(400, code="invalid_prompt"), 400, "content_filter"),
    "inspection": (failure(400, code="data_inspection_failed"), 400, "content_filter"),
    "filtered reply": (Reply("", finish_reason="content_filter"), 400, "content_filter"),
    "too long": (failure(400, "maximum context length is 9"), 400, "context_length_exceeded"),
    "rate limit": (failure(429, "slow down"), 429, "rate_limit_exceeded"),
    "rate limit in a success": (Reply(body='{"error": {"code": 429, "message": "x"}}'), 429, "rate_limit_exceeded"),
    "no credit": (failure(402), 502, "upstream_error"),
    "wrong key": (failure(401), 502, "upstream_error"),
    "error in a success": (Reply(body='{"error": {"code": 502, "message": "x"}}'), 502, "upstream_error"),
    "error in a reply": (Reply("half", finish_reason="error"), 502, "upstream_error"),
}


@pytest.mark.parametrize(("reply", "status", "code"), UPSTREAM_FAILURES.values(), ids=UPSTREAM_FAILURES)
def test_the_status_tells_the_failure_of_the_upstream(reply, status, code):
    with (
        LoopbackEndpoint(lambda body: reply) as endpoint,
        serving(EndpointUpstream("gpt", endpoint.base_url, max_retries=0)) as url,
        pytest.raises(openai.APIStatusError) as raised,
    ):
        ask(url)
    assert (raised.value.status_code, raised.value.code) == (status, code)
    assert ("Retry-After" in raised.value.response.headers) == (status == 429)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"Retry-After": "7"}, "7"), ({"retry-after-ms": "1500"}, "2"), ({}, "1"), ({"Retry-After": "soon"}, "1")],
)
def test_passes_on_how_long_to_wait(headers, seconds):
    with (
        LoopbackEndpoint(lambda body: failure(429, headers=headers)) as endpoint,
        serving(EndpointUpstream("gpt", endpoint.base_url, max_retries=0)) as url,
        pytest.raises(openai.RateLimitError) as raised,
    ):
        ask(url)
    assert raised.value.response.headers["Retry-After"] == seconds


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "It "}, {"type": "text", "text": "depends"}],
        [{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": "It depends"}],
    ],
)
def test_content_in_parts_reaches_clients_as_text(parts):
    body = {"choices": [{"message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}]}
    with (
        LoopbackEndpoint(lambda _: Reply(body=json.dumps(body))) as endpoint,
        serving(EndpointUpstream("gpt", endpoint.base_url)) as url,
    ):
        assert ask(url).choices[0].message.content == "It depends!"


# Models and parameters


def test_retrieves_its_model():
    with serving(echo) as url, client(url) as asking:
        assert asking.models.retrieve("aligned").id == "aligned"
        for name in ("gpt-5-mini", "org/model", "aligned/"):
            with pytest.raises(openai.NotFoundError, match="only has 'aligned'"):
                asking.models.retrieve(name)


def test_retrieves_a_model_with_a_slash_in_its_name():
    server = AlignedServer(AlignedUpstream(echo, Shouter(make_model(), make_tokenizer(), "labels")), "org/aligned")
    routes = [route.resource.canonical for route in server.make_app().router.routes()]
    assert "/v1/models/{model}" in routes


def test_a_seed_reaches_the_upstream():
    with LoopbackEndpoint(lambda body: Reply("Hi")) as endpoint:
        with serving(EndpointUpstream("gpt", endpoint.base_url)) as url:
            ask(url, seed=7)
        assert endpoint.requests[0]["seed"] == 7
    with serving(echo) as url, pytest.raises(openai.BadRequestError, match="does not support seed"):
        ask(url, seed=7)
    with serving(ModelUpstream(make_model(), make_tokenizer())) as url:
        answers = {ask(url, seed=7, max_tokens=8).choices[0].message.content for _ in range(3)}
    assert len(answers) == 1
