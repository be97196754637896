"""The bundled model's text: the same everywhere, nothing of the test in it, no easy shortcut."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from itertools import combinations

import pytest

from kernel_server.models.bundled.generator import (
    CLASSIC,
    documents,
    fact_cases,
    facts,
    indirect,
    indirect_cases,
    lexicon,
    repeat_cases,
    stories,
    story_cases,
    valence_of,
)

SAMPLE_SHARD = 100
"""One of the shards that training used."""


@pytest.fixture(scope="module")
def training_text() -> str:
    """A whole shard of training documents, one a line."""
    return "\n".join(documents(0, SAMPLE_SHARD))


def test_the_text_is_the_same_in_every_process():
    script = (
        "import hashlib, sys\n"
        "from kernel_server.models.bundled.generator import documents, story_cases, repeat_cases\n"
        "text = [*documents(0, 100, 500), *repeat_cases(5, 8, invented=True)]\n"
        "text += [case.prompt for case in story_cases(20)]\n"
        "assert 'torch' not in sys.modules\n"
        "print(hashlib.sha256('\\n'.join(text).encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }

    assert len(digests) == 1


def test_the_text_is_what_it_was_when_the_tests_were_written():
    text = "\n".join(documents(0, 100, 500))

    assert hashlib.sha256(text.encode()).hexdigest() == (
        "0ae4bfefc08ca18478ba87befd8615366c4d9357447655b42625ee16023b1b30"
    )


def test_no_test_prompt_is_in_training_text(training_text: str):
    prompts = [CLASSIC]
    prompts += [case.prompt for case in indirect_cases(300, seed=1)]
    prompts += [case.prompt for case in fact_cases("unseen", 300, seed=1)]
    prompts += [case.prompt for case in fact_cases("recombined", 300, seed=1)]
    prompts += [case.prompt for case in fact_cases("unpaired", 300, seed=1)]
    prompts += repeat_cases(50, 12, seed=1)

    assert [prompt for prompt in prompts if prompt in training_text] == []


def test_no_held_out_event_is_in_training_text(training_text: str):
    pieces = [event.text.replace("{N}", "").strip(" .") for event in stories.HELD_OUT_EVENTS]

    assert len(pieces) > 200
    assert [piece for piece in pieces if f" {piece}." in training_text] == []


def test_held_out_names_never_meet_in_indirect_text():
    rng = random.Random(5)
    names = set(lexicon.NAMES)
    met = set()
    for _ in range(5000):
        words = indirect.document(rng).replace(".", " ").replace(",", " ").split()
        # A stranger may act, with any name: the two who were introduced count.
        introduced = [word for word in dict.fromkeys(words) if word in names][:2]
        met |= {tuple(sorted(pair)) for pair in combinations(introduced, 2)}

    assert met.isdisjoint(tuple(sorted(pair)) for pair in lexicon.HELD_OUT_PAIRS)
    assert len(met) > 1000


def test_a_held_out_indirect_prompt_holds_out_every_combination():
    cases = indirect_cases(300, seed=1)

    assert all(indirect.opening_event_held_out(c.opening, c.event) for c in cases)
    assert all(indirect.event_act_held_out(c.event, c.act) for c in cases)
    assert all(lexicon.pair_held_out(c.answer, c.subject) for c in cases)
    assert all(any(place in c.prompt for place in lexicon.HELD_OUT_PLACES) for c in cases)


def test_name_shortcuts_get_half_of_the_indirect_prompts():
    cases = indirect_cases(1000, seed=1)

    assert sum(case.first_name == case.answer for case in cases) == 500
    assert sum(case.second_name == case.answer for case in cases) == 500
    assert all(case.prompt.count(case.subject) == 2 for case in cases)


def test_a_corrupted_prompt_swaps_the_acting_name_only():
    case = indirect_cases(2, seed=3)[0]
    words, swapped = case.prompt.split(), case.corrupted.split()

    assert [(a, b) for a, b in zip(words, swapped, strict=True) if a != b] == [
        (case.subject, case.answer)
    ]


def test_no_phrasing_begins_another_that_goes_on_differently():
    found = [
        conflict
        for country in lexicon.COUNTRIES[:3]
        for relation in lexicon.RELATIONS
        for conflict in facts.conflicts(country, relation)
    ]

    assert found == []


def test_a_prompt_that_begins_another_phrasing_is_found(monkeypatch: pytest.MonkeyPatch):
    planted = (*facts.TRAINED, "The {R} of {X} is called {A}.")
    monkeypatch.setattr(facts, "TRAINED", planted)

    assert facts.conflicts(lexicon.COUNTRIES[0], "coin") != []


def test_each_answer_belongs_to_one_fact():
    answers = list(lexicon.ANSWERS.values())

    assert len(answers) == len(set(answers)) == 300


def test_stories_do_not_give_their_feeling_away():
    cases = story_cases(200, seed=1)

    assert [case.prompt for case in cases if valence_of(case.prompt) != 0] == []
    assert sum(case.valence for case in cases) == 0


def test_an_odd_number_of_indirect_cases_is_refused():
    with pytest.raises(ValueError, match="ask for 4 instead of 3"):
        indirect_cases(3)
