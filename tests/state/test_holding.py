"""What sessions hold beside their pages: what is kept of stops, in which order it goes, and who is
refused where the device is capped."""

from __future__ import annotations

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import OutOfDeviceMemory
from kernel_server.state import tensor_bytes
from kernel_server.state.instructions import DropNodes
from kernel_server.state.server_state import Limits
from tests.state.world import PROMPT, SHAPE, World

#: of a stop in a decode, after a token was drawn
ONE = (
    2 * tensor_bytes.rows(SHAPE, 1, SHAPE.hidden_size)
    + tensor_bytes.rows(SHAPE, 1, SHAPE.hidden_size)
    + tensor_bytes.rounded(4 * SHAPE.vocab_size)
)


def decoding(world: World, **options: object) -> str:
    """A session with a stop after layer 0 of each decode ahead."""
    session = world.launch(max_new_tokens=9, **options)
    world.break_at(session, "layers.0.output", when="decode")
    return session


def stopped(world: World, session: str, times: int) -> list[int]:
    return [world.run(session).stop_number for _ in range(times)]


def kept(world: World, session: str) -> list[int]:
    """Nodes whose tensors are kept, but for where it stands."""
    tree = world.state.sessions[session].tree
    return [number for number in tree.kept if tree.nodes[number].stop is not None]


def test_the_stops_left_longest_ago_go_first_whichever_session_left_them(world: World):
    world.state.limits = Limits(kept_bytes=4 * ONE)
    one, two = decoding(world), decoding(world)
    first = stopped(world, one, 4)  # three of them are left
    second = stopped(world, two, 3)  # and two of these: one too many

    assert kept(world, one) == first[1:3] and kept(world, two) == second[:2]
    assert world.state.kept_bytes == 4 * ONE
    listed = {n.number: n.kept for n in world.ask(m.ListBranches(session_id=one)).nodes}
    assert [listed[number] for number in first] == [False, True, True, True]
    world.run(two)
    assert kept(world, one) == first[2:3], "not the newest of the session that needs the room"


def test_a_stop_that_is_left_again_is_the_last_to_go(world: World):
    world.state.limits = Limits(kept_bytes=3 * ONE)
    session = decoding(world)
    stops = stopped(world, session, 3)
    world.run(session, m.GoTo, node=stops[0])
    world.run(session, m.GoTo, node=stops[2])
    assert kept(world, session) == [stops[1], stops[2], stops[0]]

    after = stopped(world, session, 2)
    assert kept(world, session) == [stops[0], stops[2], after[0]]


def test_a_dropped_stop_is_run_to_again_and_kept_when_it_is_left(world: World):
    world.state.limits = Limits(kept_bytes=ONE)
    session = decoding(world)
    stops = stopped(world, session, 4)
    assert kept(world, session) == [stops[2]]

    info = world.go(session, m.GoTo, node=stops[0])
    assert info.status == "running", "its forward is run again"
    world.work()
    info = world.session(session)
    assert (info.status, info.location, info.forward) == ("stopped", "layers.0.output", 1)
    world.run(session, m.GoTo, node=stops[3])
    assert kept(world, session) == [stops[0]]
    assert world.run(session).status in ("stopped", "finished")


def test_with_no_budget_nothing_is_kept_and_every_node_can_be_returned_to(world: World):
    world.state.limits = Limits(kept_bytes=0)
    session = decoding(world)
    world.run(session, m.RunTo, location="layers.2.output")
    stops = stopped(world, session, 3)
    assert kept(world, session) == [] and world.state.kept_bytes == 0

    nodes = world.ask(m.ListBranches(session_id=session)).nodes
    for node in reversed(nodes):
        info = world.run(session, m.GoTo, node=node.number)
        assert (info.status, info.forward) == (node.status, node.forward)
    assert len(nodes) == len(stops) + 2


def test_what_forks_share_counts_once_and_goes_with_the_last(world: World):
    session = decoding(world)
    stops = stopped(world, session, 3)
    before = world.state.kept_bytes
    child = world.ask(m.Fork(session_id=session)).session.id

    assert world.state.kept_bytes == before
    assert kept(world, child) == kept(world, session) == stops[:2]
    world.ask(m.Terminate(session_id=session))
    assert world.state.kept_bytes == before and kept(world, child) == stops[:2]
    assert world.run(child, m.GoTo, node=stops[0]).forward == 1
    world.ask(m.Terminate(session_id=child))
    assert (world.state.kept_bytes, world.state.kept_stops) == (0, {})


def test_what_forks_share_is_dropped_from_all_of_them(world: World):
    world.state.limits = Limits(kept_bytes=3 * ONE)
    session = decoding(world)
    stops = stopped(world, session, 3)
    child = world.ask(m.Fork(session_id=session)).session.id
    told: list[DropNodes] = []
    carry_out = world.engine.errand
    world.engine.errand = lambda errand: (  # type: ignore[method-assign]
        told.append(errand) if isinstance(errand, DropNodes) else None,
        carry_out(errand),
    )

    stopped(world, child, 2)
    assert kept(world, session) == stops[1:2] and kept(world, child)[0] == stops[1]
    gone = {(drop.session_id, node) for drop in told for node in drop.nodes}
    assert {(session, stops[0]), (child, stops[0])} <= gone


def limit(world: World, limits: Limits) -> None:
    """Other limits, while something is kept."""
    world.state.limits = limits
    world.state.keep_to_room()
    for instruction in world.state._out:
        world.engine.errand(instruction)
    world.state._out = []


def capped(stops: float) -> Limits:
    """Room for so many prompts of the usual length."""
    need = tensor_bytes.session_bytes(SHAPE, len(PROMPT), 4)
    return Limits(tensor_bytes=int(stops * need))


def test_under_a_cap_a_launch_that_might_not_fit_is_refused_with_numbers(world: World):
    world.state.limits = capped(2.5)
    sessions = [world.launch(), world.launch()]
    with pytest.raises(OutOfDeviceMemory, match="more --kept-memory") as told:
        world.launch()

    need = tensor_bytes.session_bytes(SHAPE, len(PROMPT), 4)
    assert told.value.details == {"needed": need, "have": 2 * need, "limit": int(2.5 * need)}
    assert [s.id for s in world.ask(m.ListSessions()).sessions] == sessions
    # those that were let in go to their end, by every stop
    for session in sessions:
        for _ in range(3):
            world.run(session, m.Next)
    world.ask(m.Terminate(session_id=sessions[0]))
    world.launch()
    assert world.run(sessions[1]).status == "finished"


def test_under_a_cap_forks_and_questions_and_ways_back_are_refused_too(world: World):
    world.state.limits = capped(1.4)
    session = world.launch()
    stop = world.run(session, m.RunTo, location="layers.1.output")
    seen = stop.stop_number
    with pytest.raises(OutOfDeviceMemory, match=f"a fork of {session}"):
        world.ask(m.Fork(session_id=session))
    with pytest.raises(OutOfDeviceMemory, match=f"asked about {session}"):
        where = m.ReadSites(session_id=session, seen=seen, locations=("layers.0.output",))
        world.ask(where)
    assert world.session(session).stop_number == seen and len(world.state.sessions) == 1

    world.run(session, m.RunTo, location="layers.1.output")  # a decode, which holds less
    limit(world, Limits(tensor_bytes=world.state.standing_bytes() + 100))
    with pytest.raises(OutOfDeviceMemory, match=r"going to layers\.1\.output of forward 0"):
        world.go(session, m.StepBack)
    with pytest.raises(OutOfDeviceMemory, match="going to the start of forward 0"):
        world.go(session, m.GoTo, node=0)
    assert world.run(session).status == "finished"


def test_under_a_cap_a_place_too_large_to_stop_at_is_refused_before_it_is_run_to(world: World):
    session = world.launch(prompt=tuple(range(40)), max_new_tokens=4)
    need = tensor_bytes.session_bytes(SHAPE, 40, 4)
    world.state.limits = Limits(tensor_bytes=need + 1000)
    with pytest.raises(OutOfDeviceMemory, match=r"layers\.0\.attention\.pattern of forward 0"):
        world.go(session, m.RunTo, location="layers.0.attention.pattern")
    assert world.run(session, m.RunTo, location="layers.0.output").status == "stopped"


def test_sessions_at_rest_leave_kept_stops_less_room_and_lose_nothing(world: World):
    session = decoding(world)
    stops = stopped(world, session, 5)
    standing, held = world.state.standing_bytes(), world.state.kept_bytes
    need = tensor_bytes.session_bytes(SHAPE, len(PROMPT), 4)
    limit(world, Limits(tensor_bytes=standing + need + ONE))
    assert held == 4 * ONE

    other = world.launch()
    assert world.state.kept_bytes <= ONE
    assert world.state.standing_bytes() + world.state.kept_bytes <= standing + need + ONE
    assert world.run(other).status == "finished"
    info = world.run(session, m.GoTo, node=stops[0])
    assert (info.status, info.forward) == ("stopped", 1)
