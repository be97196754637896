"""Breakpoints: when they are hit, hold and stop, and what is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import (
    BadArgument,
    BadCondition,
    NotStopped,
    NotSupported,
    QuotaExceeded,
    UnknownBreakpoint,
    UnknownLocation,
    UnknownVector,
)
from kernel_server.state.server_state import Limits
from tests.state.world import SAMPLED, World, snapshot


def counts(info: m.BreakpointInfo) -> tuple[int, int, int]:
    return info.hits, info.held, info.stops


def test_a_breakpoint_stops_where_it_stands_with_nothing_run_past_it(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.2.output")
    session = world.run(sid)

    assert session.stop is not None
    assert session.stop.reason == "breakpoint"
    assert (session.stop.location, session.layers_executed) == ("layers.2.output", 3)
    assert (session.stop.first_token, session.stop.end_token) == (0, 6)
    assert session.stop.hit_breakpoints == (1,)
    assert session.stop.hit_tokens == (0, 1, 2, 3, 4, 5)


def test_it_stops_in_every_forward(world: World):
    sid = world.launch(max_new_tokens=3)
    world.break_at(sid, "layers.2.output")
    stops = [world.run(sid).stop for _ in range(4)]

    assert [s and (s.forward, s.hit_tokens) for s in stops[1:]] == [(1, (6,)), (2, (7,)), None]
    assert counts(world.breakpoint(sid)) == (3, 3, 3)


@pytest.mark.parametrize(("when", "forwards"), [("prefill", [0]), ("decode", [1, 2])])
def test_it_counts_only_in_its_phase(world: World, when, forwards):
    sid = world.launch(max_new_tokens=3)
    world.break_at(sid, "layers.2.output", when=when)
    seen = []
    while (stop := world.run(sid).stop) is not None:
        seen.append(stop.forward)

    assert seen == forwards
    assert counts(world.breakpoint(sid)) == (len(forwards),) * 3


def test_an_input_is_the_output_of_the_layer_before(world: World):
    sid = world.launch()

    assert world.break_at(sid, "layers.3.input").location == "layers.2.output"
    assert world.break_at(sid, "layers.0.input").location == "embedding"
    assert world.break_at(sid, "3").location == "layers.3.output"


def test_a_condition_is_put_to_the_engine_and_stops_where_it_holds(world: World):
    sid = world.launch(max_new_tokens=3)
    world.break_at(sid, "layers.2.output", condition="norm > 30")
    world.judge = lambda check: (6,) if check.hits == 1 else ()
    session = world.run(sid)

    assert session.stop is not None
    assert (session.stop.forward, session.stop.hit_tokens) == (1, (6,))
    assert counts(world.breakpoint(sid)) == (2, 1, 1)
    world.run(sid)
    assert counts(world.breakpoint(sid)) == (3, 1, 1)


def test_a_check_names_its_variables_and_the_hits_before(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.2.output", condition="norm > 30 and position == 2")
    world.go(sid)
    (check,) = world.stretch.checks

    assert (check.breakpoint_id, check.point, check.hits) == (1, 3, 0)
    assert check.names == {"norm", "position"}
    assert check.holds is not None and check.holds({"norm": 31.0, "position": 2})


def test_an_ignore_count_passes_so_many_times(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.2.output", ignore=2)
    world.go(sid)

    assert world.stretch.until == SAMPLED  # nothing to stop for yet
    world.work()
    session = world.session(sid)
    assert session.stop is not None and session.stop.forward == 2
    assert counts(world.breakpoint(sid)) == (3, 3, 1)


def test_an_ignored_condition_runs_on_at_once(world: World):
    sid, other = world.launch(), world.launch()
    world.break_at(sid, "layers.2.output", condition="norm > 30", ignore=1)
    world.judge = lambda check: (check.hits,)
    world.go(sid)
    world.done()

    assert (world.stretch.session_id, world.stretch.point) == (sid, 3)
    world.work()
    session = world.session(sid)
    assert session.stop is not None and session.stop.forward == 1
    assert counts(world.breakpoint(sid)) == (2, 2, 1)
    assert world.session(other).status == "waiting"


def test_ignore_counts_forwards_in_which_the_condition_held(world: World):
    sid = world.launch(max_new_tokens=6)
    world.break_at(sid, "layers.2.output", condition="norm > 30", ignore=1)
    world.judge = lambda check: (1,) if check.hits % 2 else ()
    session = world.run(sid)

    assert session.stop is not None and session.stop.forward == 3
    assert counts(world.breakpoint(sid)) == (4, 2, 1)


def test_a_once_breakpoint_is_switched_off_after_its_stop_and_stays_listed(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.2.output", once=True)
    world.run(sid)

    assert not world.breakpoint(sid).enabled
    assert world.run(sid).status == "finished"
    assert counts(world.breakpoint(sid)) == (1, 1, 1)


def test_all_breakpoints_that_hold_at_a_place_are_named(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.2.output", condition="norm > 1")
    world.break_at(sid, "layers.2.output", condition="norm > 2")
    world.break_at(sid, "layers.2.output", condition="norm > 3")
    world.judge = lambda check: {1: (4, 1), 2: (), 3: (2, 4)}[check.breakpoint_id]
    session = world.run(sid)

    assert session.stop is not None
    assert session.stop.hit_breakpoints == (1, 3)
    assert session.stop.hit_tokens == (1, 2, 4)
    assert [counts(b) for b in session.breakpoints] == [(1, 1, 1), (1, 0, 0), (1, 1, 1)]


def test_a_disabled_breakpoint_neither_stops_nor_counts(world: World):
    sid = world.launch(max_new_tokens=2)
    world.break_at(sid, "layers.2.output")
    world.ask(m.EnableBreakpoint(session_id=sid, breakpoint_id=1, enabled=False))

    assert world.run(sid, m.StepOut).stop is not None
    assert counts(world.breakpoint(sid)) == (0, 0, 0)
    world.ask(m.EnableBreakpoint(session_id=sid, breakpoint_id=1, enabled=True))
    session = world.run(sid)
    assert session.stop is not None and session.stop.forward == 1


def test_a_removed_breakpoint_is_gone(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.2.output")
    world.ask(m.RemoveBreakpoint(session_id=sid, breakpoint_id=1))

    assert world.session(sid).breakpoints == ()
    with pytest.raises(UnknownBreakpoint, match="no breakpoint 1: the session has none"):
        world.ask(m.RemoveBreakpoint(session_id=sid, breakpoint_id=1))
    assert world.break_at(sid, "layers.3.output").id == 2


def test_a_breakpoint_removed_while_the_engine_runs_to_it_does_not_stop(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.2.output")
    world.go(sid)
    world.ask(m.RemoveBreakpoint(session_id=sid, breakpoint_id=1))
    world.work()

    assert world.session(sid).status == "finished"


def test_a_breakpoint_set_during_a_long_prefill_counts_from_the_next_boundary(world: World):
    sid = world.launch()
    world.go(sid)
    world.break_at(sid, "layers.3.output")

    assert world.engine.interrupted
    world.done(2)
    assert world.stretch.until == 4
    world.work()
    assert world.session(sid).status == "stopped"


def test_a_breakpoint_set_during_a_decode_counts_from_the_next_forward(world: World):
    sid = world.launch()
    world.go(sid)
    world.done()
    world.break_at(sid, "layers.3.output")

    assert not world.engine.interrupted
    world.work()
    session = world.session(sid)
    assert session.stop is not None and session.stop.forward == 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"location": "layers.99.output"}, UnknownLocation, "numbered 0 to 4"),
        ({"location": "layer.2"}, UnknownLocation, "unknown location"),
        ({"location": "layers.4.mlp.neurons"}, NotSupported, "a mixture of experts"),
        ({"condition": "norm >"}, BadCondition, "norm >"),
        ({"condition": "entropy < 1", "location": "layers.2.mlp.neurons"}, BadCondition, "as wide"),
        ({"condition": "prob(' a') > 0"}, BadCondition, "no token of this model"),
        ({"condition": "cosine('joy') > 0"}, UnknownVector, "no vector named 'joy'"),
        ({"tokens": m.Selector(kind="prompt")}, BadArgument, "about all tokens"),
        ({"kind": "data breakpoint"}, BadArgument, "give it a condition"),
        ({"kind": "logpoint", "ignore": 1}, BadArgument, "never stops"),
        ({"kind": "logpoint", "max_bytes": 10}, BadArgument, "at least 4096 bytes"),
        ({"ignore": -1}, BadArgument, "ignore is -1"),
        ({"when": "sometimes"}, BadArgument, "sometimes"),
    ],
)
def test_a_bad_breakpoint_is_refused_and_changes_nothing(world: World, change, error, words):
    sid = world.launch()
    before = snapshot(world.state)

    with pytest.raises(error, match=words):
        world.break_at(sid, **{"location": "layers.2.output", **change})
    assert snapshot(world.state) == before


def test_a_session_may_have_so_many_breakpoints():
    world = World(limits=Limits(breakpoints_per_session=1))
    sid = world.launch()
    world.break_at(sid, "embedding")

    with pytest.raises(QuotaExceeded, match="has 1 breakpoints, the limit"):
        world.break_at(sid, "embedding")


def test_a_finished_session_takes_no_breakpoint(world: World):
    sid = world.launch()
    world.run(sid)

    with pytest.raises(NotStopped, match="no forward will come"):
        world.break_at(sid, "embedding")


def test_a_fork_goes_on_counting_from_its_parents_counts(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.2.output", ignore=1)
    world.run(sid)
    child = world.ask(m.Fork(session_id=sid)).session
    world.run(child.id)

    assert counts(child.breakpoints[0]) == (2, 2, 1)
    assert counts(world.breakpoint(child.id)) == (3, 3, 2)
    assert counts(world.breakpoint(sid)) == (2, 2, 1)


# --- the lens and named vectors -------------------------------------------------------------------


def test_a_vector_of_another_width_is_refused_with_both_numbers(world: World):
    sid = world.launch()
    joy = m.NamedArray(name="joy", value=Array.from_numpy(np.ones(8, np.float32)))
    world.break_at(sid, "layers.2.output", condition='cosine("joy") > 0.5', vectors=(joy,))
    world.break_at(sid, "layers.2.attention.q", condition='cosine("joy") > 0.5', vectors=(joy,))

    for place, words in [("logits", "logits is 50 wide"), ("layers.2.attention.pattern", "keys")]:
        with pytest.raises(BadCondition, match=words):
            world.break_at(sid, place, condition='cosine("joy") > 0.5', vectors=(joy,))


def test_a_check_carries_what_its_texts_stand_for(world: World):
    sid = world.launch()
    texts = (m.TextIds(text=" a", token_ids=(3, 9)),)
    world.break_at(sid, "logits", condition='prob(" a") > 0.5', text_ids=texts)
    world.go(sid)
    (check,) = world.stretch.checks

    assert check.names == {"prob"}
    assert check.lookup is not None and check.lookup.token_ids == {" a": (3, 9)}


# --- data breakpoints -----------------------------------------------------------------------------

WATCH = ("layers.3.output", "embedding", "layers.1.middle", "layers.3.output")


def watch(world: World, sid: str, **options: Any) -> m.BreakpointInfo:
    message = m.SetBreakpoint(
        session_id=sid,
        locations=WATCH,
        kind="data breakpoint",
        **{"condition": "num_nan > 0 and hits >= 0", **options},
    )
    return world.ask(message).breakpoint


def test_a_data_breakpoint_watches_each_location_once_in_the_order_they_are_reached(world: World):
    sid = world.launch()
    info = watch(world, sid)
    world.go(sid)

    assert info.locations == ("embedding", "layers.1.middle", "layers.3.output")
    assert [check.point for check in world.stretch.checks] == [0, 1 + 7 / 16, 4]
    assert [check.hits for check in world.stretch.checks] == [0, 1, 2]


def test_questions_that_do_not_change_are_made_once(world: World):
    sid = world.launch(max_new_tokens=3)
    watch(world, sid, condition="num_nan > 0")
    world.go(sid)
    first = world.stretch.checks
    world.done()

    assert [id(check) for check in world.stretch.checks] == [id(check) for check in first]


def test_a_data_breakpoint_stops_where_it_holds_and_counts_every_location(world: World):
    sid = world.launch(max_new_tokens=2)
    watch(world, sid)
    world.judge = lambda check: (4, 5) if check.hits in (1, 3) else ()
    first, second = world.run(sid).stop, world.run(sid).stop

    assert first is not None and second is not None
    assert (first.reason, first.location) == ("data breakpoint", "layers.1.middle")
    assert (first.hit_tokens, first.hit_breakpoints) == ((4, 5), (1,))
    assert (second.location, second.forward) == ("embedding", 1)
    world.run(sid)
    assert counts(world.breakpoint(sid)) == (6, 2, 2)


def test_a_breakpoint_beside_a_data_breakpoint_gives_the_reason(world: World):
    sid = world.launch()
    watch(world, sid)
    world.break_at(sid, "layers.1.middle")
    world.judge = lambda check: (0,) if check.point > 1 else ()
    stop = world.run(sid).stop

    assert stop is not None
    assert (stop.reason, stop.hit_breakpoints) == ("breakpoint", (1, 2))


def test_a_data_breakpoint_may_be_about_some_tokens(world: World):
    sid = world.launch(max_new_tokens=3)
    watch(world, sid, tokens=m.Selector(kind="indices", indices=(1, -2)))
    world.go(sid)

    assert {check.rows for check in world.stretch.checks} == {(1, 4)}
    world.done()
    assert world.stretch.checks == ()  # a decode feeds neither
    world.work()
    assert counts(world.breakpoint(sid)) == (9, 0, 0)


def test_once_and_ignore_count_over_all_locations(world: World):
    sid = world.launch()
    watch(world, sid, ignore=1, once=True)
    world.judge = lambda check: (0,)
    stop = world.run(sid).stop

    assert stop is not None and stop.location == "layers.1.middle"
    assert world.run(sid).status == "finished"
    assert counts(world.breakpoint(sid)) == (2, 2, 1)
