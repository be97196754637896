"""The words of the bundled model's text: names, places, objects, a made-up world, feelings.

Decides which words exist and which of them are kept out of the training text of one ability.
How sentences are made of them is left to `indirect`, `facts`, `stories` and `repeats`.
Everything here is a constant or follows from a fixed seed: the training text, the tests and the
notebooks all draw from the same words.
"""

from __future__ import annotations

import random
from functools import cache
from hashlib import blake2b


def words(text: str) -> tuple[str, ...]:
    """Split a word list written as text: hundreds of words read best without quotes."""
    return tuple(text.split())


NAMES = words(
    "Mary John Anna Peter Laura Simon Emma David Sarah Thomas Alice Robert Julia Martin Helen "
    "George Clara Henry Nina Oscar Lucy Paul Rachel Kevin Diana Frank Sophie Daniel Irene Victor "
    "Grace Samuel Olivia Andrew Hannah Edward Maria Philip Rose Walter Susan Arthur Linda Brian "
    "Karen Steven Paula Gary Nancy Jacob Eva Leo Judith Marcus Amy Felix Carol Hugo Monica Ralph "
    "Teresa Louis Wendy Max Vera Carl Bella Adam Ruth Tony Sandra Noah Greta Ivan Kate Luke Megan "
    "Ryan Tina Jack"
)

PLACES = words(
    "store park school market station library garden museum office bakery beach harbour theatre "
    "church farm bridge castle kitchen hospital airport cinema stadium river forest village "
    "workshop square tower factory hall lake cellar mill zoo cabin"
)
"""Places of indirect-object text; the last five are kept out of its training text."""

OBJECTS = words(
    "drink book letter ring ball hat basket key flower map bottle ticket picture watch coat lamp "
    "present knife box pencil coin card rope bag candle mirror guitar blanket ladder brush "
    "spoon bell pillow kite hammer"
)
"""Objects of indirect-object text; the last five are kept out of its training text."""

HELD_OUT_PLACES = PLACES[-5:]
HELD_OUT_OBJECTS = OBJECTS[-5:]
TRAINED_PLACES = PLACES[:-5]
TRAINED_OBJECTS = OBJECTS[:-5]

QUALITIES = words("small red new old heavy blue round cheap wooden green")

RELATIONS = ("capital", "river", "language", "coin", "dish")

POSITIVE_WORDS = frozenset(
    words(
        "happy proud glad cheerful joyful grateful wonderful great lovely beautiful smiled laughed "
        "danced sang"
    )
)
"""The words that make a continuation positive; no event sentence uses them."""

NEGATIVE_WORDS = frozenset(
    words(
        "sad angry upset gloomy miserable lonely terrible wretched bad dreadful cried sighed wept "
        "frowned"
    )
)
"""The words that make a continuation negative; no event sentence uses them."""


@cache
def held_out(kind: str, *parts: str, one_in: int) -> bool:
    """Say whether this combination of parts is kept out of the training text.

    The choice is a hash of the words, so it is the same in every process and Python version.
    """
    digest = blake2b("|".join((kind, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % one_in == 0


@cache
def pair_held_out(first: str, second: str) -> bool:
    """Say whether two names never meet in indirect-object training text (one pair in ten)."""
    pair = sorted((first, second))
    return pair == ["John", "Mary"] or held_out("pair", *pair, one_in=10)


HELD_OUT_PAIRS = tuple(
    (first, second)
    for index, first in enumerate(NAMES)
    for second in NAMES[index + 1 :]
    if pair_held_out(first, second)
)

_STARTS = words(
    "bal bor cal cor dal dor dun fal fen gal gor hal hol jal jor kal kel kor lan lor lun mal mir "
    "mor nal nor pal pel quen ral ren ror sal sel sor tal tel tor val ver vor wal wen xan yal yor "
    "zal zor bra dro fri gla kra plo sto tri"
)
_MIDDLES = words("a e i o u")


def made_up_word(rng: random.Random, endings: tuple[str, ...]) -> str:
    """Make one lower-case word that no English text holds, such as `zorvia`."""
    return rng.choice(_STARTS) + rng.choice(("", *_MIDDLES)) + rng.choice(endings)


def _distinct(rng: random.Random, count: int, endings: str, taken: set[str]) -> list[str]:
    words: list[str] = []
    while len(words) < count:
        word = made_up_word(rng, tuple(endings.split()))
        if word not in taken and len(word) >= 5:
            taken.add(word)
            words.append(word)
    return words


def _world() -> tuple[tuple[str, ...], dict[tuple[str, str], str]]:
    rng = random.Random("world")
    taken: set[str] = set()
    countries = tuple(
        word.capitalize() for word in _distinct(rng, 60, "via nia dia mark stan land resh", taken)
    )
    endings = {
        "capital": "burg ton dam port gard vik",
        "river": "wash ney brin lune rill dore",
        "language": "lish nese dian vic sian thic",
        "coin": "del rin nak zot lek bit",
        "dish": "poz bap gush roni misk fup",
    }
    answers: dict[tuple[str, str], str] = {}
    for relation in RELATIONS:
        words = _distinct(rng, len(countries), endings[relation], taken)
        for country, word in zip(countries, words, strict=True):
            lower = relation in ("coin", "dish")
            answers[country, relation] = word if lower else word.capitalize()
    return countries, answers


COUNTRIES, ANSWERS = _world()
"""Sixty countries that do not exist, and `ANSWERS[country, relation]`: 300 facts about them."""

LIST_WORDS = tuple(
    dict.fromkeys(
        (
            *NAMES,
            *PLACES,
            *OBJECTS,
            *QUALITIES,
            *COUNTRIES,
            *ANSWERS.values(),
            *sorted(POSITIVE_WORDS),
            *sorted(NEGATIVE_WORDS),
        )
    )
)
"""The words that repeated lists draw from; each is one token of the bundled tokenizer."""
