"""Fixtures for the tests of `LLMRanker`."""

import pytest

from cyclealign_trl.chat import client
from cyclealign_trl.demo.loopback import LoopbackEndpoint
from cyclealign_trl.rankers.llm import LLMRanker
from tests.rankers.llm_stubs import KEY


@pytest.fixture
def llm_environment(monkeypatch):
    """Shorten the backoff, and hide keys and addresses in the environment."""
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve():
    """Start endpoints and rankers, and close them after the test."""
    opened = []

    def start(respond, *, required_key=None, **options):
        if not callable(respond):
            replies = iter(respond)
            respond = lambda body: next(replies)  # noqa: E731
        endpoint = LoopbackEndpoint(respond, api_key=required_key).start()
        options.setdefault("api_key", KEY)
        ranker = LLMRanker(options.pop("model", "a-model"), endpoint.base_url, **options)
        opened.extend([ranker, endpoint])
        return ranker, endpoint

    yield start
    for resource in opened:
        resource.close()
