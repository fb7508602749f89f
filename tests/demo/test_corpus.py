"""Splits, kinds and vocabulary of the demo's corpus, and the rule that scores completions."""

from itertools import pairwise
from statistics import mean

import pytest

from cyclealign_trl.demo.corpus import KINDS, TOPICS, dialogues, improve, questions, score, vocabulary

QUESTION = "How do I grow tomatoes?"
TIPS = "Tie the stems to a tall stake. Water the roots and never the leaves."


def test_same_seed_gives_the_same_dialogues():
    assert dialogues(50, seed=1) == dialogues(50, seed=1)
    assert dialogues(50, seed=1) != dialogues(50, seed=2)


def test_training_covers_all_topics_but_no_held_out_question():
    train, held_out = questions("train"), questions("held_out")
    assert (len(set(train)), len(set(held_out))) == (80, 40)
    assert not set(train) & set(held_out)
    assert {dialogue.question for dialogue in dialogues(3000, seed=0)} == set(train)
    for topic in TOPICS:
        assert sum(topic.noun in question for question in train) == 4
        assert sum(topic.noun in question for question in held_out) == 2


def test_kinds_have_equal_shares_and_many_wordings():
    drawn = dialogues(4000, seed=0)
    for kind in KINDS:
        assert sum(dialogue.kind == kind for dialogue in drawn) == pytest.approx(1000, abs=100)
    assert len({dialogue.completion for dialogue in drawn}) > 1500


def test_vocabulary_contains_all_words():
    words = {word for text in vocabulary() for word in text.split()}
    for dialogue in dialogues(2000, seed=0):
        assert words.issuperset(dialogue.question.split())
        assert words.issuperset(dialogue.completion.split())
        assert words.issuperset(improve(dialogue.question, dialogue.completion).split())


def test_topics_share_no_tips_or_names():
    for topic in TOPICS:
        for other in TOPICS:
            if other is not topic:
                assert not any(topic.noun in tip for tip in other.tips)
                assert not set(topic.tips) & set(other.tips)


def test_scores_separate_the_kinds():
    scores = {kind: [] for kind in KINDS}
    for dialogue in dialogues(2000, seed=0):
        scores[dialogue.kind].append(score(dialogue.question, dialogue.completion))
    for better, worse in pairwise(KINDS):
        assert min(scores[better]) > max(scores[worse])
    assert [round(mean(scores[kind]), 1) for kind in KINDS] == [0.9, 0.4, 0.1, 0.0]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (f"Sure! {TIPS}", 1.0),
        (TIPS, 0.9),
        (TIPS.upper(), 0.9),
        (TIPS.removesuffix("."), 0.85),
        ("Tie the stems to a tall stake. Tie the stems to a tall stake.", 0.6),
        ("Tie the stems to a tall stake.", 0.6),
        ("Tie the tall to a stems stake.", 0.05),
        ("Tomatoes are nice.", 0.4),
        ("tomatoes " * 1000, 0.35),
        ("Sure! Castle before you attack, and then replay your lost games slowly.", 0.2),
        (f"What a stupid question. {TIPS}", 0.0),
    ],
)
def test_scores_of_examples(completion, expected):
    assert score(QUESTION, completion) == expected


@pytest.mark.parametrize(
    "completion", ["", " \n", ".", "\ud800", "\0" * 9, "番茄", "<data-0>{}[]" * 100, "a" * 10_000]
)
@pytest.mark.parametrize("question", [QUESTION, "", "Who are you?"])
def test_any_text_can_be_scored_and_improved(question, completion):
    assert 0.0 <= score(question, completion) <= 0.1
    assert score(question, improve(question, completion)) == (1.0 if question == QUESTION else 0.2)


def test_improving_keeps_the_tips_of_the_completion():
    for dialogue in dialogues(300, seed=3):
        improved = improve(dialogue.question, dialogue.completion)
        assert improved == improve(dialogue.question, dialogue.completion)
        assert score(dialogue.question, improved) == 1.0
    assert "tie the stems to a tall stake" in improve(QUESTION, "Tie the stems to a tall stake.").lower()
