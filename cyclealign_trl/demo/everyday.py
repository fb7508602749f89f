"""Everyday questions for a chat model, and a rule that scores answers: short, complete and on the topic.

The score is dense: two answers of a chat model seldom have the same, so that a ranking of its samples has few ties.
"""

from __future__ import annotations

import re

TRAIN_QUESTIONS = (
    "How do I keep basil alive on a kitchen windowsill?",
    "What should I pack for a weekend by the sea?",
    "How can I get a coffee stain out of a white shirt?",
    "Why do cats sleep so much?",
    "What is a good way to remember people's names?",
    "How do I boil an egg so that the yolk stays soft?",
    "How can I make my bicycle chain run quietly?",
    "What can I cook with lentils and an onion?",
    "How do I wrap a round present?",
    "What makes bread rise?",
    "How should I water a cactus?",
    "How can I fall asleep faster?",
    "What is the difference between a crow and a raven?",
    "How do I sharpen a kitchen knife at home?",
    "How can I stop my glasses from fogging up?",
    "What should I do when I have the hiccups?",
    "How do I store potatoes for the winter?",
    "What is a simple exercise for a stiff neck?",
    "Why is the sky red in the evening?",
    "How do I write a thank-you note to a teacher?",
    "How can I teach a dog to sit?",
    "What do I need to start birdwatching?",
    "How do I clean a wooden cutting board?",
    "Why do leaves change their colour in autumn?",
    "How can I keep a houseplant alive while I travel?",
    "What is a good first book for someone who never reads?",
    "How do I fold a fitted sheet?",
    "How can I learn ten words of Italian a day?",
    "What should I check before I buy a used bicycle?",
    "How do I make a paper boat?",
    "How can I make a small room look larger?",
    "What is the best way to peel garlic?",
)
HELD_OUT_QUESTIONS = (
    "How do I keep flowers fresh in a vase?",
    "What should I take on a day hike in the mountains?",
    "How can I get candle wax off a tablecloth?",
    "Why do onions make me cry?",
    "What is a good way to start a diary?",
    "How do I cook rice without burning it?",
    "How can I make a squeaking door quiet?",
    "What can I bake without an oven?",
    "How do I get a splinter out of a finger?",
    "Why is the sea salty?",
    "How can I dry herbs from the garden?",
    "What is a good game for a long train ride?",
    "How do I tie a bow tie?",
    "How can I keep moths out of my wardrobe?",
    "What should I feed a hedgehog?",
    "Why do my ears pop in an aeroplane?",
    "How do I plan a birthday party for a child?",
    "How can I learn to whistle?",
    "What makes popcorn pop?",
    "How do I clean a cast-iron pan?",
    "How can I make friends in a new town?",
    "What is a quick breakfast with oats?",
    "How do I iron a shirt?",
    "Why do stars twinkle?",
)

_WORD = re.compile(r"[a-z]+")
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")
# A word before the mark, so that the number of a list's next item ("2.") ends no sentence.
_FINISHED = re.compile(r"[^\W\d_][\"')*]{0,3}[.!?]{1,3}[\"')*]{0,3}$")
_MIN_WORDS, _FEW_WORDS, _MAX_WORDS, _LONG = 5, 15, 25, 60
# Words of the questions that do not show what a question is about.
_COMMON = set(
    _WORD.findall(
        "a an and are at be before best buy by can difference do for from get good had have how i in into is it keep "
        "make makes me much my need never new of off on out should so someone stop take that the their them to up way "
        "what when while who why with without"
    )
)


def score(question: str, completion: str) -> float:
    """Score an answer in [0, 1].

    An answer with fewer than 5 different words scores 0. Otherwise, the score is the sum of

    - 0.4 if the answer ends with a finished sentence;
    - up to 0.3 for its length: all of it for 15 to 25 words, less for fewer different words, none for 60
      words or more;
    - up to 0.3 for the share of the question's content words that the answer contains.
    """
    words = _WORD.findall(completion.lower())
    different = len(set(words))
    if different < _MIN_WORDS:
        return 0.0
    length = max(0.0, min(1.0, different / _FEW_WORDS, (_LONG - len(words)) / (_LONG - _MAX_WORDS)))
    topic = set(_WORD.findall(question.lower())) - _COMMON
    named = sum(any(word.startswith(stem[:4]) for word in words) for stem in topic) / max(1, len(topic))
    return round(0.4 * _is_finished(completion) + 0.3 * length + 0.3 * named, 4)


def improve(question: str, completion: str) -> str:
    """Return the best-scoring beginning of an answer that ends with a sentence, up to 25 words.

    A finished answer that scores more is returned unchanged. An answer without a finished sentence is ended after 25
    words. An answer that scores 0 even so is replaced by an apology. The improved answer has no lower score.
    """
    beginnings = [""]
    for sentence in filter(_is_finished, _BETWEEN_SENTENCES.split(completion)):
        beginning = f"{beginnings[-1]} {sentence}".strip()
        if len(beginning.split()) > _MAX_WORDS:
            break
        beginnings.append(beginning)
    best = max([*beginnings, completion], key=lambda text: score(question, text))
    if not _is_finished(best):
        best = " ".join(completion.split()[:_MAX_WORDS]).rstrip(",;:.!?- ") + "."
    return best if score(question, best) else "I am sorry, I do not know."


def _is_finished(text: str) -> bool:
    return _FINISHED.search(text.rstrip()[-10:]) is not None
