"""Continuing, stepping, pausing; two clients on one session."""

from __future__ import annotations

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import NotStopped, StaleStop, UnknownLocation
from tests.state.world import LOGITS, SAMPLED, World, snapshot


def where(session: m.SessionInfo) -> tuple[str, int, str]:
    """Location, forward and reason of a stop."""
    assert session.stop is not None
    return session.stop.location, session.stop.forward, session.stop.reason


def test_next_goes_layer_by_layer_then_norm_logits_and_the_next_forward(world: World):
    sid = world.launch()
    stops = [where(world.run(sid, m.Next))[:2] for _ in range(9)]

    assert stops == [
        *((f"layers.{layer}.output", 0) for layer in range(5)),
        ("final_norm", 0),
        ("logits", 0),
        ("layers.0.output", 1),
        ("layers.1.output", 1),
    ]


def test_next_from_the_embedding_is_the_first_layer(world: World):
    sid = world.launch(stop_on_entry=True)
    world.work()

    assert where(world.run(sid, m.Next)) == ("layers.0.output", 0, "step")


def test_step_in_goes_site_by_site_and_a_step_from_inside_ends_the_layer(world: World):
    sid = world.launch()
    world.run(sid, m.RunTo, location="layers.3.output")
    places = [world.run(sid, m.StepIn).location for _ in range(7)]

    assert places == [
        f"layers.4.{site}"
        for site in [
            *["attention.q", "attention.pattern", "attention.heads", "attention.output", "middle"],
            *["mlp.output", "output"],
        ]
    ]
    world.run(sid, m.RunTo, location="layers.1.attention.heads")
    inside = world.session(sid)
    assert (inside.location, inside.layers_executed) == ("layers.1.attention.heads", 1)
    assert world.run(sid, m.Next).location == "layers.1.output"


def test_the_first_step_in_of_a_forward_is_its_embedding(world: World):
    sid = world.launch()
    places = [world.run(sid, m.StepIn).location]
    world.run(sid, m.StepOut)
    places.append(world.run(sid, m.StepIn).location)

    assert places == ["embedding", "embedding"]
    assert world.session(sid).forward == 1


def test_step_out_stops_at_the_logits_before_a_token_is_drawn(world: World):
    sid = world.launch()
    world.run(sid, m.Next)
    first = world.run(sid, m.StepOut)
    second = world.run(sid, m.StepOut)

    assert where(first) == ("logits", 0, "step")
    assert len(first.tokens) == 6
    assert where(second) == ("logits", 1, "step")
    assert len(second.tokens) == 7


def test_run_to_finds_a_place_in_this_forward_or_the_next(world: World):
    sid = world.launch()
    world.run(sid, m.RunTo, location="layers.2.output")

    assert where(world.run(sid, m.RunTo, location="layers.4.output"))[:2] == ("layers.4.output", 0)
    assert where(world.run(sid, m.RunTo, location="layers.1.output"))[:2] == ("layers.1.output", 1)
    assert where(world.run(sid, m.RunTo, location="layers.1.output"))[:2] == ("layers.1.output", 2)


def test_a_step_past_the_last_token_finishes_the_session(world: World):
    sid = world.launch(max_new_tokens=1)
    world.run(sid, m.StepOut)

    assert world.run(sid, m.Next).status == "finished"


def test_a_breakpoint_at_the_place_stepped_to_is_the_reason(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.0.output")
    session = world.run(sid, m.Next)

    assert where(session) == ("layers.0.output", 0, "breakpoint")
    assert session.stop is not None and session.stop.hit_breakpoints == (1,)
    assert where(world.run(sid, m.Next)) == ("layers.1.output", 0, "step")


def test_a_breakpoint_on_the_way_ends_a_step(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.3.output")

    assert where(world.run(sid, m.StepOut)) == ("layers.3.output", 0, "breakpoint")


def test_a_step_ends_with_its_stop(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.1.output", when="prefill")
    world.run(sid, m.StepOut)

    assert world.run(sid).status == "finished"


# --- pause --------------------------------------------------------------------------------------


def test_pausing_a_session_in_the_engine_stops_it_at_the_next_boundary(world: World):
    sid = world.launch()
    world.go(sid)
    reply = world.ask(m.Pause(session_id=sid))

    assert reply.session.status == "running"
    assert world.engine.interrupted
    world.done(3)
    assert where(world.session(sid)) == ("layers.2.output", 0, "pause")


def test_pausing_twice_interrupts_once(world: World):
    sid = world.launch()
    world.go(sid)
    world.ask(m.Pause(session_id=sid))
    world.engine.interrupted = False
    world.ask(m.Pause(session_id=sid))

    assert not world.engine.interrupted
    world.done(1)


def test_a_pause_that_comes_too_late_stops_at_the_next_embedding(world: World):
    sid = world.launch()
    world.go(sid)
    world.ask(m.Pause(session_id=sid))
    world.done(SAMPLED)

    assert world.stretch.until == 0
    world.done()
    assert where(world.session(sid)) == ("embedding", 1, "pause")


def test_a_pause_that_comes_with_the_last_token_finds_a_finished_session(world: World):
    sid = world.launch(max_new_tokens=1)
    world.go(sid)
    world.ask(m.Pause(session_id=sid))
    world.done(SAMPLED)

    assert world.session(sid).status == "finished"


def test_a_session_queued_in_mid_forward_pauses_at_once(world: World):
    first, second = world.launch(), world.launch(owner="bob")
    world.go(first)
    world.go(second)  # the long prefill gives way
    world.done(2)
    assert world.stretch.session_id == second
    world.ask(m.Pause(session_id=first))

    assert where(world.session(first)) == ("layers.1.output", 0, "pause")
    world.work()
    assert world.session(second, "bob").status == "finished"


def test_a_session_queued_before_a_forward_runs_to_its_embedding(world: World):
    first, second = world.launch(), world.launch()
    world.go(first)
    world.go(second)
    world.ask(m.Pause(session_id=second))
    world.work()

    assert where(world.session(second)) == ("embedding", 0, "pause")
    assert world.session(second).num_pages == 0


def test_pausing_a_session_that_rests_answers_with_it_as_it_is(world: World):
    sid = world.launch()
    before = snapshot(world.state)
    reply = world.ask(m.Pause(session_id=sid))

    assert reply.session.status == "waiting"
    assert snapshot(world.state) == before


def test_a_breakpoint_reached_by_a_pause_is_the_reason(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.2.output", condition="norm > 1")
    world.judge = lambda check: (4,)
    world.go(sid)
    world.ask(m.Pause(session_id=sid))
    world.done(3)

    assert where(world.session(sid)) == ("layers.2.output", 0, "breakpoint")


def test_after_a_pause_a_session_runs_on_as_if_nothing_had_been(world: World):
    sid = world.launch()
    world.go(sid)
    world.ask(m.Pause(session_id=sid))
    world.done(LOGITS)
    session = world.run(sid)

    assert (session.status, len(session.tokens)) == ("finished", 10)


# --- two clients --------------------------------------------------------------------------------


@pytest.mark.parametrize("request_type", [m.Continue, m.Next, m.StepOut])
def test_the_slower_of_two_clients_is_refused(world: World, request_type):
    sid = world.launch()
    world.break_at(sid, "layers.1.output")
    seen = world.run(sid).stop_number
    world.ask(request_type(session_id=sid, seen=seen))

    with pytest.raises(NotStopped, match="running"):
        world.ask(request_type(session_id=sid, seen=seen))
    world.work()
    before = snapshot(world.state)
    with pytest.raises(StaleStop, match=r"it is at stop \d .*, and this call saw stop 1"):
        world.ask(request_type(session_id=sid, seen=seen))
    assert snapshot(world.state) == before


def test_a_call_from_before_the_first_stop_is_stale(world: World):
    sid = world.launch()
    world.run(sid, m.Next)

    with pytest.raises(StaleStop, match="saw stop 0"):
        world.ask(m.Continue(session_id=sid, seen=0))
    with pytest.raises(StaleStop, match="saw stop 2"):
        world.ask(m.Continue(session_id=sid, seen=2))


def test_a_place_the_model_does_not_have_is_refused(world: World):
    sid = world.launch()
    before = snapshot(world.state)

    with pytest.raises(UnknownLocation, match="layers, numbered 0 to 4"):
        world.go(sid, m.RunTo, location="layers.5.output")
    assert snapshot(world.state) == before


def test_the_answer_to_continue_tells_from_which_event_to_listen(world: World):
    sid = world.launch()
    session = world.go(sid, m.Next)
    world.work()
    after = [e for e in world.events["ada"] if e.seq > session.event_seq]

    assert [e.kind for e in after] == ["stopped"]
