"""Pages: the pool's counts, who writes what, forks that share until one writes."""

from __future__ import annotations

import dataclasses

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import NotStopped, OutOfPages
from kernel_server.state.pages import PagePool
from tests.state.world import SHAPE, World, snapshot


def test_a_refused_allocation_takes_nothing():
    pool = PagePool(num_pages=2)

    with pytest.raises(OutOfPages, match="needs 3 pages, 2 of 2 are free; terminate a session"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_page_is_free_when_its_last_owner_lets_go():
    pool = PagePool(num_pages=2)
    (page,) = pool.allocate(1)
    pool.retain([page])

    assert pool.release([page]) == []
    assert (pool.owners(page), pool.num_free) == (1, 1)
    assert pool.release([page]) == [page]
    assert pool.num_free == 2


def test_a_free_page_can_be_neither_shared_nor_released():
    pool = PagePool(num_pages=1)

    with pytest.raises(AssertionError, match="is free"):
        pool.retain([0])
    with pytest.raises(AssertionError, match="is free"):
        pool.release([0])


def test_the_pool_check_finds_a_lost_page():
    pool = PagePool(num_pages=2)
    pages = pool.allocate(1)
    pool.check(pages)

    with pytest.raises(AssertionError, match="differ from page-table entries"):
        pool.check([])


def test_a_session_stopped_at_a_layer_holds_pages_of_the_groups_up_to_it(world: World):
    sid = world.launch()  # 6 tokens: 2 pages in each group of 2 layers
    held = [world.run(sid, m.Next).num_pages for _ in range(5)]

    assert held == [2, 2, 4, 4, 6]


def test_a_pause_gives_back_pages_of_groups_it_did_not_reach(world: World):
    sid = world.launch()
    world.go(sid)
    assert world.session(sid).num_pages == 6
    world.ask(m.Pause(session_id=sid))
    world.done(2)

    assert world.session(sid).num_pages == 2
    assert world.state.pool.num_free == SHAPE.num_pages - 2


def test_a_stretch_is_told_of_the_groups_it_can_reach_only(world: World):
    sid = world.launch()
    world.go(sid, m.Next)

    assert [len(table) for table in world.stretch.tables] == [2]
    world.work()
    world.go(sid)
    assert [len(table) for table in world.stretch.tables] == [2, 2, 2]
    world.work()


def test_a_decode_takes_a_page_only_when_one_is_full_and_copies_no_table(world: World):
    sid = world.launch(max_new_tokens=6)
    world.go(sid)
    tables = []
    while world.engine.stretch is not None:
        tables.append(world.stretch.tables)
        world.done()

    # forwards feed 6, 7, 8, 9, 10, 11 tokens in all; a page holds 4
    assert [len(t[0]) for t in tables] == [2, 2, 2, 3, 3, 3]
    assert tables[4][0] is tables[3][0]


# --- forks ------------------------------------------------------------------------------------


def test_a_fork_shares_every_page(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.3.output")
    world.run(sid)
    free = world.state.pool.num_free
    child = world.ask(m.Fork(session_id=sid, seed=9, name="what if")).session

    assert world.state.pool.num_free == free
    assert (child.parent, child.seed, child.name, child.status) == (sid, 9, "what if", "stopped")
    assert child.stop == world.session(sid).stop
    assert child.tokens == world.session(sid).tokens
    assert world.state.sessions[child.id].tables == world.state.sessions[sid].tables


def test_whoever_writes_a_shared_page_first_takes_its_own(world: World):
    sid = world.launch()
    world.run(sid, m.StepOut)
    world.go(sid)
    world.ask(m.Pause(session_id=sid))
    world.done(SHAPE.sampled)
    world.done()  # stopped at the embedding of forward 1: tokens 0 to 5 are kept
    child = world.ask(m.Fork(session_id=sid)).session.id
    shared = world.state.sessions[sid].tables
    world.go(child, m.StepOut)

    # token 6 goes into the second page of each group; the first stays shared
    assert [source for source, _ in world.stretch.copies] == [table[1] for table in shared]
    assert world.state.sessions[child].tables[0][0] == shared[0][0]
    assert world.state.sessions[child].tables[0][1] != shared[0][1]
    world.work()
    world.go(sid, m.StepOut)
    assert world.stretch.copies == ()  # by now it is the only owner
    world.work()


def test_a_stop_within_a_group_forks_into_copies_of_that_group_only(world: World):
    sid = world.launch()
    world.run(sid, m.Next)  # layer 0 of group 0 has run
    child = world.ask(m.Fork(session_id=sid)).session.id
    world.go(child)

    assert len(world.stretch.copies) == 2
    world.work()
    world.run(sid)
    assert world.session(child).tokens == world.session(sid).tokens


def test_forks_with_other_tokens_do_not_see_each_other(world: World):
    sid = world.launch(max_new_tokens=8)
    world.run(sid, m.StepOut)
    children = [world.ask(m.Fork(session_id=sid)).session.id for _ in range(3)]
    for number, session_id in enumerate([sid, *children]):
        world.draw = lambda position, number=number: 10 + number
        world.run(session_id, m.StepOut)
    for number, session_id in enumerate([sid, *children]):
        world.draw = lambda position, number=number: 10 + number
        world.run(session_id)  # the engine checks what every page holds

    assert world.session(children[2]).tokens[6:] == (13,) * 8


def test_a_page_being_copied_outlives_its_owner(world: World):
    sid = world.launch()
    world.run(sid, m.Next)
    child = world.ask(m.Fork(session_id=sid)).session.id
    world.go(child)
    sources = [source for source, _ in world.stretch.copies]
    world.ask(m.Terminate(session_id=sid))

    assert all(world.state.pool.owners(page) == 1 for page in sources)
    world.done()
    assert all(world.state.pool.owners(page) == 0 for page in sources)
    world.work()


def test_a_finished_or_waiting_session_can_be_forked_and_a_running_one_not(world: World):
    waiting, running = world.launch(), world.launch()
    world.go(running)

    assert world.ask(m.Fork(session_id=waiting)).session.status == "waiting"
    with pytest.raises(NotStopped, match="pause it first"):
        world.ask(m.Fork(session_id=running))
    world.work()
    assert world.ask(m.Fork(session_id=running)).session.status == "finished"


def test_terminating_all_leaves_no_page_behind(world: World):
    sid = world.launch()
    world.run(sid, m.Next)
    ids = [sid, *(world.ask(m.Fork(session_id=sid)).session.id for _ in range(3))]
    for session_id in ids[1:]:
        world.run(session_id)
    for session_id in ids:
        world.ask(m.Terminate(session_id=session_id))

    assert world.state.pool.num_free == SHAPE.num_pages


# --- no room ----------------------------------------------------------------------------------


@pytest.fixture
def small() -> World:
    """A pool for one session of 12 tokens, or two of 4."""
    return World(dataclasses.replace(SHAPE, num_pages=9))


def test_continuing_without_room_is_refused_and_changes_nothing(small: World):
    first, second = small.launch(), small.launch()
    small.run(first)
    before = snapshot(small.state)

    with pytest.raises(OutOfPages, match="needs 6 pages, 0 of 9 are free"):
        small.go(second)
    assert snapshot(small.state) == before
    small.ask(m.Terminate(session_id=first))
    assert small.run(second).status == "finished"


def test_a_step_within_room_goes_where_continuing_would_not(small: World):
    first, second = small.launch(), small.launch()
    small.run(first, m.StepOut)

    with pytest.raises(OutOfPages):
        small.go(second)
    assert small.run(second, m.Next).num_pages == 2


def test_without_room_for_its_next_forward_a_session_waits_with_the_error(small: World):
    first, second = small.launch((1, 2, 3, 4), owner="ada"), small.launch((5, 6, 7, 8))
    small.go(first)
    small.go(second)
    small.work()
    both = [small.session(first), small.session(second)]
    poor = next(s for s in both if s.status == "waiting")

    assert poor.error is not None and poor.error.code == "OutOfPages"
    assert (poor.forward, poor.location, poor.stop) == (1, None, None)
    assert poor.stop_number == 1
    assert sorted(s.status for s in both) == ["finished", "waiting"]
    small.ask(m.Terminate(session_id=next(s.id for s in both if s is not poor)))
    assert small.run(poor.id).status == "finished"
    small.finish_checks()


def test_without_room_in_mid_forward_a_session_stops_where_it_stands(small: World):
    first, second = small.launch(), small.launch()
    small.run(first, m.Next)
    small.run(second, m.Next)
    small.launch(stop_on_entry=True)  # keeps the engine busy while both are asked
    small.go(first, m.StepOut)
    small.go(second, m.StepOut)  # there still is room for each of them
    small.work()
    session = small.session(second)

    assert session.stop is not None and session.stop.error is not None
    assert (session.stop.reason, session.stop.error.code) == ("exception", "OutOfPages")
    assert session.stop.location == "layers.0.output"
    small.finish_checks()
