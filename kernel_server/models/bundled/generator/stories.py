"""Small stories: good or bad things happen to somebody, who then feels good or bad.

Decides how event sentences are composed, which are kept for the test (one in six: the sentence
apart from the name appears in no training text), and which words count as positive or negative.
The words that carry an event's valence never appear in the feelings that follow, so a
continuation that fits is more than a copied word.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import product

from . import lexicon

THINGS = lexicon.words(
    "key boat letter ring map watch coat bike cup phone wallet suitcase painting violin tent "
    "camera chair helmet kettle sledge scarf notebook medal shoes necklace radio clock jacket "
    "umbrella sword"
)
GOOD_DEEDS = (
    "found", "fixed", "won", "saved", "got back", "repaired", "was given", "earned", "admired",
    "finished", "polished", "could keep",
)  # fmt: skip
BAD_DEEDS = (
    "lost", "broke", "ruined", "dropped", "damaged", "was robbed of", "burned", "forgot",
    "wasted", "destroyed", "scratched", "had to sell",
)  # fmt: skip
AGENTS = lexicon.words(
    "friend neighbour teacher stranger doctor baker driver waiter nurse farmer singer "
    "painter soldier judge guard"
)
GOOD_TREATMENT = (
    "praised", "helped", "hugged", "invited", "thanked", "cheered for", "rewarded", "welcomed",
    "comforted", "trusted",
)  # fmt: skip
BAD_TREATMENT = (
    "insulted", "ignored", "cheated", "blamed", "attacked", "shouted at", "tricked", "rejected",
    "mocked", "threatened",
)  # fmt: skip
SUBJECTS = lexicon.words(
    "soup cake tea music hotel train room film weather journey bed food view concert "
    "lesson party bread dinner game holiday"
)
GOOD_QUALITIES = (
    "excellent", "perfect", "pleasant", "splendid", "superb", "charming", "delightful", "fine",
    "brilliant", "comfortable",
)  # fmt: skip
BAD_QUALITIES = (
    "horrible", "dirty", "rotten", "nasty", "disgusting", "painful", "boring", "poor",
    "disastrous", "unbearable",
)  # fmt: skip
NEUTRAL = (
    "It was a Monday.", "The street was empty.", "A cat sat by the door.", "It was almost ten.",
    "The lights were on.", "There were many people.", "The road was long.", "It was spring.",
)  # fmt: skip
CUES = (
    "In the evening", "At the end of the day", "That night", "Afterwards", "When it was over",
    "Some time later", "Back at home", "On the way home",
)  # fmt: skip
FEELINGS = {
    1: ("happy", "proud", "glad", "cheerful", "joyful", "grateful"),
    -1: ("sad", "angry", "upset", "gloomy", "miserable", "lonely"),
}
DAYS = {
    1: ("wonderful", "great", "lovely", "beautiful"),
    -1: ("terrible", "wretched", "bad", "dreadful"),
}
DOINGS = {
    1: ("smiled", "laughed", "danced", "sang"),
    -1: ("cried", "sighed", "wept", "frowned"),
}


def _telling_words() -> frozenset[str]:
    good = set(" ".join(GOOD_DEEDS + GOOD_TREATMENT + GOOD_QUALITIES).split())
    bad = set(" ".join(BAD_DEEDS + BAD_TREATMENT + BAD_QUALITIES).split())
    return frozenset(word for word in good ^ bad if len(word) >= 4)


TELLING_WORDS = _telling_words()
"""The words that make an event good or bad: found, lost, praised, horrible and so on."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event sentence with `{N}` for the name; `valence` is 1 (good) or -1 (bad)."""

    text: str
    valence: int
    kind: str


@dataclass(frozen=True, slots=True)
class StoryCase:
    """A story up to the point where the feeling follows."""

    prompt: str
    valence: int
    name: str
    events: tuple[str, ...]


def _events() -> tuple[Event, ...]:
    made = []
    for valence, deeds, treatments, qualities in (
        (1, GOOD_DEEDS, GOOD_TREATMENT, GOOD_QUALITIES),
        (-1, BAD_DEEDS, BAD_TREATMENT, BAD_QUALITIES),
    ):
        for deed, thing in product(deeds, THINGS):
            made.append(Event(f"{{N}} {deed} the {thing}.", valence, "deed"))
        for agent, treatment in product(AGENTS, treatments):
            made.append(Event(f"A {agent} {treatment} {{N}}.", valence, "treatment"))
        for subject, quality in product(SUBJECTS, qualities):
            made.append(Event(f"The {subject} was {quality}.", valence, "quality"))
    return tuple(made)


EVENTS = _events()
HELD_OUT_EVENTS = tuple(e for e in EVENTS if lexicon.held_out("event", e.text, one_in=6))
TRAINED_EVENTS = tuple(e for e in EVENTS if not lexicon.held_out("event", e.text, one_in=6))


def _by_kind(events: tuple[Event, ...], valence: int) -> dict[str, list[Event]]:
    kinds: dict[str, list[Event]] = {}
    for event in events:
        if event.valence == valence:
            kinds.setdefault(event.kind, []).append(event)
    return kinds


_POOLS = {
    (held, valence): _by_kind(HELD_OUT_EVENTS if held else TRAINED_EVENTS, valence)
    for held in (True, False)
    for valence in (1, -1)
}


def _opening(rng: random.Random, name: str, valence: int, held: bool) -> tuple[str, list[str]]:
    pool = _POOLS[held, valence]
    kinds = rng.sample(sorted(pool), rng.choice((2, 2, 3)))
    # A story names its person before anything is said about a room or a soup.
    kinds.sort(key=lambda kind: kind == "quality")
    events = [rng.choice(pool[kind]).text.replace("{N}", name) for kind in kinds]
    sentences = list(events)
    if rng.random() < 0.3:
        sentences.insert(rng.randrange(1, len(sentences) + 1), rng.choice(NEUTRAL))
    return f"{' '.join(sentences)} {rng.choice(CUES)},", events


def _feeling(rng: random.Random, name: str, valence: int) -> str:
    first, second = rng.sample(FEELINGS[valence], 2)
    day, doing = rng.choice(DAYS[valence]), rng.choice(DOINGS[valence])
    other_doing = rng.choice([d for d in DOINGS[valence] if d != doing])
    start = rng.choice(("felt", "was", "became"))
    middle = rng.choice(
        (f"It had been a {day} day.", f"What a {day} day!", f"{name} called it a {day} day.")
    )
    end = rng.choice(
        (
            f"{name} {doing} and {other_doing}.",
            f"{name} {doing} for a long time.",
            f"{name} {doing} and went to bed.",
        )
    )
    sentences = [f"{name} {start} {first} and {second}.", middle, end]
    return " ".join(sentences[: rng.choice((2, 3, 3, 3))])


def document(rng: random.Random) -> str:
    """Make one training document: two or three events of one valence, then the feeling."""
    name, valence = rng.choice(lexicon.NAMES), rng.choice((1, -1))
    opening, _ = _opening(rng, name, valence, held=False)
    return f"{opening} {_feeling(rng, name, valence)}"


def cases(count: int, seed: int = 0, *, held_out: bool = True) -> list[StoryCase]:
    """Draw story beginnings, good and bad in turn, up to the word before the feeling.

    With `held_out` every event sentence is kept out of training text. The prompt ends where the
    next word depends on the events: a word earlier, the model has not collected their valence yet.

    Example:
        >>> [case.valence for case in cases(4)]
        [1, -1, 1, -1]
    """
    rng = random.Random(f"stories {seed} {held_out}")
    drawn = []
    for index in range(count):
        name, valence = rng.choice(lexicon.NAMES), 1 if index % 2 == 0 else -1
        prompt, events = _opening(rng, name, valence, held=held_out)
        drawn.append(StoryCase(f"{prompt} {name} felt", valence, name, tuple(events)))
    return drawn


def valence_of(text: str) -> int:
    """Judge a continuation by its words: 1 (more positive), -1 (more negative) or 0 (neither)."""
    words = re.findall(r"[a-z]+", text.lower())
    score = sum(w in lexicon.POSITIVE_WORDS for w in words)
    score -= sum(w in lexicon.NEGATIVE_WORDS for w in words)
    return (score > 0) - (score < 0)
