"""`cyclealign serve` as a user runs it: started, asked 200 times at once, and ended by a signal."""

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
    """An aligner that never finishes a correction of one token, so that answers come through as they are."""
    make_model().save_pretrained(tmp_path / "aligner")
    make_tokenizer().save_pretrained(tmp_path / "aligner")
    AlignerTemplate("{question}|{answer}=").save(tmp_path / "aligner")
    return tmp_path


class Served:
    """The command in a process of its own."""

    def __init__(self, folder, *arguments):
        own = ["--aligner", str(folder / "aligner"), "--port", "0", "--max_new_tokens", "1", "--device", "cpu"]
        keys = {"CYCLEALIGN_SERVE_API_KEY": KEY, "OPENAI_API_KEY": "sk-up"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cyclealign_trl", "serve", *own, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **keys},
        )  # fmt: skip
        said = self.process.stdout.readline()
        found = re.match(r"Serving aligner at (http://127.0.0.1:\d+/v1) ", said)
        assert found, said + self.process.stderr.read()
        self.url = found[1]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()

    def end(self, how):
        """What it said, and its status."""
        self.process.send_signal(how)
        out, err = self.process.communicate(timeout=60)
        return out + err, self.process.returncode


async def ask_all(url, numbers):
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:

        async def one(index):
            messages = [{"role": "user", "content": f"Question {index}"}]
            return await client.chat.completions.create(model="aligner", messages=messages, max_tokens=50)

        return await asyncio.gather(*map(one, numbers))


def test_two_hundred_at_once_in_front_of_an_endpoint(folder):
    late = threading.Event()

    def respond(body):
        text = body["messages"][-1]["content"]
        if text == "Question 200":
            late.set()
            return Reply("late", delay=1)
        return Reply(f"Answer to {text}", delay=int(text[-1]) / 100)  # in another order than they came

    with (
        LoopbackEndpoint(respond) as endpoint,
        Served(folder, "--upstream_model", "gpt", "--upstream_base_url", endpoint.base_url) as served,
    ):
        replies = asyncio.run(ask_all(served.url, range(200)))
        expected = [f"Answer to Question {index}" for index in range(200)]
        assert [reply.choices[0].message.content for reply in replies] == expected
        assert {request["max_tokens"] for request in endpoint.requests} == {50}
        with (
            openai.OpenAI(base_url=served.url, api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()

        # What is in hand is finished when it is terminated.
        thread = threading.Thread(target=lambda: replies.extend(asyncio.run(ask_all(served.url, [200]))))
        thread.start()
        assert late.wait(30)
        said, status = served.end(signal.SIGTERM)
        thread.join()
    assert replies[200].choices[0].message.content == "late"
    assert status == 0, said
    for never in ("Traceback", KEY, "sk-up"):
        assert never not in said


@pytest.mark.slow
def test_an_upstream_that_runs_here(folder):
    make_model(seed=1).save_pretrained(folder / "policy")
    make_tokenizer().save_pretrained(folder / "policy")
    with Served(folder, "--upstream_model_name_or_path", str(folder / "policy")) as served:
        replies = asyncio.run(ask_all(served.url, range(40)))
        assert all(reply.usage.completion_tokens <= 1 for reply in replies)
        said, status = served.end(signal.SIGINT)
    assert status == 0, said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--aligner nowhere/aligner --upstream_model gpt --upstream_base_url http://127.0.0.1:9/v1",
            "nowhere/aligner",
        ),
        ("--aligner ALIGNER --upstream_model_name_or_path nowhere/policy", "couldn't find them"),
        ("--aligner ALIGNER --upstream_model gpt", "No API key"),
        ("--aligner ALIGNER --upstream_model gpt --upstream_base_url http://127.0.0.1:9/v1 --batch_size 0", "got 0"),
    ],
)
def test_wrong_use_is_one_line(folder, arguments, said, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["serve", *arguments.replace("ALIGNER", str(folder / "aligner")).split()])
    assert stop.value.code.startswith("cyclealign serve: error: ")
    assert said in stop.value.code
    assert "\n" not in stop.value.code


def test_an_address_without_a_name_is_refused(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--aligner", "a", "--upstream_model_name_or_path", "b", "--upstream_base_url", "http://x"])
    assert stop.value.code == 2
    assert "--upstream_base_url needs --upstream_model" in capsys.readouterr().err
