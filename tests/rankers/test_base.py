"""The `Ranker` protocol: the example in its docstring, and the helpers that rankers share."""

import inspect
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cyclealign_trl.rankers.base import Ranker, check_positive, in_request_order, order_from_ranks, rank_by_scores
from cyclealign_trl.types import RankingFailure, RankingRequest, RankingResult

REQUEST = RankingRequest("Why?", ("aa", "a", "aaa"))


class ScoreService(BaseHTTPRequestHandler):
    """Score completions by length, and answer the prompt "fails" with HTTP 500."""

    def do_POST(self):
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(500 if query["prompt"] == "fails" else 200)
        self.end_headers()
        self.wfile.write(json.dumps([len(completion) for completion in query["completions"]]).encode())

    def log_message(self, *_):
        pass


def test_the_docstring_example_ranks():
    [code] = re.findall(r"```python\n(.*?)```", inspect.getdoc(Ranker), re.DOTALL)
    namespace = {}
    exec(code, namespace)
    with HTTPServer(("127.0.0.1", 0), ScoreService) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ranker = namespace["ScoreServiceRanker"](f"http://127.0.0.1:{server.server_port}/scores")
        result, failure = ranker.rank([REQUEST, RankingRequest("fails", ("a", "b"))])
        server.shutdown()
    assert isinstance(ranker, Ranker)
    assert result.order == (2, 0, 1)
    assert failure.reason == "connection"
    assert "500" in failure.detail


def test_ranks_by_scores():
    assert rank_by_scores([1.0, 2.0, 1.0]) == RankingResult((1, 0, 2), ranks=(1, 0, 1))
    assert rank_by_scores([1.0, float("nan")]) == RankingFailure("no_score", "completion 1 has the score nan")


def test_orders_by_rank_and_then_by_index():
    assert order_from_ranks([2, 0, 1, 0]) == (1, 3, 2, 0)


def test_sorts_outcomes_by_request():
    first, second = RankingFailure("timeout"), RankingResult((0, 1))
    assert in_request_order([(1, second), (0, first)]) == [first, second]


def test_checks_that_settings_are_positive():
    check_positive(batch_size=1, max_length=None)
    with pytest.raises(ValueError, match=r"`batch_size` must be at least 1, got 0\."):
        check_positive(max_length=1, batch_size=0)
