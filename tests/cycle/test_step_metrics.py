"""Means and counts of a step's interactions."""

import pytest

from cyclealign_trl import RankingFailure, RankingResult, Usage
from cyclealign_trl.cycle.interaction import add_correction, open_interaction, resolve
from cyclealign_trl.cycle.step_metrics import InteractionRecord, counts, means
from cyclealign_trl.types import Trimmed


def record(outcome, correction=None, **changes):
    """Return the record of a prompt with the completions "a", "b" and "c", which the policy orders alphabetically."""
    result = resolve(open_interaction("Q", ["a", "b", "c"]), outcome, [-1.0, -2.0, -3.0])
    if correction is not None:
        result = add_correction(result, correction)
    settings = {"lengths": (2, 4, 6), "num_clipped": 0, "prompt_truncated": False, "improved_truncated": False}
    return InteractionRecord(result, **(settings | changes))


def skipped():
    result = resolve(open_interaction("Q", ["a", "a"]), None, [-1.0, -1.0])
    return InteractionRecord(result, (1, 1), num_clipped=2, prompt_truncated=True, improved_truncated=False)


def test_means_over_completions_prompts_and_rankings():
    records = [
        record(RankingResult((0, 1, 2), improved_completion="new"), improved_truncated=True),
        record(RankingResult((2, 1, 0), consistency=0.5), correction="corrected"),
        record(RankingFailure("timeout")),
        skipped(),
    ]
    assert means(records) == pytest.approx(
        {
            "completions/mean_length": (3 * 12 + 2) / 11,
            "completions/min_length": 1,
            "completions/max_length": 6,
            "completions/clipped_ratio": 2 / 11,
            "prompts/cut_ratio": 1 / 4,
            # Over the two rankings.
            "agreement/length": (3 + 1) / 2,
            "agreement/rate": (1 + 1 / 3) / 2,
            "agreement/full": 1 / 2,
            "improved/ratio": 1.0,
            "improved/corrected_ratio": 1 / 2,
            "improved/cut_ratio": 1 / 2,
            "ranker/consistency": 0.5,
        }
    )


def test_means_without_a_ranking_have_no_agreement():
    assert {name.partition("/")[0] for name in means([record(RankingFailure("timeout"))])} == {
        "completions",
        "prompts",
    }


def test_failures_omissions_and_usage_are_counted():
    records = [
        record(RankingResult((0, 1, 2), usage=Usage(10, 5, 0, 0.25, 2), trimmed=Trimmed(1, 2))),
        record(RankingResult((0, 1, 2), usage=Usage(10, 5, 0, 0.25, 2, cached=True))),
        record(RankingFailure("timeout", usage=Usage(3, 1))),
        record(RankingFailure("timeout")),
        skipped(),
    ]
    assert counts(records) == {
        "failures/timeout": 2,
        "failures/duplicate_completions": 1,
        "ranker/dropped_demonstrations": 1,
        "ranker/cut_completions": 2,
        "ranker/cached": 1,
        "ranker/requests": 2 + 1,
        "ranker/prompt_tokens": 10 + 3,
        "ranker/completion_tokens": 5 + 1,
        "ranker/cost": 0.25,
    }


def test_an_unknown_cost_is_not_counted():
    assert "ranker/cost" not in counts([record(RankingResult((0, 1, 2), usage=Usage(10, 5)))])


def test_the_ranker_is_asked_unless_the_prompt_is_skipped_or_the_budget_used_up():
    assert record(RankingResult((0, 1, 2))).asked
    assert record(RankingFailure("timeout")).asked
    assert not record(RankingFailure("budget_exhausted")).asked
    assert not skipped().asked
