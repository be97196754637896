"""Mistakes that other tools let pass in silence are reported here, without being asked."""

from __future__ import annotations

import pytest

import djinn_nb as djinn
from tests.system.conftest import World
from tests.system.mistakes import MISTAKES, Desk, Mistake, what_is_said

#: How many of them there have to be.
SEEDED = 30


@pytest.fixture
def desk(world: World):
    """A server whose sessions are ended after each script."""
    yield Desk(world.server)
    world.terminate_all()
    for name in list(world.server.vectors):
        del world.server.vectors[name]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: one.name)
def test_a_mistake_is_reported_and_what_was_meant_is_not(desk: Desk, mistake: Mistake):
    wrong = what_is_said(mistake.wrong, desk)
    right = what_is_said(mistake.right, desk)

    assert mistake.is_told_by(wrong), f"passed in silence: {wrong}"
    assert not mistake.is_told_by(right), f"reported of what is right: {right}"
    failed = [name for name in djinn.errors.ERRORS if right[0].startswith(f"{name}: ")]
    assert not failed, f"what was meant does not work: {right}"


def test_there_are_thirty_of_them_and_each_is_another():
    assert len(MISTAKES) >= SEEDED
    assert len({one.name for one in MISTAKES}) == len(MISTAKES)
    assert len({one.peer for one in MISTAKES}) >= SEEDED // 3


def test_a_mistake_nobody_tells_of_would_be_seen(desk: Desk):
    silent = Mistake("none", "", "edit 1 .*never applied", lambda d: d.launch(), lambda d: None)

    assert not silent.is_told_by(what_is_said(silent.wrong, desk))
