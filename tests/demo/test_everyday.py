"""Everyday questions, and the rule that scores answers to them."""

import itertools

import pytest

from cyclealign_trl.demo.everyday import HELD_OUT_QUESTIONS, TRAIN_QUESTIONS, improve, score

QUESTION = "How do I keep flowers fresh in a vase?"
SENTENCE = "Change the water every day."
RAMBLING = " and then some more of it" * 12


def test_questions_are_distinct_and_held_out():
    assert (len(set(TRAIN_QUESTIONS)), len(set(HELD_OUT_QUESTIONS))) == (32, 24)
    assert not set(TRAIN_QUESTIONS) & set(HELD_OUT_QUESTIONS)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Change the water in the vase every day to keep your flowers fresh.", 1.0),
        ("Change the water in the vase every day to keep your flowers fresh", 0.6),
        (SENTENCE, 0.7),
        ("Flowers stay happy in cool water.", 0.8),
        ("A flower in a fresh vase", 0.6),
        (f"Change the water{RAMBLING}.", 0.4),
        (f"Change the water{RAMBLING}", 0.0),
        ("Use 1. water 2. sugar 3.", 0.0),
        ("Fresh flowers need three things:\n\n1.", 0.5),
        ("Water! Water! Water! Water! Water! Water!", 0.0),
        ("All right!", 0.0),
        ('She said: "Cut the stems at a slant."', 0.7),
    ],
)
def test_scores_of_examples(completion, expected):
    assert score(QUESTION, completion) == pytest.approx(expected, abs=1e-4)


def test_the_score_falls_with_every_word_beyond_25():
    words = [f"{'so ' * number}we change the water daily." for number in range(20, 61)]
    scores = [score(QUESTION, text) for text in words]
    assert scores[0] == 0.7
    assert all(longer < shorter or (longer, shorter) == (0.4, 0.4) for shorter, longer in itertools.pairwise(scores))
    assert scores[-1] == 0.4


def test_the_score_rises_with_every_word_of_the_question_and_with_the_end_of_the_sentence():
    parts = ["change the water every day", "and the flowers", "in the vase", "look fresh"]
    texts = [" ".join(parts[: number + 1]) for number in range(len(parts))]
    scores = [score(QUESTION, text) for text in texts]
    assert scores == sorted(set(scores))
    for text in texts:
        assert score(QUESTION, f"{text}.") == pytest.approx(score(QUESTION, text) + 0.4, abs=1e-4)


@pytest.mark.parametrize(
    ("completion", "improved"),
    [
        (f"{SENTENCE} {SENTENCE}", f"{SENTENCE} {SENTENCE}"),
        (f"{SENTENCE}\n\n1. **Cut the stems.** Then add", SENTENCE),
        (f"{SENTENCE} First, you cut{RAMBLING}.", SENTENCE),
        ("Cut the stems, because", "I am sorry, I do not know."),
        ("Cut all of the stems, because", "Cut all of the stems, because."),
        (f"Cut{RAMBLING}.", f"Cut{' and then some more of it' * 4}."),
        ("", "I am sorry, I do not know."),
    ],
)
def test_an_improved_answer_is_short_and_finished(completion, improved):
    assert improve(QUESTION, completion) == improved
    assert score(QUESTION, improved) >= score(QUESTION, completion)


@pytest.mark.parametrize("completion", ["", " \n", ".", "\ud800", "\0" * 9, "番茄", "<data-0>{}[]" * 100, "a" * 10**5])
@pytest.mark.parametrize("question", [QUESTION, "", "Who are you?"])
def test_any_text_can_be_scored_and_improved(question, completion):
    assert score(question, completion) == 0.0
    assert score(question, improve(question, completion)) >= 0.7
