"""From completions to a request, and from an answer to what follows."""

import pytest

from cyclealign_trl import Demonstration, RankingFailure, RankingResult, Usage
from cyclealign_trl.cycle.demonstrations import DEFAULT
from cyclealign_trl.cycle.interaction import ALREADY_AGREED, DUPLICATE_COMPLETIONS, open_interaction, resolve
from cyclealign_trl.types import Trimmed


def test_white_box_golden(golden):
    for case in golden["whitebox_ranking"]:
        interaction = open_interaction("Q", [f"text {i}" for i in range(len(case["mean_logprob"]))])
        for scores, expected in (("mean_logprob", "ranking_mean"), ("sum_logprob", "ranking_sum")):
            resolved = resolve(interaction, RankingFailure("timeout"), case[scores])
            assert resolved.white_box_order == tuple(case[expected]), case


def test_agreement_makes_a_demonstration_of_the_agreed_completions_only():
    interaction = open_interaction("Q", ["a", "b", "c", "d"])
    # The policy's order is [3, 1, 0, 2]; with the ranker's [1, 3, 2, 0] both say that 1 beats 2.
    resolved = resolve(interaction, RankingResult((1, 3, 2, 0)), [-3.0, -2.0, -4.0, -1.0])
    assert resolved.white_box_order == (3, 1, 0, 2)
    assert resolved.agreement == (1, 2)
    assert resolved.demonstration == Demonstration("Q", ("b", "c"), (0, 1))
    assert resolved.ranks == (3, 0, 2, 1)
    assert not resolved.fully_agreed


def test_too_little_agreement_makes_no_demonstration():
    interaction = open_interaction("Q", ["a", "b", "c"])
    opposite = resolve(interaction, RankingResult((0, 1, 2)), [-3.0, -2.0, -1.0])
    assert opposite.agreement == (0,)
    assert opposite.demonstration is None
    pair = resolve(interaction, RankingResult((0, 1, 2)), [-2.0, -3.0, -1.0], min_agreement=3)
    assert len(pair.agreement) == 2
    assert pair.demonstration is None


def test_equal_texts_are_ranked_once_and_share_a_rank():
    interaction = open_interaction("Q", ["b", "a", "b", "c"])
    assert interaction.request.completions == ("b", "a", "c")
    resolved = resolve(interaction, RankingResult((2, 0, 1)), [-1.0, -2.0, -1.5, -3.0])
    assert resolved.black_box_order == (3, 0, 1)
    assert resolved.white_box_order == (0, 1, 3)
    assert resolved.ranks == (1, 2, 1, 0)
    assert resolved.agreement == (0, 1)


def test_ties_of_the_ranker_reach_the_loss():
    interaction = open_interaction("Q", ["a", "b", "c"])
    resolved = resolve(interaction, RankingResult((1, 0, 2), ranks=(1, 0, 1)), [-1.0, -2.0, -3.0])
    assert resolved.ranks == (1, 0, 1)


def test_a_demonstration_shows_no_order_that_the_ranker_did_not_see():
    interaction = open_interaction("Q", ["a", "b", "c"])
    scores = [-1.0, -2.0, -3.0]
    resolved = resolve(interaction, RankingResult((0, 1, 2), ranks=(0, 0, 1)), scores)
    assert resolved.agreement == (0, 1, 2)
    assert resolved.demonstration == Demonstration("Q", ("a", "c"), (0, 1))
    assert resolve(interaction, RankingResult((0, 1, 2), ranks=(0, 0, 0)), scores).demonstration is None


def test_what_the_ranker_says_of_itself_is_passed_on():
    interaction = open_interaction("Q", ["a", "b"], (DEFAULT,), num_static=1)
    assert interaction.request.num_static == 1
    outcome = RankingResult((0, 1), consistency=0.5, trimmed=Trimmed(demonstrations=1))
    resolved = resolve(interaction, outcome, [0.0, 1.0])
    assert (resolved.consistency, resolved.trimmed) == (0.5, Trimmed(demonstrations=1))


@pytest.mark.parametrize(
    ("completions", "agreed", "skipped"),
    [(["a", "a"], False, DUPLICATE_COMPLETIONS), (["a", "b"], True, ALREADY_AGREED)],
)
def test_what_needs_no_ranking_is_not_asked(completions, agreed, skipped):
    interaction = open_interaction("Q", completions, already_agreed=agreed)
    assert interaction.request is None
    resolved = resolve(interaction, None, [-1.0, -2.0])
    assert (resolved.failure, resolved.ranks, resolved.agreement, resolved.demonstration) == (
        skipped,
        None,
        None,
        None,
    )


def test_a_failure_is_no_ranking():
    usage = Usage(prompt_tokens=7, attempts=4)
    interaction = open_interaction("Q", ["a", "b"])
    resolved = resolve(interaction, RankingFailure("unparsable", usage=usage), [-1.0, -2.0])
    assert (resolved.failure, resolved.usage) == ("unparsable", usage)
    assert resolved.ranks is resolved.black_box_order is resolved.agreement is resolved.demonstration is None


def test_a_ranking_of_something_else_raises():
    with pytest.raises(ValueError, match="shown 2 completions and ranked 3"):
        resolve(open_interaction("Q", ["a", "b"]), RankingResult((0, 1, 2)), [-1.0, -2.0])


@pytest.mark.parametrize(("sampled", "joined"), [(" a", " Better."), ("a", "Better."), ("\n\na", "\n\nBetter.")])
def test_the_improved_completion_is_joined_as_the_policy_joins(sampled, joined):
    interaction = open_interaction("Q:", [sampled, "other"])
    resolved = resolve(interaction, RankingResult((0, 1), improved_completion=" Better."), [-1.0, -2.0])
    assert resolved.improved_completion == joined


def test_what_the_ranker_is_told():
    shown = (Demonstration("Q", ("a", "b"), (0, 1)),)
    request = open_interaction("Q", ["a", "b"], shown, {"topic": "tea"}).request
    assert (request.demonstrations, request.metadata) == (shown, {"topic": "tea"})
