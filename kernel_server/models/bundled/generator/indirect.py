"""Indirect-object sentences: two people are introduced, one of them gives, the other receives.

Decides how an introduction and a giving phrase are composed from parts, and which combinations
are kept for the test. The words come from `lexicon`; the mix with other text from `documents`.

Held out of all training text, and together in every test prompt: the pair of names, the pair
(opening, event), the pair (event, act), the place and the object. Every part alone is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from . import lexicon

SUBORDINATE_OPENINGS = (
    "when", "while", "after", "as", "once", "because", "just as", "soon after", "right after",
    "on the day that", "the moment that", "one hour after", "a week after", "not long after",
)  # fmt: skip
MAIN_OPENINGS = (
    "", "yesterday", "one morning", "last week", "on Sunday", "in the afternoon", "at noon",
    "this spring", "long ago", "that evening", "on a cold day", "during the holiday", "as usual",
    "late at night", "two days ago", "for the first time", "by chance", "in the summer",
)  # fmt: skip
PAIRS = (
    "{A} and {B}", "both {A} and {B}", "my friends {A} and {B}", "the neighbours {A} and {B}",
    "our guests {A} and {B}", "young {A} and old {B}", "{A} and also {B}",
)  # fmt: skip
JOINT_EVENTS = (
    "went to the", "walked to the", "arrived at the", "met at the", "had a long day at the",
    "were working at the", "got lost near the", "sat down in the", "were waiting outside the",
    "drove to the", "had lunch at the", "came back from the", "left the", "cleaned the",
    "looked around the", "ran to the", "stopped at the", "spent the day at the",
    "talked in front of the", "stood next to the", "had fun at the", "played near the",
    "rested at the", "hurried to the", "found a way to the", "got to the", "travelled to the",
    "visited the", "were on the way to the", "stayed at the",
)  # fmt: skip
MEETING_EVENTS = (
    "{A} met {B} at the", "{A} joined {B} at the", "{A} ran into {B} near the",
    "{A} walked with {B} to the", "{A} followed {B} to the", "{A} saw {B} in front of the",
    "{A} waited with {B} outside the", "{A} took {B} to the", "{A} was with {B} at the",
    "{A} found {B} in the", "{A} visited {B} at the", "{A} sat next to {B} in the",
)  # fmt: skip
EVENTS = JOINT_EVENTS + MEETING_EVENTS
TAILS = (
    "together", "with a dog", "in the rain", "after work", "before lunch", "for an hour",
    "early in the morning", "again", "by bus", "in a hurry", "for a change", "without a plan",
)  # fmt: skip
FILLERS = (
    "The weather was nice.", "It was very quiet there.", "The place was full of people.",
    "Nobody said a word.", "It was getting dark.", "There was not much to do.",
    "A dog was running around.", "Some music was playing.", "The sun was up.",
    "It had rained all day.", "Everyone was tired.", "They had a lot of time.",
)  # fmt: skip
LINKS = (
    "then", "later", "after a while", "suddenly", "in the end", "a little later", "at last",
    "without a word", "quietly", "kindly", "finally", "at once",
)  # fmt: skip
OBJECT_ACTS = (
    "gave a {O} to", "handed a {O} to", "passed a {O} to", "offered a {O} to", "sent a {O} to",
    "brought a {O} to", "showed a {O} to", "lent a {O} to", "sold a {O} to", "threw a {O} to",
    "wanted to give a {O} to", "decided to give a {O} to", "returned a {O} to",
    "promised a {O} to", "tried to sell a {O} to", "carried a {O} over to",
    "was happy to hand a {O} to", "bought a {O} for", "made a {O} for", "found a {O} for",
    "picked up a {O} and gave it to", "left a {O} for", "carried a {O} home for",
)  # fmt: skip
PLAIN_ACTS = (
    "said hello to", "whispered something to", "sang a song for", "told a story to",
    "waved to", "had a talk with", "asked a favour of", "shook hands with",
)  # fmt: skip
ACTS = OBJECT_ACTS + PLAIN_ACTS
FOLLOW_UPS = (
    "{R} thanked {S}.", "{R} said thank you to {S}.", "{S} was pleased to help {R}.",
    "Then {S} went home.", "{R} said that it was very kind.", "{S} and {R} talked for an hour.",
    "After that, {R} went home with {S}.", "{R} did not know what to say.",
    "{S} waved and walked away.", "Then {R} and {S} left the {P} together.",
    "{R} looked at {S} and said nothing.", "{S} asked {R} to come back soon.",
)  # fmt: skip

CLASSIC = "When Mary and John went to the store, John gave a drink to"
"""The prompt of the literature; its pair of names is held out, so training text never holds it."""


@dataclass(frozen=True, slots=True)
class IndirectCase:
    """One prompt whose next word is the name of the person who did not act.

    `corrupted` is the same prompt with the acting name swapped, so its answer is `subject`.
    `order` is `"ABB"` when the first name is the answer, `"BAB"` when the second is.
    """

    prompt: str
    answer: str
    subject: str
    corrupted: str
    order: str
    opening: str
    event: str
    act: str

    @property
    def first_name(self) -> str:
        """The name that was introduced first: the answer of the first-name shortcut."""
        return self.answer if self.order == "ABB" else self.subject

    @property
    def second_name(self) -> str:
        """The name that was introduced second: the answer of the second-name shortcut."""
        return self.subject if self.order == "ABB" else self.answer


@dataclass(frozen=True, slots=True)
class _Scene:
    """Everything a prompt says except who acts, with `{S}` where the acting name stands."""

    text: str
    first: str
    second: str
    place: str


def opening_event_held_out(opening: str, event: str) -> bool:
    """Say whether this opening never stands before this event in training text (one in eight).

    No opening at all combines with every event: nothing new would be tested by holding it out.
    """
    return opening != "" and lexicon.held_out("opening-event", opening, event, one_in=8)


def event_act_held_out(event: str, act: str) -> bool:
    """Say whether this act never follows this event in training text (one in eight)."""
    return lexicon.held_out("event-act", event, act, one_in=8)


def _held_out_recipes() -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (opening, event, act)
        for opening, event in product(SUBORDINATE_OPENINGS + MAIN_OPENINGS, EVENTS)
        if opening_event_held_out(opening, event)
        for act in OBJECT_ACTS
        if event_act_held_out(event, act)
    )


HELD_OUT_RECIPES = _held_out_recipes()
"""Every (opening, event, act) whose two neighbouring combinations are both held out."""


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _scene(
    rng: random.Random,
    names: Sequence[str],
    recipe: tuple[str, str, str],
    place: str,
    thing: str,
) -> _Scene:
    opening, event, act = recipe
    first, second = names
    if event in MEETING_EVENTS:
        clause = event
    else:
        pair = PAIRS[0] if rng.random() < 0.5 else rng.choice(PAIRS[1:])
        clause = f"{pair} {event}"
    clause = f"{clause} {place}"
    if rng.random() < 0.35:
        clause = f"{clause} {rng.choice(TAILS)}"
    link = rng.choice(LINKS) if rng.random() < 0.35 else ""
    if opening in SUBORDINATE_OPENINGS:
        head, joint = f"{opening} {clause}, ", f"{link} " if link else ""
    else:
        comma = ", " if rng.random() < 0.5 else " "
        head = f"{opening}{comma}{clause}" if opening else clause
        style = rng.random()
        if style < 0.35:
            joint = f", and {link} " if link else ", and "
        else:
            filler = f" {rng.choice(FILLERS)}" if rng.random() < 0.4 else ""
            joint = f".{filler} " + (f"{_capital(link)}, " if link else "")
    if rng.random() < 0.25:
        thing = f"{rng.choice(lexicon.QUALITIES)} {thing}"
    text = _capital((head + joint).replace("{A}", first).replace("{B}", second))
    return _Scene(f"{text}{{S}} {act.replace('{O}', thing)}", first, second, place)


def document(rng: random.Random) -> str:
    """Make one training document: a prompt, its answer and up to four sentences more."""
    first, second = rng.sample(lexicon.NAMES, 2)
    while lexicon.pair_held_out(first, second):
        first, second = rng.sample(lexicon.NAMES, 2)
    event = rng.choice(EVENTS)
    # "" stands four times among the main openings: sentences mostly begin with their subject.
    openings = SUBORDINATE_OPENINGS if rng.random() < 0.5 else ("", "", "", *MAIN_OPENINGS)
    opening = rng.choice(openings)
    while opening_event_held_out(opening, event):
        opening = rng.choice(openings)
    acts = OBJECT_ACTS if rng.random() < 0.85 else PLAIN_ACTS
    act = rng.choice(acts)
    while event_act_held_out(event, act):
        act = rng.choice(acts)
    place, thing = rng.choice(lexicon.TRAINED_PLACES), rng.choice(lexicon.TRAINED_OBJECTS)
    scene = _scene(rng, (first, second), (opening, event, act), place, thing)
    subject, receiver = (first, second) if rng.random() < 0.5 else (second, first)
    if rng.random() < 0.06:
        # Somebody else acts: then either name may follow, so the model has to notice the repeat.
        stranger = rng.choice(lexicon.NAMES)
        while stranger in (first, second):
            stranger = rng.choice(lexicon.NAMES)
        subject = stranger
    text = f"{scene.text.replace('{S}', subject)} {receiver}."
    for follow_up in rng.sample(FOLLOW_UPS, rng.choice((0, 2, 3, 3, 4, 4))):
        more = follow_up.replace("{R}", receiver).replace("{S}", subject).replace("{P}", place)
        text = f"{text} {more}"
    return text


def cases(count: int, seed: int = 0, *, held_out: bool = True) -> list[IndirectCase]:
    """Draw test prompts, each scene in both name orders, so `count` is even.

    With `held_out` the pair of names, both neighbouring combinations of parts, the place and the
    object are all kept out of training text; without it only the pair of names is.

    Example:
        >>> case = cases(2, seed=1)[0]
        >>> case.prompt.split()[-1] in ("to", "for"), case.answer in case.prompt
        (True, True)
    """
    if count % 2:
        raise ValueError(f"each scene gives two prompts: ask for {count + 1} instead of {count}")
    rng = random.Random(f"indirect {seed} {held_out}")
    drawn: list[IndirectCase] = []
    while len(drawn) < count:
        names = list(rng.choice(lexicon.HELD_OUT_PAIRS))
        rng.shuffle(names)
        if held_out:
            recipe = rng.choice(HELD_OUT_RECIPES)
            place = rng.choice(lexicon.HELD_OUT_PLACES)
            thing = rng.choice(lexicon.HELD_OUT_OBJECTS)
        else:
            recipe = (
                rng.choice(SUBORDINATE_OPENINGS + MAIN_OPENINGS),
                rng.choice(EVENTS),
                rng.choice(OBJECT_ACTS),
            )
            if opening_event_held_out(*recipe[:2]) or event_act_held_out(*recipe[1:]):
                continue
            place = rng.choice(lexicon.TRAINED_PLACES)
            thing = rng.choice(lexicon.TRAINED_OBJECTS)
        scene = _scene(rng, names, recipe, place, thing)
        prompts = {name: scene.text.replace("{S}", name) for name in names}
        for answer, subject, order in (
            (scene.first, scene.second, "ABB"),
            (scene.second, scene.first, "BAB"),
        ):
            drawn.append(
                IndirectCase(prompts[subject], answer, subject, prompts[answer], order, *recipe)
            )
    return drawn
