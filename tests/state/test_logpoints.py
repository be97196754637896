"""Logpoints: what is noted, what room there is, and what becomes of a log that is full."""

from __future__ import annotations

from typing import Any

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, NotStopped, UnknownBreakpoint
from kernel_server.state.instructions import DropLog, ReadTensors
from kernel_server.state.server_state import Limits
from tests.state.world import RECORD, SAMPLED, World

PLACES = ("layers.1.output", "layers.3.output")


def log_at(world: World, sid: str, **options: Any) -> m.BreakpointInfo:
    message = m.SetBreakpoint(
        session_id=sid, **{"locations": PLACES, "kind": "logpoint", **options}
    )
    return world.ask(message).breakpoint


def read(world: World, sid: str, **options: Any) -> ReadTensors:
    return world.ask(m.ReadLog(session_id=sid, breakpoint_id=1, **options))


def test_a_logpoint_notes_and_never_stops(world: World):
    sid = world.launch(max_new_tokens=3)
    log_at(world, sid, what="tensor")
    world.go(sid)
    plans = world.stretch.logs

    assert world.stretch.until == SAMPLED
    assert [(plan.point, plan.what, plan.check, plan.rows) for plan in plans] == [
        (2, "tensor", None, None),
        (4, "tensor", None, None),
    ]
    world.work()
    info = world.breakpoint(sid)
    assert world.session(sid).status == "finished"
    assert (info.hits, info.held, info.stops) == (6, 6, 0)
    assert (info.records, info.dropped, info.log_bytes) == (6, 0, 6 * RECORD)


def test_a_condition_and_the_tokens_go_with_the_plan_and_not_with_the_checks(world: World):
    sid = world.launch()
    log_at(world, sid, condition="norm > 3", tokens=m.Selector(kind="slice", start=-2))
    world.go(sid)
    plan = world.stretch.logs[0]

    assert world.stretch.checks == ()
    assert plan.rows == (4, 5)
    assert plan.check is not None and plan.check.rows == (4, 5)


def test_a_full_log_drops_counts_and_goes_on(world: World):
    sid = world.launch(max_new_tokens=4)
    log_at(world, sid, max_bytes=5 * RECORD)
    world.run(sid)
    info = world.breakpoint(sid)

    assert world.session(sid).status == "finished"
    assert (info.records, info.dropped, info.log_bytes) == (5, 3, 5 * RECORD)
    assert "changed" in world.kinds()[3:]  # told when it happened first


def test_a_log_that_is_to_lose_nothing_stops_the_session_with_numbers(world: World):
    sid = world.launch(max_new_tokens=4)
    log_at(world, sid, max_bytes=5 * RECORD, on_full="stop")
    stop = world.run(sid).stop

    assert stop is not None and stop.error is not None
    assert (stop.reason, stop.forward, stop.location) == ("exception", 2, "layers.3.output")
    assert stop.hit_breakpoints == (1,)
    assert stop.error.code == "QuotaExceeded"
    assert "5 records take 5000 bytes" in stop.error.message
    read(world, sid, after=5, release=True)
    assert world.run(sid).status == "finished"
    info = world.breakpoint(sid)
    assert (info.records, info.dropped, info.hits) == (2, 1, 8)


def test_all_logs_of_an_owner_share_one_limit():
    world = World(limits=Limits(capture_bytes_per_owner=7 * RECORD))
    first, second = world.launch(), world.launch()
    stranger = world.launch(owner="bob")
    for sid in (first, second):
        log_at(world, sid)
        world.run(sid)
    world.ask(m.SetBreakpoint(session_id=stranger, locations=PLACES, kind="logpoint"), "bob")
    world.run(stranger)

    assert [world.breakpoint(sid).records for sid in (first, second)] == [7, 0]
    assert world.session(stranger, "bob").breakpoints[0].records == 7
    world.ask(m.Terminate(session_id=first))
    world.launch()
    third = world.launch()
    log_at(world, third)
    world.run(third)
    assert world.breakpoint(third).records == 7


def test_reading_asks_the_engine_and_releasing_makes_room(world: World):
    sid = world.launch(max_new_tokens=3)
    log_at(world, sid)
    world.run(sid)
    errand = read(world, sid, after=4)

    assert isinstance(errand, ReadTensors) and errand.message.after == 4
    assert world.breakpoint(sid).records == 6
    read(world, sid, after=4, release=True)
    assert (world.breakpoint(sid).records, world.breakpoint(sid).log_bytes) == (2, 2 * RECORD)


def test_a_fork_starts_with_an_empty_log_and_the_same_logpoint(world: World):
    sid = world.launch(max_new_tokens=4)
    log_at(world, sid)
    world.break_at(sid, "logits", when="decode", once=True)
    world.run(sid)
    child = world.ask(m.Fork(session_id=sid)).session.id

    assert (world.breakpoint(child).records, world.breakpoint(child).hits) == (0, 4)
    world.run(child)
    assert (world.breakpoint(child).records, world.breakpoint(sid).records) == (4, 4)


def test_removing_a_logpoint_frees_its_log_even_when_it_is_being_written(world: World):
    sid = world.launch()
    log_at(world, sid)
    world.go(sid)
    message = m.RemoveBreakpoint(session_id=sid, breakpoint_id=1)
    seen = world.state.handle
    emitted: list[Any] = []

    def spy(event: Any) -> Any:
        found = seen(event)
        emitted.extend(i for i in found if isinstance(i, DropLog))
        return found

    world.state.handle = spy  # type: ignore[method-assign]
    world.ask(message)
    assert len(emitted) == 1
    world.work()  # the stretch has noted more meanwhile

    assert len(emitted) == 2
    with pytest.raises(UnknownBreakpoint):
        read(world, sid)


def test_a_failed_session_has_no_log_any_more(world: World):
    sid = world.launch()
    log_at(world, sid)
    world.go(sid)
    world.fail(3, fatal=True)

    assert world.breakpoint(sid).records == 0
    with pytest.raises(NotStopped, match="its logs included"):
        read(world, sid)


def test_a_stretch_that_breaks_off_has_noted_what_it_has_noted(world: World):
    sid = world.launch()
    log_at(world, sid)
    world.go(sid)
    world.fail(3)

    info = world.breakpoint(sid)
    assert (info.hits, info.held, info.records) == (1, 1, 1)


@pytest.mark.parametrize("after", [-1, 1])
def test_a_record_that_is_not_there_cannot_be_read_after(world: World, after: int):
    sid = world.launch()
    log_at(world, sid)

    with pytest.raises(BadArgument, match=f"after is {after}"):
        read(world, sid, after=after)


def test_a_breakpoint_keeps_no_log(world: World):
    sid = world.launch()
    world.break_at(sid, "embedding")

    with pytest.raises(BadArgument, match="keeps no log"):
        read(world, sid)
