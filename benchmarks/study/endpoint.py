"""The judge of the study: a reward model behind an OpenAI-compatible endpoint on loopback, and its random control."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cyclealign_trl import RewardScorer
from cyclealign_trl.demo.demo_judge import read_query
from cyclealign_trl.demo.loopback import Reply
from cyclealign_trl.types import Prompt

Score = Callable[[Prompt, Sequence[str]], list[float]]
"""Returns a score for each completion of a prompt. A higher score is better."""


class StudyJudge:
    """Answer ranking requests by a score: `LoopbackEndpoint(StudyJudge(...).respond)`.

    The improved completion is the best of given samples of the prompt. Demonstrations in a request change nothing.

    Args:
        score: How completions are scored.
        samples: Samples of each prompt, by the last message of the prompt.
        prompts: The prompts, by their last message.
    """

    def __init__(self, score: Score, prompts: Mapping[str, Prompt], samples: Mapping[str, Sequence[str]]) -> None:
        self._score = score
        self._prompts = prompts
        self._samples = samples
        self._improved: dict[str, str] = {}

    def respond(self, body: dict[str, Any]) -> Reply:
        """Reply to a request body with a ranking, best first, and the improved completion if one is asked for."""
        question, completions, rest = read_query(body["messages"][-1]["content"])
        prompt = self._prompts[question]
        scores = dict(zip(completions, self._score(prompt, list(completions.values())), strict=True))
        answer: dict[str, Any] = {"ranking": sorted(scores, key=lambda label: -scores[label])}
        if "improved_response" in rest:
            if question not in self._improved:
                self._improved[question] = best_of(self._score, prompt, self._samples[question])
            answer["improved_response"] = self._improved[question]
        return Reply(json.dumps(answer))


def best_of(score: Score, prompt: Prompt, samples: Sequence[str]) -> str:
    """Return the sample with the highest score. Empty ones only count if there is no other."""
    written = [text for text in samples if text.strip()] or list(samples)
    scores = score(prompt, written)
    return written[scores.index(max(scores))]


def reward_model_score(scorer: RewardScorer) -> Score:
    """Return a score by a reward model."""
    return lambda prompt, completions: scorer.score([prompt] * len(completions), completions)


def random_score(seed: int) -> Score:
    """Return a score that only depends on a seed and the text, as a control for what the judge knows."""

    def score(prompt: Prompt, completions: Sequence[str]) -> list[float]:
        texts = (json.dumps([seed, prompt, completion]) for completion in completions)
        return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64 for text in texts]

    return score
