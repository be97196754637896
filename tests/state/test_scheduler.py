"""Whose turn it is, and when a running stretch gives way."""

from __future__ import annotations

import dataclasses

from kernel_server.protocol import messages as m
from kernel_server.state.scheduler import Scheduler
from kernel_server.state.server_state import Limits
from tests.state.world import SAMPLED, SHAPE, World


def test_owners_take_turns_and_so_do_their_sessions():
    scheduler = Scheduler()
    for session_id in ("a1", "a2", "a3"):
        scheduler.add("ada", session_id)
    scheduler.add("bob", "b1")
    order = []
    for _ in range(6):
        session_id = scheduler.next()
        assert session_id is not None
        order.append(session_id)
        scheduler.add("ada" if session_id[0] == "a" else "bob", session_id)
    scheduler.check()

    assert order == ["a1", "b1", "a2", "b1", "a3", "b1"]


def test_a_session_put_first_is_next():
    scheduler = Scheduler()
    scheduler.add("ada", "a1")
    scheduler.add("bob", "b1")
    scheduler.add("bob", "b2", first=True)
    scheduler.add("cyd", "c1", first=True)
    scheduler.check()

    assert [scheduler.next() for _ in range(5)] == ["c1", "b2", "a1", "b1", None]


def test_a_removed_session_has_no_turn():
    scheduler = Scheduler()
    scheduler.add("ada", "a1")
    scheduler.add("bob", "b1")

    assert scheduler.remove("ada", "a1")
    assert not scheduler.remove("ada", "a1")
    scheduler.check()
    assert [scheduler.next(), scheduler.next()] == ["b1", None]


def test_decodes_of_several_sessions_alternate(world: World):
    ids = [world.launch((1,), owner=owner) for owner in ("ada", "ada", "bob")]
    for session_id in ids:
        world.go(session_id)
    turns = []
    while world.engine.stretch is not None:
        turns.append(world.stretch.session_id)
        world.done()

    first, second, other = ids
    assert turns[:7] == [first, second, other, first, other, second, other]
    assert sorted(turns) == sorted(ids * 4)


def test_a_long_prefill_gives_way_and_goes_on_where_it_was(world: World):
    long, short = world.launch(), world.launch((1,), owner="bob")
    world.go(long)
    world.go(short)

    assert world.engine.interrupted
    world.done(2)
    assert world.stretch.session_id == short
    world.done()
    assert (world.stretch.session_id, world.stretch.point) == (long, 2)
    world.work()
    assert world.session(long).status == world.session(short, "bob").status == "finished"


def test_a_decode_is_not_interrupted_for_others(world: World):
    first, second = world.launch((1,)), world.launch((1,))
    world.go(first)
    world.go(second)

    assert not world.engine.interrupted
    world.work()


def test_beside_others_a_prefill_runs_in_slices():
    world = World(dataclasses.replace(SHAPE, prefill_chunk=3), Limits(prefill_slice=4))
    long, short = world.launch(), world.launch((1,), owner="bob", max_new_tokens=8)
    world.go(short)
    world.go(long)
    slices = []
    while world.engine.stretch is not None:
        if world.stretch.forward == 0 and world.stretch.session_id == long:
            slices.append((world.stretch.point, world.stretch.until))
        world.done()
    world.finish_checks()

    assert slices == [(-1, 2), (2, 4), (4, 6), (6, SAMPLED)]  # 2 chunks: 2 layers at a time


def test_alone_a_prefill_runs_in_one_stretch(world: World):
    world.go(world.launch())

    assert world.stretch.until == SAMPLED
    world.work()


def test_stopped_sessions_take_no_turn(world: World):
    stopped, running = world.launch(stop_on_entry=True), world.launch()
    world.work()
    world.go(running)
    turns = set()
    while world.engine.stretch is not None:
        turns.add(world.stretch.session_id)
        world.done()

    assert turns == {running}
    assert world.session(stopped).status == "stopped"
    world.ask(m.Terminate(session_id=stopped))
