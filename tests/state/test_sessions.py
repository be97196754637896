"""Making and ending sessions, and the moves their status may make."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadArgument,
    BadPrompt,
    NotFinished,
    NotStopped,
    PromptTooLong,
    QuotaExceeded,
    SessionFailed,
    UnknownSession,
)
from kernel_server.protocol.messages import STATUSES
from kernel_server.state.diagram import PATH, status_diagram
from kernel_server.state.server_state import Limits, ServerState
from kernel_server.state.sessions import MOVES, Session
from tests.state.world import PROMPT, SAMPLED, SHAPE, World, snapshot


def test_a_launched_session_waits_and_runs_nothing(world: World):
    session = world.session(world.launch(name="probe"))

    assert (session.status, session.name, session.location) == ("waiting", "probe", None)
    assert session.tokens == PROMPT
    assert session.num_pages == 0
    assert world.engine.stretch is None
    assert world.kinds() == ["launched"]


def test_a_session_runs_to_the_end_one_stretch_per_forward(world: World):
    sid = world.launch(max_new_tokens=3)
    world.go(sid)
    stretches = []
    while world.engine.stretch is not None:
        stretches.append(world.stretch)
        world.done()
    session = world.session(sid)

    assert [s.forward for s in stretches] == [0, 1, 2]
    assert [s.token_ids for s in stretches] == [PROMPT, (7,), (7,)]
    assert [s.first_token for s in stretches] == [0, 6, 7]
    assert [s.sampling.position for s in stretches] == [6, 7, 8]
    assert all(s.until == SAMPLED for s in stretches)
    assert (session.status, session.finish_reason) == ("finished", "max_new_tokens")
    assert session.tokens == (*PROMPT, 7, 7, 7)
    assert (session.forward, session.location, session.layers_executed) == (2, "logits", 5)
    assert world.kinds() == ["launched", "continued", *["progress"] * 3, "finished"]


def test_an_end_token_finishes_a_session_and_is_kept(world: World):
    sid = world.launch()
    world.draw = lambda position: 49 if position == 7 else 7
    session = world.run(sid)

    assert session.finish_reason == "eos"
    assert session.tokens == (*PROMPT, 7, 49)


def test_progress_counts_tokens_and_carries_no_session(world: World):
    world.run(world.launch(max_new_tokens=2))
    progress = [e for e in world.events["ada"] if e.kind == "progress"]

    assert [(e.done, e.total, e.session) for e in progress] == [(1, 2, None), (2, 2, None)]


def test_stop_on_entry_stops_before_the_first_layer(world: World):
    sid = world.launch(stop_on_entry=True)
    world.work()
    session = world.session(sid)

    assert session.stop is not None
    assert (session.stop.reason, session.stop.location) == ("entry", "embedding")
    assert (session.layers_executed, session.num_pages) == (0, 0)


def test_sessions_without_a_seed_get_their_own_and_say_which(world: World):
    seeds = [world.session(world.launch()).seed for _ in range(3)]

    assert seeds == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"token_ids": ()}, BadPrompt, "empty"),
        ({"token_ids": None}, BadPrompt, "empty"),
        ({"token_ids": (1, 50)}, BadPrompt, "token id 50 at position 1"),
        ({"token_ids": (-1,)}, BadPrompt, "token id -1"),
        ({"token_ids": (1,) * 60, "max_new_tokens": 5}, PromptTooLong, "context of 64"),
        ({"token_ids": (1,) * 60, "max_new_tokens": 5}, PromptTooLong, "most 59 tokens, or ask"),
        ({"token_ids": (1,) * 70}, PromptTooLong, "the prompt to at most 60 tokens$"),
        ({"max_new_tokens": 0}, BadArgument, "max_new_tokens is 0"),
        ({"temperature": -1.0}, BadArgument, "temperature"),
        ({"temperature": float("nan")}, BadArgument, "temperature"),
        ({"temperature": float("inf")}, BadArgument, "temperature"),
        ({"top_p": 0.0}, BadArgument, "top_p"),
        ({"top_p": 1.5}, BadArgument, "top_p"),
        ({"top_p": float("nan")}, BadArgument, "top_p"),
        ({"seed": -1}, BadArgument, "seed"),
        ({"seed": 2**63}, BadArgument, "seed"),
        ({"name": "x" * 201}, BadArgument, "201 characters"),
        ({"name": "two\nlines"}, BadArgument, "printable"),
        ({"name": ""}, BadArgument, "0 characters"),
    ],
)
def test_a_bad_launch_is_refused_and_changes_nothing(world: World, change, error, words):
    before = snapshot(world.state)
    fields = {"token_ids": PROMPT, "max_new_tokens": 4, **change}

    with pytest.raises(error, match=words):
        world.ask(m.Launch(**fields))
    assert snapshot(world.state) == before


def test_a_prompt_longer_than_its_masks_have_room_for_is_refused_with_the_reason():
    world = World(dataclasses.replace(SHAPE, max_prompt=8))

    with pytest.raises(PromptTooLong, match=r"9 prompt tokens exceed the 8 .* Cache route") as told:
        world.launch((1,) * 9)
    world.launch((1,) * 8, max_new_tokens=20)

    assert told.value.details == {"prompt_tokens": 9, "max_prompt": 8}


def test_a_session_that_no_pool_could_hold_is_refused_with_both_numbers():
    world = World(dataclasses.replace(SHAPE, num_pages=8))

    with pytest.raises(PromptTooLong, match=r"need 9 pages, the whole pool has 8"):
        world.launch(max_new_tokens=4)  # 9 tokens to keep: 3 pages in each of 3 groups
    world.launch(max_new_tokens=3)


def test_an_owner_may_hold_so_many_sessions():
    world = World(limits=Limits(sessions_per_owner=2))
    first = world.launch()
    world.launch()

    with pytest.raises(QuotaExceeded, match="you have 2 sessions, the limit is 2"):
        world.launch()
    with pytest.raises(QuotaExceeded, match="you have 2 sessions"):
        world.ask(m.Fork(session_id=first))
    world.launch(owner="bob")
    world.ask(m.Terminate(session_id=first))
    world.launch()


def test_sessions_of_others_do_not_exist(world: World):
    sid = world.launch(owner="bob")
    mine = world.launch()

    with pytest.raises(UnknownSession, match=sid):
        world.ask(m.Describe(session_id=sid))
    with pytest.raises(UnknownSession):
        world.ask(m.Terminate(session_id=sid))
    assert [s.id for s in world.ask(m.ListSessions()).sessions] == [mine]
    assert {e.session_id for e in world.events["ada"]} == {mine}


def test_terminating_frees_all_and_unlists(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.2.output")
    world.run(sid)

    assert world.ask(m.Terminate(session_id=sid)) == m.Terminated(session_id=sid)
    assert world.state.pool.num_free == SHAPE.num_pages
    assert world.engine.sessions == {}
    assert world.kinds()[-1] == "terminated"
    with pytest.raises(UnknownSession):
        world.session(sid)


def test_a_session_terminated_in_the_engine_is_freed_when_the_engine_answers(world: World):
    sid = world.launch()
    world.go(sid)
    held = SHAPE.num_pages - world.state.pool.num_free
    world.ask(m.Terminate(session_id=sid))

    assert world.ask(m.ListSessions()).sessions == ()
    assert world.engine.interrupted
    assert SHAPE.num_pages - world.state.pool.num_free == held > 0
    world.done(2)
    assert world.state.pool.num_free == SHAPE.num_pages


def test_a_session_terminated_in_the_queue_never_runs(world: World):
    first, second = world.launch(), world.launch()
    world.go(first)
    world.go(second)
    world.ask(m.Terminate(session_id=second))
    world.work()

    assert list(world.engine.sessions) == [first]


def test_a_finished_session_keeps_its_pages_and_logits(world: World):
    sid = world.launch()
    world.run(sid)
    read = world.ask(m.ReadLogits(session_id=sid))

    assert world.session(sid).num_pages == 9
    assert (read.session_id, read.forward) == (sid, 3)
    with pytest.raises(NotStopped, match="finished after 4 tokens"):
        world.go(sid)


def test_logits_and_capture_wait_for_something_to_read(world: World):
    sid = world.launch()

    with pytest.raises(NotFinished):
        world.ask(m.ReadLogits(session_id=sid))
    with pytest.raises(NotFinished):
        world.ask(m.ReadCapture(session_id=sid))
    world.break_at(sid, "layers.1.output")
    world.run(sid)
    world.ask(m.ReadCapture(session_id=sid))
    with pytest.raises(NotFinished):
        world.ask(m.ReadLogits(session_id=sid))


def test_a_session_lost_to_a_fault_holds_nothing_and_says_why(world: World):
    sid, other = world.launch(), world.launch()
    world.go(sid)
    world.go(other)
    world.fail(1, fatal=True, code="SessionFailed")
    session = world.session(sid)

    assert (session.status, session.num_pages) == ("failed", 0)
    assert session.error is not None and session.error.message == "it broke"
    assert "failed" in world.kinds()
    with pytest.raises(SessionFailed, match="it broke"):
        world.ask(m.ReadLogits(session_id=sid))
    with pytest.raises(NotStopped, match="failed"):
        world.go(sid)
    world.work()
    assert world.session(other).status == "finished"


def test_a_passing_failure_within_a_forward_stops_with_an_exception(world: World):
    sid = world.launch()
    world.go(sid)
    world.fail(3)
    session = world.session(sid)

    assert session.stop is not None and session.stop.error is not None
    assert (session.status, session.stop.reason) == ("stopped", "exception")
    assert (session.stop.location, session.stop.error.code) == (
        "layers.2.output",
        "OutOfDeviceMemory",
    )
    assert world.run(sid).status == "finished"


def test_a_passing_failure_before_a_forward_lets_the_session_wait_with_the_error(world: World):
    sid = world.launch()
    world.go(sid)
    world.fail(-1)
    session = world.session(sid)

    assert (session.status, session.stop, session.num_pages) == ("waiting", None, 0)
    assert session.error is not None and session.error.code == "OutOfDeviceMemory"
    assert (world.kinds()[-1], session.stop_number) == ("stopped", 1)
    again = world.run(sid)
    assert (again.status, again.error) == ("finished", None)


@pytest.mark.parametrize(("start", "end"), [*itertools.product(STATUSES, STATUSES)])
def test_a_status_moves_as_the_table_says_and_not_otherwise(start: m.Status, end: m.Status):
    session = Session(
        id="s1", owner="ada", name="s1", parent=None, tokens=[1], prompt=(1,), max_new_tokens=1,
        temperature=0.0, top_p=1.0, seed=0, tables=[], status=start,
    )  # fmt: skip

    if (start, end) in MOVES:
        session.move_to(end)
        assert session.status == end
    else:
        with pytest.raises(AssertionError, match="is no move"):
            session.move_to(end)
        assert session.status == start


def test_the_status_page_is_drawn_from_the_table():
    assert PATH.read_text(encoding="utf-8") == status_diagram(), (
        "run python -m kernel_server.state.diagram"
    )


def test_events_of_each_owner_are_numbered_without_gaps(world: World):
    mine, theirs = world.launch(), world.launch(owner="bob")
    world.go(mine)
    world.run(theirs)

    for owner, session_id in (("ada", mine), ("bob", theirs)):
        log = world.events[owner]
        assert [e.seq for e in log] == list(range(1, len(log) + 1))
        assert world.session(session_id, owner).event_seq == len(log)
        assert all(e.session.event_seq == e.seq for e in log if e.session is not None)


def test_a_story_tells_what_happened_in_order(world: World):
    sid = world.launch()
    world.break_at(sid, "layers.1.output")
    world.run(sid)
    world.go(sid)
    with pytest.raises(NotStopped, match="pause it first"):
        world.ask(m.Fork(session_id=sid))
    names = [line.split()[1] for line in world.ask(m.ReadStory(session_id=sid)).lines]

    assert names[:2] == ["Launch", "SetBreakpoint"]
    assert names.index("Continue") < names.index("RunStretch") < names.index("StretchDone")
    assert names[-1] == "refused"
    assert world.state.story(sid) and world.state.story("nobody") == []


def test_replaying_what_was_recorded_leads_to_the_same_state(world: World):
    sid = world.launch(temperature=1.0)
    world.break_at(sid, "layers.1.output", condition="norm > 3", ignore=1)
    world.judge = lambda check: (check.point,)
    world.run(sid)
    child = world.ask(m.Fork(session_id=sid, seed=5)).session.id
    world.edit(child, location="layers.1.output", sticky=True)
    world.run(child)
    assert world.state.recorded is not None
    again = ServerState.replay(SHAPE, world.state.recorded)

    assert snapshot(again) == snapshot(world.state)
