"""Going back and what becomes of what lay ahead."""

from __future__ import annotations

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadArgument,
    NotStopped,
    QuotaExceeded,
    StaleStop,
    UnknownNode,
)
from kernel_server.state.server_state import Limits
from tests.state.world import SHAPE, World

HERE = "layers.1.output"


def returned(world: World, session_id: str, request: type, **where: object) -> m.SessionInfo:
    """Go back, and let the engine run what must be run again."""
    return world.run(session_id, request, **where)


def nodes(world: World, session_id: str) -> dict[int, m.NodeInfo]:
    found = world.ask(m.ListBranches(session_id=session_id)).nodes
    return {node.number: node for node in found}


def test_step_back_returns_to_the_stop_before(world: World):
    session = world.launch()
    first = world.run(session, m.RunTo, location="layers.1.output")
    world.run(session, m.Next)
    seen = world.session(session).stop_number

    info = world.ask(m.StepBack(session_id=session, seen=seen)).session

    assert (info.status, info.location, info.forward) == ("stopped", first.location, 0)
    assert info.stop_number == seen + 1 and info.stop.number == info.stop_number
    assert world.engine.stretch is None, "nothing had to be run again"
    with pytest.raises(StaleStop):
        world.ask(m.Continue(session_id=session, seen=seen))


def test_stepping_back_over_tokens_takes_them_back(world: World):
    session = world.launch()
    world.run(session, m.RunTo, location="logits")
    world.run(session, m.RunTo, location="layers.2.output")
    world.run(session, m.RunTo, location="layers.2.output")

    assert len(world.session(session).tokens) == 8
    returned(world, session, m.StepBack)
    assert len(world.session(session).tokens) == 7
    returned(world, session, m.StepBack)
    assert (len(world.session(session).tokens), world.session(session).location) == (6, "logits")
    assert world.run(session).status == "finished"


def test_before_the_first_stop_there_is_none(world: World):
    session = world.launch()
    info = world.run(session, m.RunTo, location="embedding")

    with pytest.raises(BadArgument, match="no stop before"):
        world.ask(m.StepBack(session_id=session, seen=info.stop_number))


def test_a_finished_session_steps_back_to_its_last_stop(world: World):
    session = world.launch()
    world.run(session, m.RunTo, location="layers.3.output")
    assert world.run(session).status == "finished"

    info = returned(world, session, m.StepBack)
    assert (info.status, info.forward, info.finish_reason) == ("stopped", 0, None)

    end = max(nodes(world, session))
    info = returned(world, session, m.GoTo, node=end)
    assert (info.status, len(info.tokens)) == ("finished", 10)


def test_what_lay_ahead_stays_a_branch_and_costs_its_own_pages_only(world: World):
    session = world.launch()
    world.run(session, m.RunTo, location="layers.1.output")
    world.run(session, m.RunTo, location="layers.3.output")
    before = world.state.pool.num_free
    returned(world, session, m.StepBack)
    assert world.state.pool.num_free == before

    listed = nodes(world, session)
    assert [n.current for n in listed.values()] == [False, True, False]
    assert [n.branch == "" for n in listed.values()] == [True, True, False]
    # going on copies the pages that would be written, and those only: two in the second group
    world.run(session, m.RunTo, location="layers.3.output")
    assert before - world.state.pool.num_free == 2


def test_stepping_back_twice_makes_one_branch(world: World):
    session = world.launch()
    world.run(session, m.Next)
    world.run(session, m.Next)
    world.run(session, m.Next)
    returned(world, session, m.StepBack)
    returned(world, session, m.StepBack)

    assert {n.branch for n in nodes(world, session).values()} == {"", f"{session}/1"}


def test_a_session_goes_back_and_forth_between_branches(world: World):
    session = world.launch()
    world.run(session, m.RunTo, location="layers.2.output")
    there = world.run(session, m.RunTo, location="layers.2.output")
    returned(world, session, m.StepBack)
    here = world.run(session, m.RunTo, location="final_norm")

    for _ in range(3):
        info = returned(world, session, m.GoTo, node=there.stop_number)
        assert (info.forward, info.location) == (1, "layers.2.output")
        info = returned(world, session, m.GoTo, node=here.stop_number)
        assert (info.forward, info.location) == (0, "final_norm")
    assert len(world.state.sessions) == 2


def test_edits_are_as_they_were_and_can_be_undone_there(world: World):
    session = world.launch()
    world.run(session, m.RunTo, location="layers.1.output")
    world.edit(session, location=HERE)
    world.run(session, m.Next)
    world.edit(session, location="layers.2.output")
    info = returned(world, session, m.StepBack)

    assert [edit.id for edit in info.edits] == [1]
    world.ask(m.UndoEdit(session_id=session, seen=info.stop_number))
    assert world.session(session).edits == ()
    # ids are of the session: the one of the other branch is not given again
    assert world.edit(session, location=HERE).edit.id == 3


def test_an_edited_stop_is_another_node_beside_the_first(world: World):
    session = world.launch()
    first = world.run(session, m.RunTo, location="layers.1.output")
    ahead = world.run(session, m.Next)
    returned(world, session, m.StepBack)
    world.edit(session, location=HERE)
    world.run(session, m.Next)

    info = returned(world, session, m.GoTo, node=first.stop_number)
    assert info.edits == ()
    info = returned(world, session, m.GoTo, node=ahead.stop_number)
    assert info.edits == ()
    edited = next(n for n in nodes(world, session).values() if n.num_edits == 1)
    assert len(returned(world, session, m.GoTo, node=edited.number).edits) == 1


def test_dropped_tensors_are_made_again(world: World):
    world.state.limits = Limits(kept_stops_per_session=1)
    session = world.launch(max_new_tokens=6)
    world.break_at(session, "layers.2.output")
    stops = [world.run(session).stop_number for _ in range(6)]
    listed = nodes(world, session)
    assert not listed[stops[1]].kept and listed[stops[-1]].kept

    info = world.go(session, m.GoTo, node=stops[1])
    assert info.status == "running"
    hits = info.breakpoints[0].hits
    world.work()
    info = world.session(session)
    assert (info.forward, info.location, info.layers_replayed) == (1, "layers.2.output", 0)
    assert info.stop.reason == "breakpoint" and info.breakpoints[0].hits == hits


def test_rewind_runs_to_a_place_that_was_passed(world: World):
    session = world.launch()
    world.run(session, m.RunTo, location="layers.1.output")
    assert world.run(session).status == "finished"

    info = returned(world, session, m.Rewind, forward=2, location="layers.3.middle")
    assert (info.forward, info.location, len(info.tokens)) == (2, "layers.3.middle", 8)
    assert world.run(session).status == "finished"


def test_rewind_finds_the_node_if_there_is_one(world: World):
    session = world.launch()
    world.run(session, m.RunTo, location="layers.1.output")
    world.run(session, m.Next)
    info = world.go(session, m.Rewind, forward=0, location=1)

    assert (info.status, info.location) == ("stopped", "layers.1.output")


def test_what_was_not_passed_cannot_be_rewound_to(world: World):
    session = world.launch()
    info = world.run(session, m.RunTo, location="layers.1.output")

    for forward, location in ((0, "logits"), (1, "embedding"), (-1, "embedding")):
        with pytest.raises(BadArgument, match="not been passed"):
            world.ask(
                m.Rewind(
                    session_id=session, seen=info.stop_number, forward=forward, location=location
                )
            )


def test_a_replay_makes_the_edits_of_its_time(world: World):
    world.state.limits = Limits(kept_stops_per_session=1)
    session = world.launch()
    world.run(session, m.RunTo, location="layers.1.output")
    world.edit(session, location=HERE, sticky=True)
    world.run(session, m.RunTo, location="layers.4.output")
    world.run(session, m.RunTo, location="layers.1.output")
    world.ask(m.EnableEdit(session_id=session, edit_id=1, enabled=False))
    world.run(session)

    world.go(session, m.Rewind, forward=0, location="layers.3.output")
    assert [(plan.edit_id, plan.point) for plan in world.stretch.edits] == [(1, 2)]


def test_pruning_frees_what_is_there_alone(world: World):
    session = world.launch()
    free = world.state.pool.num_free
    top = world.run(session, m.RunTo, location="layers.1.output")
    ahead = world.run(session, m.RunTo, location="layers.4.output")
    far = world.run(session, m.RunTo, location="layers.4.output")
    returned(world, session, m.GoTo, node=top.stop_number)
    with pytest.raises(BadArgument, match="come by"):
        world.ask(m.PruneBranch(session_id=session, node=top.stop_number))

    world.ask(m.PruneBranch(session_id=session, node=far.stop_number))
    assert returned(world, session, m.GoTo, node=ahead.stop_number).location == "layers.4.output"
    returned(world, session, m.GoTo, node=top.stop_number)
    world.ask(m.PruneBranch(session_id=session, node=ahead.stop_number))
    with pytest.raises(UnknownNode):
        world.ask(m.PruneBranch(session_id=session, node=ahead.stop_number))
    # two pages of the first group are the session's own
    assert free - world.state.pool.num_free == 2
    assert list(nodes(world, session)) == [0, top.stop_number]


def test_one_branch_too_many_is_refused_and_changes_nothing(world: World):
    world.state.limits = Limits(branches_per_session=1)
    session = world.launch()
    world.run(session, m.Next)
    world.run(session, m.Next)
    returned(world, session, m.StepBack)
    seen = world.run(session, m.Next).stop_number

    with pytest.raises(QuotaExceeded, match="prune one"):
        world.ask(m.StepBack(session_id=session, seen=seen))
    assert world.session(session).stop_number == seen


def test_a_fork_has_the_way_behind_it(world: World):
    session = world.launch()
    world.run(session, m.Next)
    world.run(session, m.Next)
    child = world.ask(m.Fork(session_id=session)).session.id
    world.ask(m.Terminate(session_id=session))

    assert world.session(child).location == "layers.1.output"
    assert returned(world, child, m.StepBack).location == "layers.0.output"
    assert world.run(child).status == "finished"


def test_the_oldest_nodes_are_listed_no_more(world: World):
    world.state.limits = Limits(nodes_per_session=3)
    session = world.launch()
    for _ in range(5):
        world.run(session, m.Next)

    reply = world.ask(m.ListBranches(session_id=session))
    assert ([n.number for n in reply.nodes], reply.num_forgotten) == ([0, 4, 5], 3)
    assert returned(world, session, m.Rewind, forward=0, location=1).location == "layers.1.output"


def test_a_running_session_does_not_go_back(world: World):
    session = world.launch()
    world.go(session)

    with pytest.raises(NotStopped):
        world.ask(m.StepBack(session_id=session, seen=world.session(session).stop_number))
    world.work()


def test_pages_of_a_branch_leave_the_device_like_others():
    shape = SHAPE.__class__(
        **{**{f: getattr(SHAPE, f) for f in SHAPE.__slots__}, "num_pages": 40,
           "num_host_pages": 20}
    )  # fmt: skip
    world = World(shape)
    session = world.launch()
    world.run(session, m.RunTo, location="layers.1.output")
    end = world.run(session)
    returned(world, session, m.StepBack)
    world.send(m.Evict(session_id=session, to="host"))
    world.work()

    assert world.state.residency.slots["device"].used == 0
    assert returned(world, session, m.GoTo, node=end.stop_number).status == "finished"
    world.finish_checks()
