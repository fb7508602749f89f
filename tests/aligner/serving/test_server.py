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

from cyclealign_trl import AlignedUpstream, EndpointUpstream
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
            (openai.BadRequestError, {"stream": True}),
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
