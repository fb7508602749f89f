"""Requests for sampled completions, and results of the ranker's answers."""

import pytest

from cyclealign_trl import Demonstration, RankingFailure, RankingResult, Usage
from cyclealign_trl.cycle.demonstrations import DEFAULT
from cyclealign_trl.cycle.interaction import ALREADY_AGREED, DUPLICATE_COMPLETIONS, open_interaction, resolve
from cyclealign_trl.types import Trimmed


def test_the_white_box_order_matches_golden_values(golden):
    for case in golden["whitebox_ranking"]:
        interaction = open_interaction("Q", [f"text {i}" for i in range(len(case["mean_logprob"]))])
        for scores, expected in (("mean_logprob", "ranking_mean"), ("sum_logprob", "ranking_sum")):
            result = resolve(interaction, RankingFailure("timeout"), case[scores])
            assert result.white_box_order == tuple(case[expected]), case


def test_agreed_completions_become_a_demonstration():
    interaction = open_interaction("Q", ["a", "b", "c", "d"])
    # The policy orders [3, 1, 0, 2] and the ranker [1, 3, 2, 0]. Both prefer 1 to 2.
    result = resolve(interaction, RankingResult((1, 3, 2, 0)), [-3.0, -2.0, -4.0, -1.0])
    assert result.white_box_order == (3, 1, 0, 2)
    assert result.agreement == (1, 2)
    assert result.demonstration == Demonstration("Q", ("b", "c"), (0, 1))
    assert result.ranks == (3, 0, 2, 1)
    assert not result.fully_agreed


def test_too_few_agreed_completions_make_no_demonstration():
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
    result = resolve(interaction, RankingResult((2, 0, 1)), [-1.0, -2.0, -1.5, -3.0])
    assert result.black_box_order == (3, 0, 1)
    assert result.white_box_order == (0, 1, 3)
    assert result.ranks == (1, 2, 1, 0)
    assert result.agreement == (0, 1)


def test_ties_of_the_ranker_are_kept():
    interaction = open_interaction("Q", ["a", "b", "c"])
    result = resolve(interaction, RankingResult((1, 0, 2), ranks=(1, 0, 1)), [-1.0, -2.0, -3.0])
    assert result.ranks == (1, 0, 1)


def test_a_demonstration_has_one_completion_per_rank():
    interaction = open_interaction("Q", ["a", "b", "c"])
    scores = [-1.0, -2.0, -3.0]
    result = resolve(interaction, RankingResult((0, 1, 2), ranks=(0, 0, 1)), scores)
    assert result.agreement == (0, 2)
    assert result.demonstration == Demonstration("Q", ("a", "c"), (0, 1))
    assert resolve(interaction, RankingResult((0, 1, 2), ranks=(0, 0, 0)), scores).demonstration is None


TIES = {  # ranks by the ranker, the policy's scores: agreement, its rate, whether all is agreed
    "no tie": ((0, 1, 2), (-1.0, -2.0, -3.0), (0, 1, 2), 1.0, True),
    "tie at the top": ((0, 0, 1), (-2.0, -1.0, -3.0), (0, 2), 1.0, True),
    "tie at the bottom": ((0, 1, 1), (-1.0, -3.0, -2.0), (0, 1), 1.0, True),
    "the policy prefers the worst": ((0, 0, 1), (-2.0, -3.0, -1.0), (0,), 0.5, False),
    "half of a tie is agreed": ((0, 0, 1), (-1.0, -3.0, -2.0), (0, 2), 1.0, False),
    "long ties do not hide an order": ((0, 0, 0, 1, 2), (-3.0, -4.0, -5.0, -1.0, -2.0), (3, 4), 2 / 3, False),
    "all tied": ((0, 0, 0), (-1.0, -2.0, -3.0), None, None, False),
    "two tied": ((0, 0), (-2.0, -1.0), None, None, False),
}


@pytest.mark.parametrize(("ranks", "scores", "agreement", "rate", "full"), TIES.values(), ids=TIES)
def test_agreement_counts_only_what_the_ranker_prefers(ranks, scores, agreement, rate, full):
    interaction = open_interaction("Q", list("abcde"[: len(ranks)]))
    order = tuple(sorted(range(len(ranks)), key=ranks.__getitem__))
    result = resolve(interaction, RankingResult(order, ranks), scores)
    assert result.agreement == agreement
    assert result.agreement_rate == (None if rate is None else pytest.approx(rate))
    assert result.fully_agreed is full
    assert result.all_tied is (agreement is None)
    assert result.ranks == ranks
    assert result.failure is None


def test_consistency_and_omitted_parts_are_passed_on():
    interaction = open_interaction("Q", ["a", "b"], (DEFAULT,), num_static=1)
    assert interaction.request.num_static == 1
    outcome = RankingResult((0, 1), consistency=0.5, trimmed=Trimmed(demonstrations=1))
    result = resolve(interaction, outcome, [0.0, 1.0])
    assert (result.consistency, result.trimmed) == (0.5, Trimmed(demonstrations=1))


@pytest.mark.parametrize(
    ("completions", "agreed", "skipped"),
    [(["a", "a"], False, DUPLICATE_COMPLETIONS), (["a", "b"], True, ALREADY_AGREED)],
)
def test_equal_or_agreed_completions_are_not_ranked(completions, agreed, skipped):
    interaction = open_interaction("Q", completions, already_agreed=agreed)
    assert interaction.request is None
    result = resolve(interaction, None, [-1.0, -2.0])
    assert (result.failure, result.ranks, result.agreement, result.demonstration) == (skipped, None, None, None)
    assert result.white_box_order == ()


def test_a_failure_has_a_reason_and_no_ranking():
    usage = Usage(prompt_tokens=7, attempts=4)
    interaction = open_interaction("Q", ["a", "b"])
    result = resolve(interaction, RankingFailure("unparsable", usage=usage), [-1.0, -2.0])
    assert (result.failure, result.usage) == ("unparsable", usage)
    assert result.ranks is result.black_box_order is result.agreement is result.demonstration is None


def test_a_ranking_of_another_number_of_completions_raises():
    with pytest.raises(ValueError, match="shown 2 completions and ranked 3"):
        resolve(open_interaction("Q", ["a", "b"]), RankingResult((0, 1, 2)), [-1.0, -2.0])


@pytest.mark.parametrize(("sampled", "joined"), [(" a", " Better."), ("a", "Better."), ("\n\na", "\n\nBetter.")])
def test_an_improved_completion_gets_the_leading_white_space_of_the_samples(sampled, joined):
    interaction = open_interaction("Q:", [sampled, "other"])
    result = resolve(interaction, RankingResult((0, 1), improved_completion=" Better."), [-1.0, -2.0])
    assert result.improved_completion == joined


def test_requests_contain_demonstrations_and_metadata():
    shown = (Demonstration("Q", ("a", "b"), (0, 1)),)
    request = open_interaction("Q", ["a", "b"], shown, {"topic": "tea"}).request
    assert (request.demonstrations, request.metadata) == (shown, {"topic": "tea"})
