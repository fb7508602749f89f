"""`LLMRanker` with the addresses, headers and keys of Azure and of gateways, seen from the server."""

import json
import logging
import threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cyclealign_trl.errors import RankerError
from cyclealign_trl.rankers.llm import LLMRanker
from tests.rankers.llm_stubs import REQUEST, error

pytestmark = pytest.mark.usefixtures("llm_environment")

SECRET = "sk-very-secret-0123456789"
RANKING = '{"ranking": ["A", "B", "C", "D"]}'


@contextmanager
def recording(respond=lambda headers: None):
    """Run an endpoint that records path and headers of each request, and yield its address and the records."""
    records = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            records.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            reply = respond(self.headers)
            body = json.dumps({"choices": [{"message": {"content": RANKING}, "finish_reason": "stop"}]})
            content = (body if reply is None else reply.body).encode()
            self.send_response(200 if reply is None else reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", records
    finally:
        server.shutdown()
        server.server_close()


def rank(address, **options):
    with closing(LLMRanker("a-model", address, **{"max_retries": 0, **options})) as ranker:
        [outcome] = ranker.rank([REQUEST])
        return outcome, ranker


# Addresses


@pytest.mark.parametrize(
    ("path", "options", "sent"),
    [
        ("/v1", {}, "/v1/chat/completions"),
        ("/v1/", {}, "/v1/chat/completions"),
        ("  /v1 \n", {}, "/v1/chat/completions"),
        ("/openai/deployments/x?api-version=2024-10-21", {},
         "/openai/deployments/x/chat/completions?api-version=2024-10-21"),
        ("/openai/v1/?api-version=preview", {}, "/openai/v1/chat/completions?api-version=preview"),
        ("/openai/deployments/x", {"api_version": "2024-10-21"},
         "/openai/deployments/x/chat/completions?api-version=2024-10-21"),
        ("/a?api-version=1", {"api_version": "2"}, "/a/chat/completions?api-version=2"),
    ],
)  # fmt: skip
def test_the_address_of_a_request(path, options, sent):
    with recording() as (address, records):
        before = "  " if path.startswith(" ") else ""
        outcome, ranker = rank(before + address + path.lstrip(), api_key=SECRET, **options)
    assert outcome.order
    [(requested, headers)] = records
    assert requested == sent
    assert headers["authorization"] == f"Bearer {SECRET}"
    assert headers.get("api-key") == (SECRET if "api-version" in sent else None)
    assert "api-version" not in json.loads(ranker.fingerprint)["base_url"]


def test_the_address_in_the_environment_is_read_in_the_same_way(monkeypatch):
    with recording() as (address, records):
        monkeypatch.setenv("OPENAI_BASE_URL", f" {address}/v1?api-version=7\n")
        monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\n")
        rank(None)
    assert records[0][0] == "/v1/chat/completions?api-version=7"
    assert records[0][1]["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    "url",
    ["http://h/v1?api-key=hunter2hunter2", "http://h/v1?api-version=1&sig=hunter2hunter2", "http://h/v1?hunter2hunter2",
     "http://h/v1?api-version=1#hunter2hunter2", "http://u:hunter2hunter2@h/v1?api-version=1"],
)  # fmt: skip
def test_other_queries_can_be_secrets_and_are_refused(url):
    with pytest.raises(ValueError, match="extra_headers") as caught:
        LLMRanker("a-model", url)
    assert "hunter2" not in str(caught.value)


# Headers


def test_sends_extra_headers_without_a_key():
    with recording() as (address, records):
        rank(address, extra_headers={"X-Gateway": " token-0123456789 ", "HTTP-Referer": "https://example.org"})
    headers = records[0][1]
    assert (headers["x-gateway"], headers["http-referer"]) == ("token-0123456789", "https://example.org")


def test_an_extra_header_replaces_the_one_of_the_client():
    with recording() as (address, records):
        rank(address, api_key=SECRET, extra_headers={"Authorization": "Basic dXNlcjpwYXNz"})
    assert records[0][1]["authorization"] == "Basic dXNlcjpwYXNz"


def test_extra_headers_appear_nowhere(caplog):
    caplog.set_level(logging.DEBUG)
    headers = {"X-Gateway": "token-0123456789"}
    with recording(lambda _: error(500, "got token-0123456789")) as (address, _):
        outcome, ranker = rank(address, extra_headers=headers)
    for public in (outcome.detail, repr(ranker), ranker.fingerprint, repr(ranker._settings), caplog.text):
        assert "0123456789" not in public


@pytest.mark.parametrize("headers", [{"X": "a\nb"}, {"X\n": "a"}, {"X": "\u00e9"}, {"X": 1}, {"": "a"}], ids=range(5))
def test_invalid_headers_raise(headers):
    with pytest.raises(ValueError, match="extra_headers"):
        LLMRanker("a-model", "http://127.0.0.1:1", extra_headers=headers)


# Keys from a function


async def async_key():
    return SECRET


@pytest.mark.parametrize(
    "make_key", [lambda: SECRET, lambda: f" {SECRET}\n", async_key], ids=["plain", "space", "async"]
)
def test_a_function_makes_the_key(make_key):
    with recording() as (address, records):
        outcome, _ = rank(address, api_key=make_key)
    assert outcome.order
    assert records[0][1]["authorization"] == f"Bearer {SECRET}"


def test_the_function_is_called_for_each_call_and_its_keys_are_redacted():
    keys = iter(f"sk-secret-number-{index}" for index in range(9))
    with recording(lambda headers: error(500, headers["Authorization"])) as (address, records):
        outcome, _ = rank(address, api_key=lambda: next(keys), max_retries=2)
    assert [headers["authorization"][-1] for _, headers in records] == ["0", "1", "2"]
    assert outcome.detail == "HTTP 500: Bearer [API key]"


def raising():
    raise OSError(SECRET)


@pytest.mark.parametrize("make_key", [raising, lambda: None, lambda: "", lambda: 5, lambda: "a\nb"], ids=range(5))
def test_a_function_that_makes_no_key_raises(make_key):
    with recording() as (address, records), pytest.raises(RankerError, match="`api_key`") as caught:
        rank(address, api_key=make_key)
    assert not records
    assert SECRET not in str(caught.value)
