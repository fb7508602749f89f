"""`cyclealign serve` as a process: start, 200 concurrent requests, and shutdown by a signal."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading

import openai
import pytest

from cyclealign_trl.aligner.aligner_template import AlignerTemplate
from cyclealign_trl.cli import main
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.conftest import make_model, make_tokenizer

KEY = "sk-of-the-server"


@pytest.fixture
def folder(tmp_path):
    """Folder with an aligner. With `--max_new_tokens 1` no correction is finished, so answers pass unchanged."""
    make_model().save_pretrained(tmp_path / "aligner")
    make_tokenizer().save_pretrained(tmp_path / "aligner")
    AlignerTemplate("{question}|{answer}=").save(tmp_path / "aligner")
    return tmp_path


class Served:
    """`cyclealign serve` in a separate process."""

    def __init__(self, folder, *arguments):
        common = ["--aligner", str(folder / "aligner"), "--port", "0", "--max_new_tokens", "1", "--device", "cpu"]
        keys = {"CYCLEALIGN_SERVE_API_KEY": KEY, "OPENAI_API_KEY": "sk-up"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cyclealign_trl", "serve", *common, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **keys},
        )  # fmt: skip
        line = self.process.stdout.readline()
        found = re.match(r"Serving aligner at (http://127.0.0.1:\d+/v1) ", line)
        assert found, line + self.process.stderr.read()
        self.url = found[1]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()

    def stop(self, signal_number):
        """Send a signal. Return the output and the exit status."""
        self.process.send_signal(signal_number)
        out, err = self.process.communicate(timeout=60)
        return out + err, self.process.returncode


async def send_all(url, numbers):
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:

        async def one(index):
            messages = [{"role": "user", "content": f"Question {index}"}]
            return await client.chat.completions.create(model="aligner", messages=messages, max_tokens=50)

        return await asyncio.gather(*map(one, numbers))


def test_serves_200_concurrent_requests_with_an_endpoint_upstream(folder):
    late = threading.Event()

    def respond(body):
        text = body["messages"][-1]["content"]
        if text == "Question 200":
            late.set()
            return Reply("late", delay=1)
        return Reply(f"Answer to {text}", delay=int(text[-1]) / 100)  # answers arrive out of order

    with (
        LoopbackEndpoint(respond) as endpoint,
        Served(folder, "--upstream_model", "gpt", "--upstream_base_url", endpoint.base_url) as served,
    ):
        replies = asyncio.run(send_all(served.url, range(200)))
        expected = [f"Answer to Question {index}" for index in range(200)]
        assert [reply.choices[0].message.content for reply in replies] == expected
        assert {request["max_tokens"] for request in endpoint.requests} == {50}
        with (
            openai.OpenAI(base_url=served.url, api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()

        # A request in flight is finished after SIGTERM.
        thread = threading.Thread(target=lambda: replies.extend(asyncio.run(send_all(served.url, [200]))))
        thread.start()
        assert late.wait(30)
        output, status = served.stop(signal.SIGTERM)
        thread.join()
    assert replies[200].choices[0].message.content == "late"
    assert status == 0, output
    for text in ("Traceback", KEY, "sk-up"):
        assert text not in output


@pytest.mark.slow
def test_serves_a_local_upstream(folder):
    make_model(seed=1).save_pretrained(folder / "policy")
    make_tokenizer().save_pretrained(folder / "policy")
    with Served(folder, "--upstream_model_name_or_path", str(folder / "policy")) as served:
        replies = asyncio.run(send_all(served.url, range(40)))
        assert all(reply.usage.completion_tokens <= 1 for reply in replies)
        output, status = served.stop(signal.SIGINT)
    assert status == 0, output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--aligner nowhere/aligner --upstream_model gpt --upstream_base_url http://127.0.0.1:9/v1",
            "nowhere/aligner",
        ),
        ("--aligner ALIGNER --upstream_model_name_or_path nowhere/policy", "couldn't find them"),
        ("--aligner ALIGNER --upstream_model gpt", "No API key"),
        ("--aligner ALIGNER --upstream_model gpt --upstream_base_url http://127.0.0.1:9/v1 --batch_size 0", "got 0"),
        ('--aligner ALIGNER --upstream_model gpt --upstream_kwargs {"rmp":5}', "no argument 'rmp'"),
        ('--aligner ALIGNER --upstream_model gpt --upstream_kwargs {"api_key":"secret"}', "set OPENAI_API_KEY"),
        ('--aligner ALIGNER --upstream_model gpt --upstream_kwargs ["rpm"]', "upstream_kwargs must be a JSON object"),
    ],
)
def test_usage_errors_are_one_line(folder, arguments, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["serve", *arguments.replace("ALIGNER", str(folder / "aligner")).split()])
    assert stop.value.code.startswith("cyclealign serve: error: ")
    assert message in stop.value.code
    assert "\n" not in stop.value.code


@pytest.mark.parametrize("argument", ["--upstream_base_url=http://x", "--upstream_kwargs={}"])
def test_arguments_of_an_endpoint_without_a_model_name_are_an_error(argument, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--aligner", "a", "--upstream_model_name_or_path", "b", argument])
    assert stop.value.code == 2
    assert f"{argument.partition('=')[0]} needs --upstream_model" in capsys.readouterr().err
