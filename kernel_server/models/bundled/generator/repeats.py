"""Repeated lists: a random sequence of words, said again.

Decides what is repeated (known words, or invented ones of several tokens) and how often.
Sequences of random token ids need no text and are made by training and evaluation themselves.
"""

from __future__ import annotations

import random

from . import lexicon

_ENDINGS = lexicon.words("bit dok fam gil hap jen kud lom mip nax pog rud sev tim vop wug yam zib")


def invented_word(rng: random.Random) -> str:
    """Make a word of several tokens, new almost every time."""
    return lexicon.made_up_word(rng, _ENDINGS) + rng.choice(("", *_ENDINGS))


def sequence(rng: random.Random, length: int, *, invented: bool) -> list[str]:
    """Draw `length` different words."""
    if not invented:
        return rng.sample(lexicon.LIST_WORDS, length)
    # A dict and not a set: the order of a set of words differs from process to process.
    words: dict[str, None] = {}
    while len(words) < length:
        words[invented_word(rng)] = None
    return list(words)


def document(rng: random.Random) -> str:
    """Make one training document: a list of 3 to 20 words, two to four times over."""
    words = sequence(rng, rng.randint(3, 20), invented=rng.random() < 0.3)
    times = 2 if len(words) > 10 else rng.choice((2, 2, 3, 4))
    return " ".join(words * times)


def cases(count: int, length: int, seed: int = 0, *, invented: bool = False) -> list[str]:
    """Draw lists of `length` words, each said twice, as one text.

    Example:
        >>> words = cases(1, 5)[0].split()
        >>> words[:5] == words[5:]
        True
    """
    rng = random.Random(f"repeats {seed} {length} {invented}")
    return [" ".join(sequence(rng, length, invented=invented) * 2) for _ in range(count)]
