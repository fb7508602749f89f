"""The demo's corpus is what it says it is, and the rule tells its kinds apart."""

from itertools import pairwise
from statistics import mean

import pytest

from cyclealign_trl.demo.corpus import KINDS, TOPICS, dialogues, improve, questions, score, sentences

QUESTION = "How do I grow tomatoes?"
TIPS = "Tie the stems to a tall stake. Water the roots and never the leaves."


def test_is_the_same_for_the_same_seed():
    assert dialogues(50, seed=1) == dialogues(50, seed=1)
    assert dialogues(50, seed=1) != dialogues(50, seed=2)


def test_held_out_questions_are_never_seen_but_their_parts_are():
    train, held_out = questions("train"), questions("held_out")
    assert (len(set(train)), len(set(held_out))) == (80, 40)
    assert not set(train) & set(held_out)
    assert {dialogue.question for dialogue in dialogues(3000, seed=0)} == set(train)
    for topic in TOPICS:
        assert sum(topic.noun in question for question in train) == 4
        assert sum(topic.noun in question for question in held_out) == 2


def test_kinds_come_in_equal_shares_and_many_wordings():
    drawn = dialogues(4000, seed=0)
    for kind in KINDS:
        assert sum(dialogue.kind == kind for dialogue in drawn) == pytest.approx(1000, abs=100)
    assert len({dialogue.reply for dialogue in drawn}) > 1500


def test_sentences_hold_all_words():
    words = {word for sentence in sentences() for word in sentence.split()}
    for dialogue in dialogues(2000, seed=0):
        assert words.issuperset(dialogue.question.split())
        assert words.issuperset(dialogue.reply.split())
        assert words.issuperset(improve(dialogue.question, dialogue.reply).split())


def test_topics_share_neither_tips_nor_names():
    for topic in TOPICS:
        for other in TOPICS:
            if other is not topic:
                assert not any(topic.noun in tip for tip in other.tips)
                assert not set(topic.tips) & set(other.tips)


def test_rule_separates_the_kinds():
    scores = {kind: [] for kind in KINDS}
    for dialogue in dialogues(2000, seed=0):
        scores[dialogue.kind].append(score(dialogue.question, dialogue.reply))
    for better, worse in pairwise(KINDS):
        assert min(scores[better]) > max(scores[worse])
    assert [round(mean(scores[kind]), 1) for kind in KINDS] == [0.9, 0.4, 0.1, 0.0]


@pytest.mark.parametrize(
    ("reply", "expected"),
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
def test_rule_by_example(reply, expected):
    assert score(QUESTION, reply) == expected


@pytest.mark.parametrize("reply", ["", " \n", ".", "\ud800", "\0" * 9, "番茄", "<data-0>{}[]" * 100, "a" * 10_000])
@pytest.mark.parametrize("question", [QUESTION, "", "Who are you?"])
def test_rule_survives_any_text(question, reply):
    assert 0.0 <= score(question, reply) <= 0.1
    assert score(question, improve(question, reply)) == (1.0 if question == QUESTION else 0.2)


def test_improving_keeps_the_tips_of_the_reply():
    for dialogue in dialogues(300, seed=3):
        improved = improve(dialogue.question, dialogue.reply)
        assert improved == improve(dialogue.question, dialogue.reply)
        assert score(dialogue.question, improved) == 1.0
    assert "tie the stems to a tall stake" in improve(QUESTION, "Tie the stems to a tall stake.").lower()
