"""Everyday questions, and the rule that scores answers to them."""

import itertools

import pytest

from cyclealign_trl.demo.everyday import HELD_OUT_QUESTIONS, TRAIN_QUESTIONS, improve, score

QUESTION = "How do I keep flowers fresh in a vase?"
SENTENCE = "Change the water every day."
WHOLE = "Change the water in the vase every day to keep your flowers fresh and your home bright."
APOLOGY = "I am sorry, I do not know."
RAMBLING = " and then some more of it" * 12


def test_questions_are_distinct_and_held_out():
    assert (len(set(TRAIN_QUESTIONS)), len(set(HELD_OUT_QUESTIONS))) == (32, 24)
    assert not set(TRAIN_QUESTIONS) & set(HELD_OUT_QUESTIONS)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (WHOLE, 1.0),
        (WHOLE.removesuffix("."), 0.6),
        (SENTENCE, 0.5),
        ("Flowers stay happy in cool water.", 0.62),
        (f"Change the water{RAMBLING}.", 0.4),
        (f"Change the water{RAMBLING}", 0.0),
        ("Use 1. water 2. sugar 3.", 0.0),
        ("Fresh flowers need three things:\n\n1.", 0.3),
        ("Water! Water! Water! Water! Water! Water!", 0.0),
        ("All right!", 0.0),
        ('She said: "Cut the stems at a slant."', 0.56),
    ],
)
def test_scores_of_examples(completion, expected):
    assert score(QUESTION, completion) == pytest.approx(expected, abs=1e-4)


def test_the_score_falls_with_every_word_beyond_25():
    text = "we change water daily because old warm soup makes all stems rot too soon"
    scores = [score(QUESTION, f"{text}{' again' * number}.") for number in range(50)]
    enough = 25 - len(text.split())
    assert scores[2 : enough + 1] == [scores[2]] * (enough - 1)
    falling = scores[enough : 60 - len(text.split()) + 1]
    assert all(longer < shorter for shorter, longer in itertools.pairwise(falling))
    assert set(scores[60 - len(text.split()) :]) == {0.4}


def test_the_score_rises_with_every_new_word_of_a_short_answer_and_with_the_end_of_its_sentence():
    whole = "we change its water on all mornings because old warm soup makes every stem rot"
    texts = [" ".join(whole.split()[:number]) for number in range(5, 16)]
    scores = [score(QUESTION, text) for text in texts]
    assert scores == sorted(set(scores))
    assert scores[-1] == 0.3
    for text in texts:
        assert score(QUESTION, f"{text}.") == pytest.approx(score(QUESTION, text) + 0.4, abs=1e-4)


def test_the_score_rises_with_every_word_of_the_question():
    texts = [WHOLE, WHOLE.replace("vase", "jar"), WHOLE.replace("vase", "jar").replace("flowers", "plants")]
    scores = [score(QUESTION, text) for text in texts]
    assert scores == sorted(set(scores), reverse=True)


@pytest.mark.parametrize(
    ("completion", "improved"),
    [
        (WHOLE, WHOLE),
        (f"{SENTENCE} Cut the stems at a slant.", f"{SENTENCE} Cut the stems at a slant."),
        (f"{SENTENCE}\n\n1. **Cut the stems.** Then add", SENTENCE),
        (f"{SENTENCE} First, you cut{RAMBLING}.", SENTENCE),
        ("Cut the stems, because", APOLOGY),
        ("Cut all of the stems, because", "Cut all of the stems, because."),
        (f"Cut{RAMBLING}", f"Cut{' and then some more of it' * 4}."),
        ("", APOLOGY),
    ],
)
def test_an_improved_answer_is_short_and_finished(completion, improved):
    assert improve(QUESTION, completion) == improved
    assert score(QUESTION, improved) >= score(QUESTION, completion)


@pytest.mark.parametrize("completion", ["", " \n", ".", "\ud800", "\0" * 9, "番茄", "<data-0>{}[]" * 100, "a" * 10**5])
@pytest.mark.parametrize("question", [QUESTION, "", "Who are you?"])
def test_any_text_can_be_scored_and_improved(question, completion):
    assert score(question, completion) == 0.0
    assert score(question, improve(question, completion)) >= 0.5
