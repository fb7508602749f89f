"""A judge that knows the merit of every completion, for the tests of `LLMRanker`."""

import json
import re
import threading
import time

from cyclealign_trl.demo.loopback import Reply
from cyclealign_trl.types import RankingRequest

KEY = "sk-very-secret-0123456789"
COMPLETIONS = ("worst", "best", "middle", "bad")
MERIT = {"best": 0, "middle": 1, "bad": 2, "worst": 3}
REQUEST = RankingRequest("Why?", COMPLETIONS)
RIGHT = (1, 2, 3, 0)


def shown(body):
    """Return the query's completions by label."""
    query = body["messages"][-1]["content"].rpartition("### Instruction")[2]
    return dict(re.findall(r"# Completion ([A-Z]+)\n<data-\w+>\n(.*?)\n</", query, re.DOTALL))


def judge(body):
    """Reply with the completions ranked by `MERIT`."""
    by_label = shown(body)
    ranking = sorted(by_label, key=lambda label: MERIT[by_label[label]])
    return Reply(json.dumps({"ranking": ranking, "improved_response": "Better."}))


def error(status, message="no", **fields):
    return Reply(status=status, body=json.dumps({"error": {"message": message, **fields}}))


class ConcurrencyMeter:
    """Judge that delays its replies, and records the maximum number of concurrent calls as `peak`."""

    def __init__(self, delay):
        self.delay = delay
        self.in_flight = self.peak = 0
        self.lock = threading.Lock()

    def __call__(self, body):
        with self.lock:
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
        time.sleep(self.delay)
        with self.lock:
            self.in_flight -= 1
        return judge(body)
