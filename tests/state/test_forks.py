"""Forks that are to draw otherwise than their parent: temperature, top-p, how many tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, DjinnError, PromptTooLong, QuotaExceeded
from tests.state.world import PROMPT, SHAPE, Limits, World, snapshot


def _fork(world: World, session_id: str, **wishes: Any) -> m.SessionInfo:
    child: m.SessionInfo = world.ask(m.Fork(session_id=session_id, **wishes)).session
    return child


def test_what_is_not_given_is_the_parents(world: World) -> None:
    sid = world.launch(temperature=0.5, top_p=0.9, seed=3, max_new_tokens=4)

    child = _fork(world, sid)

    sampling = (child.temperature, child.top_p, child.seed, child.max_new_tokens)
    assert sampling == (0.5, 0.9, 3, 4)


def test_what_is_given_is_the_childs_alone_and_reaches_the_sampler(world: World) -> None:
    sid = world.launch(max_new_tokens=4)
    world.run(sid, m.RunTo, location="layers.2.output")

    child = _fork(world, sid, temperature=0.7, top_p=0.5, seed=9, max_new_tokens=2)
    world.go(child.id, m.Continue)
    drawn = world.stretch.sampling
    assert drawn is not None and (drawn.temperature, drawn.top_p, drawn.seed) == (0.7, 0.5, 9)
    world.work()

    assert len(world.session(child.id).tokens) == len(PROMPT) + 2
    assert len(world.run(sid).tokens) == len(PROMPT) + 4


@pytest.mark.parametrize(
    ("wishes", "error", "words"),
    [
        ({"temperature": -1.0}, BadArgument, "temperature is -1.0"),
        ({"temperature": float("nan")}, BadArgument, "temperature"),
        ({"top_p": 0.0}, BadArgument, "top_p is 0.0"),
        ({"max_new_tokens": 0}, BadArgument, "has generated 1 tokens already, give 2"),
        ({"max_new_tokens": 1}, BadArgument, "has generated 1 tokens already, give 2"),
        ({"max_new_tokens": 59}, PromptTooLong, "context of 64"),
    ],
)
def test_a_bad_wish_makes_no_fork(
    world: World, wishes: dict[str, Any], error: type[DjinnError], words: str
) -> None:
    sid = world.launch(max_new_tokens=4)
    world.run(sid, m.StepOut)
    world.run(sid, m.Next)
    before = snapshot(world.state)

    with pytest.raises(error, match=words):
        _fork(world, sid, **wishes)
    assert snapshot(world.state) == before


def test_a_fork_may_not_ask_for_more_pages_than_its_owner_may_have() -> None:
    limits = Limits(kv_bytes_per_owner=9 * SHAPE.page_bytes)
    world = World(dataclasses.replace(SHAPE), limits=limits)
    sid = world.launch(max_new_tokens=2)

    with pytest.raises(QuotaExceeded, match="one owner may have 9"):
        _fork(world, sid, max_new_tokens=20)


def test_a_finished_session_cannot_be_made_longer_by_forking_it(world: World) -> None:
    sid = world.launch(max_new_tokens=2)
    world.run(sid)

    with pytest.raises(BadArgument, match="finished after 2 tokens, and so is a fork of it"):
        _fork(world, sid, max_new_tokens=5)
    assert _fork(world, sid, temperature=1.0).status == "finished"


# -- tokens ---------------------------------------------------------------------------------------


def test_a_fork_has_its_parents_tokens_and_then_each_its_own(world: World) -> None:
    sid = world.launch(max_new_tokens=4)
    world.run(sid, m.StepOut)
    world.run(sid, m.Next)
    parent = world.session(sid).tokens

    child = _fork(world, sid, seed=9)
    assert child.tokens == parent and len(parent) == len(PROMPT) + 1
    world.run(child.id)
    assert len(world.session(child.id).tokens) == len(PROMPT) + 4
    assert world.session(sid).tokens == parent

    again = _fork(world, sid)
    world.run(sid)
    assert len(world.session(sid).tokens) == len(PROMPT) + 4
    assert world.session(again.id).tokens == parent


def test_going_back_and_forth_tells_the_tokens_of_the_place(world: World) -> None:
    sid = world.launch(max_new_tokens=4)
    lengths = []
    for _ in range(3):
        world.run(sid, m.StepOut)
        lengths.append(len(world.session(sid).tokens))
    end = world.run(sid).tokens

    seen = world.session(sid).stop_number
    back = world.ask(m.StepBack(session_id=sid, seen=seen)).session
    world.work()
    assert world.session(sid).tokens == end[: lengths[-1]] == back.tokens[: lengths[-1]]
    other = _fork(world, sid, seed=7)
    assert other.tokens == end[: lengths[-1]]
    world.run(sid)
    assert world.session(sid).tokens == end
    assert world.session(other.id).tokens == end[: lengths[-1]]


def test_many_forks_share_one_list_of_tokens_and_one_table(world: World) -> None:
    sid = world.launch(max_new_tokens=4)
    world.run(sid, m.StepOut)
    inside = world.state.sessions
    ids = [_fork(world, sid).id for _ in range(5)]

    assert len({id(inside[one].tokens) for one in (sid, *ids)}) == 1
    assert len({id(inside[one].token_list()) for one in (sid, *ids)}) == 1
    for group, table in enumerate(inside[sid].tables):
        assert all(inside[one].tables[group] is table for one in ids)
