"""Corpus of the demo: everyday questions, four kinds of completions, and a rule that scores completions.

Everything is generated from a small table, so that the demo needs no download and its scores can be explained. A
question is a topic in a template. A third of the (topic, template) pairs is held out: pretraining covers each topic
and each template, but no held-out question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["helpful", "curt", "off_topic", "rude"]
Split = Literal["train", "held_out"]

KINDS: tuple[Kind, ...] = ("helpful", "curt", "off_topic", "rude")


@dataclass(frozen=True, slots=True)
class Topic:
    """Topic of questions, such as `grow` / `growing` + `tomatoes`, with tips."""

    verb: str
    gerund: str
    noun: str
    tips: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A question and a completion of a known kind."""

    question: str
    completion: str
    kind: Kind


# One block per topic: verb, gerund, noun; then tips.
_TABLE = """
grow, growing, tomatoes
give them six hours of full sun; water the roots and never the leaves; tie the stems to a tall stake;
pinch off the side shoots every week; feed the plants once they flower

bake, baking, bread
knead the dough for ten minutes; let it rise until it has doubled; preheat the oven with a tray of water;
weigh the flour instead of guessing; cool the loaf on a rack before you slice it

wash, washing, wool jumpers
use cold water and a mild soap; press the wool gently and never wring it; roll it in a towel to remove water;
dry it flat and away from heat; turn it inside out first

brew, brewing, coffee
grind the beans just before use; rinse the paper filter with hot water; pour slowly in small circles;
use two spoons for each cup; wait half a minute after the water boils

learn, learning, chess
control the centre with your pawns; bring out the knights early; castle before you attack;
check what your opponent threatens; replay your lost games slowly

train, training, puppies
reward good behaviour with a treat at once; keep each lesson under five minutes; use the same short word each time;
practise in a quiet room first; end on an easy success

paint, painting, walls
wash off the dust and grease; cover the floor with an old sheet; tape the edges before you open the tin;
work from the top downwards; let the first coat dry overnight

cook, cooking, rice
rinse the grains until the water runs clear; add twice as much water as grain; keep the lid closed while it simmers;
let it rest for five minutes; loosen it with a fork

clean, cleaning, windows
choose a cloudy day for the job; mix a little vinegar into warm water; wipe the glass with a soft rubber blade;
start at the upper corner; polish the last streaks with newspaper

knit, knitting, scarves
choose thick yarn and large needles; cast on thirty loose stitches; count the stitches after every row;
keep an even tension on the yarn; weave in the loose ends

pitch, pitching, tents
look for flat and dry ground; clear away stones and twigs; point the door away from the wind;
drive the pegs in at an angle; tighten the ropes again before night

watch, watching, birds
get up at dawn when they are active; move slowly and wear dull colours; carry a light pair of binoculars;
listen for the song before you look; write down the shape of the beak

make, making, soup
fry the onions until they are golden; simmer the stock on low heat; add the soft vegetables last;
season it at the very end; save some of it in the freezer

fold, folding, paper cranes
begin with a perfectly square sheet; press every crease with your nail; follow the diagram one step at a time;
line up the corners exactly; pull the wings apart softly

tune, tuning, guitars
warm up the strings by playing a little; always turn the peg upwards to the note; start with the lowest string;
replace strings that sound dull; compare each note with a reference

repair, repairing, bicycle tyres
take the wheel off the frame; find the hole by holding the tube under water; roughen the rubber around the hole;
press the patch down for a full minute; pump in some air to test it

plant, planting, roses
dig a hole twice as wide as the pot; mix compost into the soil; prune the weak stems in late winter;
soak the roots for an hour; leave space for air to pass

pack, packing, suitcases
make a list the day before; roll your clothes to save space; put the heavy things near the wheels;
fill your shoes with socks; keep your papers within reach

draw, drawing, portraits
sketch a light oval for the head; place the eyes halfway down; compare the distances with your pencil;
shade from light to dark; squint to see the main shadows

bake, baking, cookies
chill the dough for half an hour; leave a gap between them on the tray; take them out while the middle is soft;
beat the butter and sugar until pale; turn the tray around halfway through
"""

_TEMPLATES = (
    "How do I {verb} {noun}?",
    "What is the best way to {verb} {noun}?",
    "Any tips for {gerund} {noun}?",
    "I am new to {gerund} {noun}. Where do I start?",
    "My friend wants to {verb} {noun}. What should I tell her?",
    "Can you give me some advice on {gerund} {noun}?",
)
_OPENERS = ("Sure!", "Of course!", "Happy to help!", "Good question!", "With pleasure!")
_CLOSERS = ("Good luck!", "Enjoy it!", "I hope this helps.", "Have fun!", "Let me know how it goes.")
_FIRST = ("", "first, ")
_NEXT = ("", "then ", "also, ")
_NO_IDEA = "Good question! I am afraid that I know nothing about it."
_CURT = (
    "Well, {gerund} {noun} is easy.",
    "Just try {gerund} {noun}.",
    "There is not much to {noun}.",
    "Look up {noun} somewhere.",
    "Some people {verb} {noun}, some do not.",
)
_DIGRESSIONS = (
    "That reminds me of {gerund} {noun}.",
    "Let us talk about {gerund} {noun} instead.",
    "Yesterday I thought about {gerund} {noun}.",
    "Some people prefer {gerund} {noun}.",
)
_RUDE = (
    "What a stupid question.",
    "Nobody cares about your silly {noun}.",
    "You are too lazy for {gerund} {noun}.",
    "Stop wasting my time.",
    "Only a fool would {verb} {noun}.",
    "Go away and be boring elsewhere.",
)
_RUDE_WORDS = ("stupid", "silly", "lazy", "wasting my time", "fool", "boring", "nobody cares", "go away")


def _parse(table: str) -> tuple[Topic, ...]:
    topics = []
    for block in table.strip().split("\n\n"):
        name, tips = block.split("\n", 1)
        verb, gerund, noun = name.split(", ")
        topics.append(Topic(verb, gerund, noun, tuple(" ".join(tip.split()) for tip in tips.split(";"))))
    return tuple(topics)


TOPICS = _parse(_TABLE)


def questions(split: Split) -> list[str]:
    """Return the 80 training questions, or the 40 held-out ones (two of the six templates of each topic)."""
    return [question for question, _ in _pairs(split)]


def dialogues(num: int, seed: int, kinds: Sequence[Kind] = KINDS, split: Split = "train") -> list[Dialogue]:
    """Draw `num` dialogues about the questions of a split, with kinds drawn uniformly."""
    rng = random.Random(seed)  # noqa: S311 (not used for security)
    pairs = _pairs(split)
    drawn = []
    for _ in range(num):
        question, topic = rng.choice(pairs)
        kind = rng.choice(kinds)
        drawn.append(Dialogue(question, _BUILDERS[kind](topic, rng), kind))
    return drawn


def vocabulary() -> list[str]:
    """Return texts with every word of questions, completions and improved completions.

    Each text is a sentence twice: its first word becomes another token at the start of a text than after a space.
    """
    sentences = [*_OPENERS, *_CLOSERS, _NO_IDEA]
    for topic in TOPICS:
        sentences += [_fill(template, topic) for template in (*_TEMPLATES, *_CURT, *_DIGRESSIONS, *_RUDE)]
        sentences += [_capitalize(f"{lead}{tip}.") for lead in (*_FIRST, *_NEXT) for tip in topic.tips]
    return [f"{sentence} {sentence}" for sentence in sentences]


def score(question: str, completion: str) -> float:
    """Score a completion of a question in [0, 1] by a rule.

    The score is the sum of

    - 0.35 if it is on topic: it names the topic or contains a tip about it;
    - 0.20 for each of up to two tips about the topic, word for word;
    - 0.10 if it is courteous: it contains a friendly opening or closing phrase;
    - 0.10 if it has at least ten different words;
    - 0.05 if it ends in a full stop, an exclamation mark or a question mark.

    An off-topic completion scores at most 0.20, and a rude word makes the score 0. In the corpus, helpful completions
    score 0.6 to 1, curt ones 0.4, off-topic ones 0.05 to 0.15 and rude ones 0. Any text can be scored; questions
    outside the corpus have no tips.
    """
    text = _normalize(completion)
    if not text.strip() or any(_normalize(word) in text for word in _RUDE_WORDS):
        return 0.0
    courteous = any(_normalize(phrase) in text for phrase in _OPENERS + _CLOSERS)
    long_enough = len(set(text.split())) >= 10
    finished = completion.rstrip().endswith((".", "!", "?"))
    form = 0.10 * courteous + 0.10 * long_enough + 0.05 * finished

    topic = _topic_of(question)
    num_tips = sum(_normalize(tip) in text for tip in topic.tips) if topic else 0
    if topic and (num_tips or _normalize(topic.noun) in text):
        return round(0.35 + 0.20 * min(num_tips, 2) + form, 2)
    return round(min(form, 0.20), 2)


def improve(question: str, completion: str) -> str:
    """Return a completion that scores 1 and keeps the tips of `completion`.

    The same arguments give the same text. A question outside the corpus gets an apology.
    """
    topic = _topic_of(question)
    if topic is None:
        return _NO_IDEA
    text = _normalize(completion)
    rng = random.Random(f"{question}\n{completion}".encode(errors="replace"))  # noqa: S311
    # The sort is stable and puts tips that the completion already contains first.
    tips = sorted(rng.sample(topic.tips, len(topic.tips)), key=lambda tip: _normalize(tip) not in text)[:2]
    return f"{rng.choice(_OPENERS)} {_advice(tips, rng)} {rng.choice(_CLOSERS)}"


def _pairs(split: Split) -> list[tuple[str, Topic]]:
    return [
        (_fill(template, topic), topic)
        for i, topic in enumerate(TOPICS)
        for j, template in enumerate(_TEMPLATES)
        if ((i + j) % 3 == 0) == (split == "held_out")
    ]


def _helpful(topic: Topic, rng: random.Random) -> str:
    opener = rng.choice(_OPENERS) if rng.random() < 0.5 else ""
    closer = rng.choice(_CLOSERS) if rng.random() < 0.5 else ""
    return f"{opener} {_advice(rng.sample(topic.tips, rng.choice((1, 2, 2))), rng)} {closer}".strip()


def _curt(topic: Topic, rng: random.Random) -> str:
    return _fill(rng.choice(_CURT), topic)


def _off_topic(topic: Topic, rng: random.Random) -> str:
    other = rng.choice([candidate for candidate in TOPICS if candidate is not topic])
    return f"{_fill(rng.choice(_DIGRESSIONS), other)} {_advice([rng.choice(other.tips)], rng)}"


def _rude(topic: Topic, rng: random.Random) -> str:
    return " ".join(_fill(insult, topic) for insult in rng.sample(_RUDE, rng.choice((1, 2))))


_BUILDERS = {"helpful": _helpful, "curt": _curt, "off_topic": _off_topic, "rude": _rude}


def _advice(tips: Sequence[str], rng: random.Random) -> str:
    """Return tips as sentences."""
    leads = [rng.choice(_FIRST) if len(tips) > 1 else "", *(rng.choice(_NEXT) for _ in tips[1:])]
    return " ".join(_capitalize(f"{lead}{tip}.") for lead, tip in zip(leads, tips, strict=True))


def _fill(template: str, topic: Topic) -> str:
    return _capitalize(template.format(verb=topic.verb, gerund=topic.gerund, noun=topic.noun))


def _capitalize(text: str) -> str:
    return text[0].upper() + text[1:]


def _topic_of(question: str) -> Topic | None:
    text = _normalize(question)
    return next((topic for topic in TOPICS if _normalize(topic.noun) in text), None)


def _normalize(text: str) -> str:
    """Return the lower-case words of a text, each surrounded by spaces, so that `in` matches whole words."""
    return f" {' '.join(re.findall(r'[a-z]+', text.lower()))} "
