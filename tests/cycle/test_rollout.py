"""Batches of prompts, and rollouts from their outcomes to their results."""

import time

import pytest

from cyclealign_trl import RankingFailure, RankingResult
from cyclealign_trl.cycle.interaction import open_interaction
from cyclealign_trl.cycle.pending_rankings import PendingRankings
from cyclealign_trl.cycle.rollout import PromptCollator, Rollout
from cyclealign_trl.models.renderer import Renderer

SCORES = [[-1.0, -2.0]] * 3


class ListedRanker:
    """Ranker with one prepared answer per prompt."""

    def __init__(self, **answers):
        self.answers = answers

    def rank(self, requests):
        return [self.answers[request.prompt] for request in requests]


def make_rollout(ranker):
    """Return a rollout of the prompts "A", "B" and "C". "B" is skipped, because its completions are equal."""
    interactions = [
        open_interaction("A", ["x", "y"]),
        open_interaction("B", ["x", "x"]),
        open_interaction("C", ["x", "y"]),
    ]
    requests = [interaction.request for interaction in interactions if interaction.request is not None]
    return Rollout([[5]] * 3, [False] * 3, [[[6], [7]]] * 3, interactions, PendingRankings(ranker, requests))


def deadline():
    return time.monotonic() + 20


def test_other_columns_become_metadata(tokenizer):
    collator = PromptCollator(Renderer(tokenizer, (1,), max_prompt_length=3, max_completion_length=20))
    batch = collator([{"prompt": "A", "topic": "tea"}, {"prompt": "BBBB", "topic": "milk"}])
    assert batch.prompts == ["A", "BBBB"]
    assert batch.metadata == [{"topic": "tea"}, {"topic": "milk"}]
    assert [len(ids) for ids in batch.prompt_ids] == [1, 3]
    assert batch.prompt_truncated == [False, True]


def test_outcomes_follow_the_interactions_and_skipped_ones_have_none():
    first, last = RankingResult((1, 0)), RankingFailure("timeout")
    rollout = make_rollout(ListedRanker(A=first, C=last))
    assert rollout.wait(deadline()) == [first, None, last]


def test_an_error_of_the_ranker_is_raised_by_wait():
    with pytest.raises(KeyError, match="A"):
        make_rollout(ListedRanker()).wait(deadline())


def test_fail_gives_every_ranking_the_same_reason():
    rollout = make_rollout(ListedRanker())
    assert rollout.fail("RankerError") == [RankingFailure("RankerError"), None, RankingFailure("RankerError")]


def test_results_compare_each_outcome_with_the_policys_scores():
    rollout = make_rollout(ListedRanker())
    outcomes = [RankingResult((0, 1)), None, RankingFailure("timeout")]
    agreed, skipped, failed = rollout.resolve(outcomes, SCORES, min_agreement=2)
    assert [result.prompt for result in (agreed, skipped, failed)] == ["A", "B", "C"]
    assert (agreed.agreement, agreed.failure) == ((0, 1), None)
    assert agreed.demonstration is not None
    assert (skipped.failure, skipped.ranks) == ("duplicate_completions", None)
    assert (failed.failure, failed.ranks) == ("timeout", None)
    assert rollout.resolve(outcomes, SCORES, min_agreement=3)[0].demonstration is None
