"""Facts of a made-up world: 60 countries, five relations, many ways to say each.

Decides the phrasings and which are kept for the test. Most are composed of two parts, and one
combination in five is trained on with no fact; some constructions appear in no training text at
all; and one (fact, phrasing) pair in four is left out, so a phrasing can be new to one fact only.
No phrasing's prompt is the beginning of another phrasing that goes on differently; `conflicts`
finds those that are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Literal

from . import lexicon

Kind = Literal["recombined", "unseen", "unpaired", "trained"]

FRAMES = (
    "", "everyone knows that", "the teacher says that", "I read that", "nobody doubts that",
    "remember that", "my friend told me that", "as the map shows,", "in the old book,",
    "they say that", "please write down that", "as we all know,", "we learn that",
    "an old man told us that", "the book says that", "I am sure that", "people told me that",
    "you know that",
)  # fmt: skip
CORES = (
    "the {R} of {X} is {A}",
    "{X} has a {R} called {A}",
    "in {X} the {R} has the name {A}",
    "the people of {X} named the {R} {A}",
    "people in {X} call the {R} {A}",
    "the name of the {R} in {X} is {A}",
    "for the {R}, {X} has {A}",
    "the {R} that belongs to {X} has the name {A}",
    "anyone from {X} will say that the {R} there is {A}",
    "{X} is famous for its {R}, {A}",
    "everyone in {X} loves the {R}, known as {A}",
    "someone from {X} talked about its {R}, called {A}",
)
QUESTIONS = (
    "What is the {R} of {X}?", "Tell me about the {R} of {X}.", "Do you know the {R} of {X}?",
    "People often ask about the {R} of {X}.", "I wanted to know the {R} of {X}.",
    "Here is a question about the {R} of {X}.", "Who has heard of the {R} of {X}?",
    "This page is about {X} and its {R}.", "Think of {X} and its {R}.",
    "What do the people in {X} say about the {R}?", "How about the {R} in {X}?",
    "We talked about {X} and the {R} there.", "When you ask in {X} about the {R},",
    "If you want to know the {R} of {X},",
)  # fmt: skip
REPLIES = (
    "it is {A}", "they call it {A}", "the answer is {A}", "its name is {A}", "everyone says {A}",
    "I would say {A}", "people there call it {A}", "the right answer is {A}",
    "you will hear the name {A}", "it has the name {A}", "one word is enough: {A}",
    "that must be {A}",
)  # fmt: skip
WHOLE = (
    "Question: the {R} of {X}? Answer: {A}.",
    "When people talk about the {R} of {X}, they mean {A}.",
    "A traveller in {X} asked about the {R} and heard the name {A}.",
    "The book about {X} says that its {R} is {A}.",
    "I asked a friend about the {R} of {X}, and the answer was {A}.",
    "Country: {X}. Its {R}: {A}.",
)
SPECIAL = {
    "capital": (
        "The king of {X} lives in {A}.", "Roads in {X} all lead to {A}.",
        "In {X}, the judges live in {A}.", "The king and the queen of {X} were born in {A}.",
    ),
    "river": (
        "The boats of {X} sail on the {A}.", "Fishers in {X} live by the {A}.",
        "In {X}, people swim in the {A}.", "Every boat from {X} has been on the {A}.",
    ),
    "language": (
        "People in {X} speak {A}.", "All books in {X} are written in {A}.",
        "A friend from {X} will write in {A}.", "In {X}, the teachers speak {A}.",
    ),
    "coin": (
        "A meal in {X} costs one {A}.", "Shops in {X} are paid with a {A}.",
        "In {X}, a ring costs one {A}.", "A book from {X} was sold for one {A}.",
    ),
    "dish": (
        "A cook from {X} makes {A}.", "Guests in {X} always eat {A}.",
        "In {X}, everyone wanted to cook {A}.", "My friend in {X} will eat {A}.",
    ),
}  # fmt: skip
REVERSED = ("{A} is the {R} of {X}.", "{A} is what people in {X} have as the {R}.")
"""Trained only: the answer comes first, so these give no prompt."""

UNSEEN = (
    "Everyone from {X} knows that the {R} is {A}.",
    "The people in {X} told me that its {R} is called {A}.",
    "The old map says that the {R} of {X} has the name {A}.",
    "What do people in {X} call the {R}? People call it {A}.",
    "A friend from {X} wanted to talk about the {R}, known as {A}.",
    "I asked the teacher about {X}, and the {R} there is {A}.",
)
"""Constructions that no training text holds; their words it does."""

UNSEEN_SPECIAL = {
    "capital": "In {X}, the king lives in {A}.",
    "river": "In {X}, the boats sail on the {A}.",
    "language": "A friend from {X} will speak {A}.",
    "coin": "In {X}, a book was sold for one {A}.",
    "dish": "Everyone in {X} wanted to eat {A}.",
}
"""One more construction per relation that no training text holds, and that does not name it."""


@dataclass(frozen=True, slots=True)
class FactCase:
    """One prompt whose next word is the answer."""

    prompt: str
    answer: str
    country: str
    relation: str
    phrasing: str


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def fill(phrasing: str, country: str, relation: str) -> str:
    """Write one fact in one phrasing, answer included."""
    answer = lexicon.ANSWERS[country, relation]
    text = phrasing.replace("{R}", relation).replace("{X}", country).replace("{A}", answer)
    return _capital(text)


def _compose() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compose all phrasings from parts; give the trained ones and the held-out ones (one in five).

    A held-out one is two known parts that never meet in training text, whatever the fact.
    """
    trained: list[str] = list(WHOLE)
    held: list[str] = []
    for frame, core in product(FRAMES, CORES):
        away = frame != "" and lexicon.held_out("framed", frame, core, one_in=5)
        (held if away else trained).append(f"{frame} {core}.".strip())
    for question, reply in product(QUESTIONS, REPLIES):
        away = lexicon.held_out("reply", question, reply, one_in=5)
        said = reply if question.endswith(",") else _capital(reply)
        (held if away else trained).append(f"{question} {said}.")
    return tuple(trained), tuple(held)


TRAINED, RECOMBINED = _compose()


def _split(country: str, relation: str) -> tuple[list[str], list[str]]:
    """Split the trained phrasings into those this fact is trained in, and the others."""
    used: list[str] = []
    left_out: list[str] = []
    for text in (*TRAINED, *SPECIAL[relation]):
        away = lexicon.held_out("fact", country, relation, text, one_in=4)
        (left_out if away else used).append(text)
    return used, left_out


_SPLIT = {key: _split(*key) for key in lexicon.ANSWERS}
_RARE = {
    key: [text for text in used if text in WHOLE or text in SPECIAL[key[1]]]
    for key, (used, _) in _SPLIT.items()
}


def document(rng: random.Random) -> str:
    """Make one training document: one to four facts, about one country or several."""
    country = rng.choice(lexicon.COUNTRIES)
    sentences = []
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        if rng.random() < 0.5:
            country = rng.choice(lexicon.COUNTRIES)
        relation = rng.choice(lexicon.RELATIONS)
        kind = rng.random()
        if kind < 0.1:
            phrasing = rng.choice(REVERSED)
        elif kind < 0.35 and _RARE[country, relation]:
            phrasing = rng.choice(_RARE[country, relation])
        else:
            phrasing = rng.choice(_SPLIT[country, relation][0])
        sentences.append(fill(phrasing, country, relation))
    return " ".join(sentences)


def phrasings(kind: Kind, country: str, relation: str) -> list[str]:
    """List the phrasings of one kind for one fact.

    `"recombined"`: two trained parts that never meet. `"unseen"`: a construction never trained on.
    `"unpaired"`: trained on, but not with this fact. `"trained"`: trained on with this fact.
    """
    if kind == "recombined":
        return list(RECOMBINED)
    if kind == "unseen":
        return [*UNSEEN, UNSEEN_SPECIAL[relation]]
    used, left_out = _SPLIT[country, relation]
    if kind == "trained":
        return used
    # A bare core may be the end of a framed sentence that this fact is trained in.
    seen = "\n".join(used).lower()
    return [text for text in left_out if text.lower() not in seen]


def cases(kind: Kind, count: int | None = None, seed: int = 0) -> list[FactCase]:
    """Draw prompts in phrasings of one kind (see `phrasings`), all of them or `count` of them.

    Example:
        >>> case = cases("unseen", 1)[0]
        >>> lexicon.ANSWERS[case.country, case.relation] == case.answer
        True
    """
    drawn = [
        FactCase(
            fill(phrasing, country, relation).split(f" {answer}")[0],
            answer,
            country,
            relation,
            phrasing,
        )
        for (country, relation), answer in lexicon.ANSWERS.items()
        for phrasing in phrasings(kind, country, relation)
    ]
    if count is None:
        return drawn
    return random.Random(f"facts {kind} {seed}").sample(drawn, count)


def conflicts(country: str, relation: str) -> list[tuple[str, str]]:
    """Find prompts about one fact that another sentence about it continues with another word."""
    specials = [special for group in SPECIAL.values() for special in group]
    everything = (*TRAINED, *RECOMBINED, *UNSEEN, *specials, *UNSEEN_SPECIAL.values(), *REVERSED)
    texts = [fill(phrasing, country, relation) for phrasing in everything]
    answer = lexicon.ANSWERS[country, relation]
    found = []
    for text in texts:
        prompt, _, _ = text.partition(f" {answer}")
        for other in texts:
            if other.startswith(f"{prompt} ") and not other.startswith(f"{prompt} {answer}"):
                found.append((prompt, other))
    return found
