"""Judge of the demo: reads the prompt of an `LLMRanker` and ranks by a rule that scores completions."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

from . import corpus
from .loopback import Reply

# A heading and the fenced text below it. Only whole fences match, so headings inside a text are ignored.
_FENCED = re.compile(
    r"^(?:### Instruction|# Turn of the (?P<role>\w+)|# Completion (?P<label>[A-Z]+))\n"
    r"<(?P<tag>data-\w+)>\n(?P<text>.*?)\n</(?P=tag)>$",
    re.MULTILINE | re.DOTALL,
)


class DemoJudge:
    """Answers the chat-completions requests of an `LLMRanker`: `LoopbackEndpoint(DemoJudge().respond)`.

    Args:
        score: Function from a question and a completion to a score, the higher the better.
        improve: Function from a question and its best completion to a better one.
        control: Whether to rank at random and to improve nothing, as a control for the effect of the judge.
        seed: Seed of the random rankings. A ranking depends only on the seed and the request, not on earlier calls.
        latency: Delay of each reply in seconds, to simulate a real endpoint.
    """

    def __init__(
        self,
        score: Callable[[str, str], float] = corpus.score,
        improve: Callable[[str, str], str] = corpus.improve,
        *,
        control: bool = False,
        seed: int = 0,
        latency: float = 0.0,
    ) -> None:
        self.score = score
        self.improve = improve
        self.control = control
        self.seed = seed
        self.latency = latency

    def respond(self, body: dict[str, Any]) -> Reply:
        """Reply to a request body with a ranking of the query's completions, best first."""
        content = body["messages"][-1]["content"]
        question, completions, rest = read_query(content)
        if self.control:
            labels = list(completions)
            rng = random.Random(f"{self.seed}\n{content}".encode(errors="replace"))  # noqa: S311
            rng.shuffle(labels)
            return Reply(json.dumps({"ranking": labels}), delay=self.latency)
        # The sort is stable: completions with equal scores stay in shown order.
        labels = sorted(completions, key=lambda label: self.score(question, completions[label]), reverse=True)
        answer: dict[str, Any] = {"ranking": labels}
        if labels and "improved_response" in rest:
            answer["improved_response"] = self.improve(question, completions[labels[0]])
        return Reply(json.dumps(answer), delay=self.latency)


def read_query(content: str) -> tuple[str, dict[str, str], str]:
    """Return the question, the completions by label, and the text after them.

    Demonstrations come before the query, in the same layout but with other tags. The query consists of the texts with
    the last tag.
    """
    fenced = list(_FENCED.finditer(content))
    if not fenced:
        return "", {}, content
    query = [match for match in fenced if match["tag"] == fenced[-1]["tag"]]
    turns = [match["text"] for match in query if match["label"] is None and match["role"] in (None, "user")]
    completions = {match["label"]: match["text"] for match in query if match["label"] is not None}
    return turns[-1] if turns else "", completions, content[fenced[-1].end() :]
