"""A session as data and back, and a server that takes up what another has left."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.codec import MAGIC, decode, encode, plain
from kernel_server.protocol.errors import (
    BadMessage,
    BrokenJournal,
    DjinnError,
    NotRebuilt,
    NotSupported,
    SessionFailed,
    StaleStop,
    UnknownSession,
    WrongFingerprint,
    WrongModel,
)
from kernel_server.state.events import Requested, Ticked
from kernel_server.state.instructions import Publish, Reply, WriteJournal
from kernel_server.state.record import from_record, to_record
from tests.state.world import PROMPT, SHAPE, World, snapshot

FINGERPRINT = {"weights": "abc", "torch": "2.13", "threads": 1}
LOCATIONS = ("embedding", "layers.0.output", "layers.2.output", "layers.3.middle", "logits")


def world(**options: Any) -> World:
    made = World(journal=True, fingerprint=options.pop("fingerprint", FINGERPRINT), **options)
    # what is drawn depends on the position alone, as the sampler's key does
    made.draw = lambda position: position * 7 % 40
    return made


def restarted(before: World, **options: Any) -> World:
    """A server that starts with what the journal of another holds, which was killed."""
    after = world(**options)
    after.handle(before.read())
    return after


def built(of: World, session_id: str, message: Any) -> Any:
    """Ask for what needs tensors, which are computed again first."""
    with pytest.raises(NotRebuilt):
        of.ask(message)
    of.work()
    return of.ask(message)


def walk(of: World, rng: random.Random, steps: int) -> None:
    """Random things that people do; what is refused is refused."""
    for _ in range(steps):
        ids = [s.id for s in of.state.sessions.values() if not s.scratch]
        session_id = rng.choice(ids)
        session = of.state.sessions[session_id]
        seen, location = session.stop_number, rng.choice(LOCATIONS)
        value = Array.from_numpy(np.full(8, rng.random(), np.float32))
        kind: dict[str, Any] = rng.choice(
            [{"kind": "scale", "factor": 2.0}, {"kind": "add", "value": value}, {"kind": "zero"}]
        )
        spec = m.EditSpec(location=location, sticky=rng.random() < 0.5, **kind)
        lookup = {"vectors": (m.NamedArray(name="joy", value=value),)}
        ids3 = {"session_id": session_id, "seen": seen}
        message = rng.choice(
            [
                m.Continue(**ids3), m.Next(**ids3), m.StepIn(**ids3), m.StepOut(**ids3),
                m.RunTo(**ids3, location=location), m.StepBack(**ids3),
                m.AddEdit(**ids3, edit=spec), m.AddEdit(**ids3, edit=spec), m.UndoEdit(**ids3),
                m.GoTo(**ids3, node=rng.choice(list(session.tree.nodes or [0]))),
                m.SetBreakpoint(session_id=session_id, locations=(location,)),
                m.SetBreakpoint(
                    session_id=session_id, locations=("layers.1.output",),
                    condition='cosine("joy") > 0.5', ignore=1, **lookup,
                ),
                m.SetBreakpoint(
                    session_id=session_id, locations=LOCATIONS[:2], kind="logpoint",
                    what="summary", max_bytes=9000,
                ),
                m.Fork(session_id=session_id, seed=rng.randrange(99)),
            ]
        )  # fmt: skip
        try:
            of.ask(message)
        except DjinnError as error:
            assert error.code != "ServerFault", error
        if rng.random() < 0.9:
            of.work()
        elif of.engine.stretch is not None:
            of.done()


def like(session: m.SessionInfo) -> dict[str, Any]:
    """What people see of a session, but for what a restart may change."""
    return {
        name: getattr(session, name)
        for name in (
            "id", "name", "owner", "tokens", "seed", "temperature", "top_p", "parent", "forward",
            "location", "layers_executed", "max_new_tokens", "edits",
        )
    }  # fmt: skip


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_a_session_is_the_same_after_a_way_through_its_record(seed):
    made = world()
    made.launch(max_new_tokens=5)
    walk(made, random.Random(seed), 14)
    for session in [s for s in made.state.sessions.values() if not s.scratch]:
        record, arrays = to_record(session, made.state.sessions, SHAPE)
        record = decode(encode(record))
        again, lines = from_record(record, arrays, SHAPE)

        assert to_record(again, lines, SHAPE) == (record, arrays) or _has_logs(session)
        assert again.tokens == session.tokens
        assert snapshot(again.edits) == snapshot(session.edits)
        made_then = {f: made_in for f, made_in in session.applied.items() if made_in}
        assert snapshot(again.applied) == snapshot(made_then)
        assert again.tree.nodes.keys() == session.tree.nodes.keys()
        assert (again.tree.away, again.tree.lines) == (session.tree.away, session.tree.lines)
        for one, other in zip(again.breakpoints, session.breakpoints, strict=True):
            assert (one.hits, one.held, one.stops) == (other.hits, other.held, other.stops)
            assert (one.condition, one.points, one.lookup) == (
                other.condition, other.points, other.lookup,
            )  # fmt: skip


def _has_logs(session: Any) -> bool:
    """Records of logs are counted as lost, so those of a log are not the same."""
    return any(point.log is not None and point.log.sizes for point in session.breakpoints)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_after_a_kill_sessions_are_listed_and_end_as_if_undisturbed(seed):
    rng = random.Random(seed)
    before = world()
    before.launch(max_new_tokens=5)
    before.launch(max_new_tokens=4, seed=3)
    walk(before, rng, 14)
    resting = {
        s.id: before.session(s.id)
        for s in before.state.sessions.values()
        if not s.scratch and s.status != "running"
    }
    after = restarted(before)
    after = restarted(after) if rng.random() < 0.3 else after

    for session_id, was in resting.items():
        now = after.session(session_id)
        assert like(now) == like(was)
        assert (now.status, now.stop, now.stop_number) == (was.status, was.stop, was.stop_number)
        assert [b.hits for b in now.breakpoints] == [b.hits for b in was.breakpoints]
    for session in [s for s in after.state.sessions.values() if not s.scratch]:
        if session.status == "finished":
            continue
        message = m.Continue(session_id=session.id, seen=session.stop_number)
        if session.dormant:
            built(after, session.id, message)
        else:
            after.ask(message)
        for _ in range(40):
            after.work()
            if after.session(session.id).status == "finished":
                break
            after.go(session.id)
        # the engine has checked every page against the tokens
        assert after.session(session.id).status == "finished"
        # built again, sessions share no pages: they need more room than before
        after.ask(m.Terminate(session_id=session.id))
    after.finish_checks()


def test_every_node_can_be_returned_to_after_a_restart():
    before = world()
    session_id = before.launch(max_new_tokens=4)
    for location in ("layers.1.output", "logits", "layers.2.output"):
        before.run(session_id, m.RunTo, location=location)
    before.run(session_id, m.StepBack)
    before.edit(session_id, location="logits", kind="scale", factor=2.0)
    before.run(session_id)
    nodes = before.ask(m.ListBranches(session_id=session_id)).nodes
    assert any(node.branch for node in nodes)

    after = restarted(before)
    again = after.ask(m.ListBranches(session_id=session_id)).nodes
    assert [n.number for n in again] == [n.number for n in nodes]
    for node in reversed(again):
        seen = after.session(session_id).stop_number
        message = m.GoTo(session_id=session_id, seen=seen, node=node.number)
        for _ in range(3):  # the session is computed, then the branch
            try:
                after.ask(message)
                break
            except NotRebuilt:
                after.work()
        after.work()
        now = after.session(session_id)
        assert now.forward == node.forward
        if node.status == "stopped":
            assert now.location == node.location
        assert now.status == node.status
        assert len(now.tokens) == node.num_tokens
    after.finish_checks()


def test_one_that_ran_waits_before_the_forward_it_was_in_and_its_client_can_go_on():
    before = world()
    session_id = before.launch(max_new_tokens=8)
    stop = before.run(session_id, m.RunTo, location="layers.1.output")
    before.go(session_id)
    for _ in range(3):
        before.done()
    before.handle(Ticked(now=1.0))
    drawn = before.session(session_id).tokens

    after = restarted(before)
    now = after.session(session_id)
    assert (now.status, now.tokens, now.forward) == ("waiting", drawn, 3)
    assert now.error is not None and now.error.code == "ServerRestarted"
    edit = m.EditSpec(kind="zero", location="layers.1.output")
    with pytest.raises(NotRebuilt):
        after.ask(m.AddEdit(session_id=session_id, seen=stop.stop_number, edit=edit))
    after.work()
    with pytest.raises(StaleStop):
        after.ask(m.AddEdit(session_id=session_id, seen=stop.stop_number, edit=edit))
    after.ask(m.Continue(session_id=session_id, seen=stop.stop_number))
    after.work()
    assert after.session(session_id).status == "finished"
    with pytest.raises(StaleStop):
        after.ask(m.Continue(session_id=session_id, seen=stop.stop_number))


def test_nothing_counts_and_nothing_is_told_but_progress_while_it_is_computed_again():
    before = world()
    session_id = before.launch(max_new_tokens=6)
    before.break_at(session_id, "layers.1.output", ignore=2)
    before.run(session_id)
    hits = before.breakpoint(session_id).hits
    after = restarted(before)
    told = len(after.events["ada"])

    seen = after.session(session_id).stop_number
    with pytest.raises(NotRebuilt):
        after.ask(m.ReadValue(session_id=session_id, seen=seen, tokens=m.ALL))
    after.work()

    kinds = {event.kind for event in after.events["ada"][told:]}
    assert kinds == {"progress", "changed"}
    assert after.breakpoint(session_id).hits == hits
    assert after.session(session_id).stop_number == seen
    after.ask(m.ReadValue(session_id=session_id, seen=seen, tokens=m.ALL))


def test_another_fingerprint_is_refused_with_what_differs_until_it_is_accepted():
    before = world()
    session_id = before.launch(max_new_tokens=4)
    before.run(session_id, m.RunTo, location="layers.1.output")
    after = restarted(before, fingerprint={**FINGERPRINT, "torch": "2.14"})
    info = after.session(session_id)

    assert info.refused is not None and "torch was '2.13', is '2.14'" in info.refused
    go = m.Continue(session_id=session_id, seen=info.stop_number)
    with pytest.raises(WrongFingerprint, match="inexact=True"):
        after.ask(go)
    after.ask(m.Accept(session_id=session_id))
    built(after, session_id, go)
    after.work()
    assert after.session(session_id).inexact
    assert after.ask(m.Fork(session_id=session_id)).session.inexact
    # and ever after
    assert (
        restarted(after, fingerprint={**FINGERPRINT, "torch": "2.14"}).session(session_id).inexact
    )


def test_a_run_that_draws_other_tokens_is_reported_and_leaves_the_session_alone():
    before = world()
    session_id = before.launch(max_new_tokens=4)
    before.run(session_id, m.RunTo, location="layers.1.output")
    before.run(session_id, m.RunTo, location="layers.0.output")
    after = restarted(before)
    after.token = lambda: 3  # type: ignore[method-assign]
    go = m.Continue(session_id=session_id, seen=after.session(session_id).stop_number)
    with pytest.raises(NotRebuilt):
        after.ask(go)
    after.work()
    with pytest.raises(SessionFailed, match="not exact"):
        after.ask(go)
    assert after.session(session_id).status == "stopped"
    del after.token
    built(after, session_id, go)


def test_a_pin_outlives_the_server_and_so_does_its_end():
    before = world()
    pinned, other, waiting = (before.launch(max_new_tokens=4) for _ in range(3))
    for session_id in (pinned, other):
        before.run(session_id, m.RunTo, location="layers.1.output")
    for session_id in (pinned, waiting):
        before.ask(m.Pin(session_id=session_id))

    after = restarted(before)
    again = restarted(after)

    for of in (after, again):
        assert [of.session(one).pinned for one in (pinned, other, waiting)] == [True, False, True]
        assert of.session(pinned).dormant and not of.session(pinned).num_pages
    again.ask(m.Pin(session_id=pinned, pinned=False))
    last = restarted(again)
    assert [last.session(one).pinned for one in (pinned, other, waiting)] == [False, False, True]
    last.finish_checks()


def test_one_computed_again_is_kept_on_the_device_by_the_pin_it_had():
    tiers = replace(SHAPE, num_pages=2 * SHAPE.num_pages, num_host_pages=SHAPE.num_pages)
    before = world(shape=tiers)
    session_id = before.launch(max_new_tokens=4)
    before.run(session_id, m.RunTo, location="layers.1.output")
    before.ask(m.Pin(session_id=session_id))
    after = restarted(before, shape=tiers)
    evict = m.Evict(session_id=session_id, to="host")

    with pytest.raises(NotSupported, match="is pinned to the device"):
        built(after, session_id, evict)
    now = after.session(session_id)
    assert now.num_pages and now.device_pages == now.num_pages
    after.ask(m.Pin(session_id=session_id, pinned=False))
    after.ask(evict)
    after.finish_checks()


def test_a_session_loaded_from_the_record_of_a_pinned_one_is_not_pinned():
    before = world()
    session_id = before.launch(max_new_tokens=4)
    before.run(session_id, m.RunTo, location="layers.1.output")
    before.ask(m.Pin(session_id=session_id))
    saved = before.ask(m.ReadRecord(session_id=session_id))
    parts = tuple(m.ArrayPart(data=one.data) for one in saved.arrays)
    assert saved.record.pinned, "the control: the load has something to leave out"

    for of in (world(), before):
        loaded = of.ask(m.LoadRecord(record=saved.record, arrays=parts)).session
        assert loaded.stop == before.session(session_id).stop
        assert not loaded.pinned
    assert before.session(session_id).pinned


def test_a_record_written_before_pins_were_recorded_is_read_as_not_pinned():
    before = world()
    session_id = before.launch(max_new_tokens=4)
    before.run(session_id, m.RunTo, location="layers.1.output")
    before.ask(m.Pin(session_id=session_id))
    data, arrays = before.journal[session_id]
    tree = plain(decode(data))
    del tree["body"]["pinned"]
    header = json.dumps(tree).encode()
    before.journal[session_id] = MAGIC + len(header).to_bytes(4, "little") + header, arrays

    after = restarted(before)

    assert like(after.session(session_id)) == like(before.session(session_id))
    assert not after.session(session_id).pinned
    assert not after.state.unread


def test_ids_are_not_given_twice_and_the_ended_do_not_come_back():
    before = world()
    first, second = before.launch(), before.launch()
    before.ask(m.Terminate(session_id=second))
    after = restarted(before)

    assert [s.id for s in after.ask(m.ListSessions()).sessions] == [first]
    assert after.launch() not in (first, second)


def test_one_that_is_terminated_while_it_is_computed_again_leaves_nothing():
    before = world()
    session_id = before.launch(max_new_tokens=4)
    before.run(session_id, m.RunTo, location="layers.1.output")
    after = restarted(before)
    with pytest.raises(NotRebuilt):
        after.go(session_id)
    after.ask(m.Terminate(session_id=session_id))
    after.work()
    assert after.state.pool.num_free == SHAPE.num_pages
    assert session_id not in after.journal
    after.finish_checks()


def test_a_record_that_does_not_hold_together_is_left_alone():
    before = world()
    session_id = before.launch(max_new_tokens=4)
    before.run(session_id, m.RunTo, location="layers.1.output")
    data, arrays = before.journal[session_id]
    before.journal[session_id] = data, arrays[:0]
    after = restarted(before)
    assert session_id in after.state.unread
    assert not after.ask(m.ListSessions()).sessions
    with pytest.raises(BrokenJournal, match=f"{session_id} of the journal.*array"):
        after.ask(m.Describe(session_id=session_id))
    with pytest.raises(UnknownSession):
        after.ask(m.Describe(session_id=session_id), owner="someone else")
    with pytest.raises(BadMessage, match="array"):
        from_record(decode(data), (), SHAPE)


def test_a_session_of_another_model_says_so_and_stays_in_the_journal():
    before = world()
    session_id = before.launch(max_new_tokens=4)
    after = world(shape=replace(SHAPE, hidden_size=16, sites=()))
    after.handle(before.read())
    with pytest.raises(WrongModel, match="layers, channels and tokens") as told:
        after.ask(m.Describe(session_id=session_id))
    assert "\n" not in str(told.value)
    assert after.launch() != session_id


@pytest.mark.parametrize(
    "message",
    [
        m.SetBreakpoint(session_id="s1", locations=("layers.1.output",)),
        m.Fork(session_id="s1"),
        m.Pin(session_id="s1"),
        m.Terminate(session_id="s1"),
    ],
)
def test_every_change_is_recorded_before_it_is_told(message):
    made = world()
    made.launch(PROMPT)

    out = made.handle(Requested(request_id=99, owner="ada", message=message, now=2.0))

    kinds = [type(i) for i in out if isinstance(i, (Publish, Reply, WriteJournal))]
    assert kinds[0] is WriteJournal and {Publish, Reply} <= set(kinds[1:])


def test_records_of_a_session_and_of_its_forks_hold_one_array_of_the_prompt() -> None:
    """The journal hashes and writes an array once."""
    of = world()
    sid = of.launch(max_new_tokens=4)
    of.run(sid, m.StepOut)
    child = of.ask(m.Fork(session_id=sid)).session.id
    of.run(child)

    sessions = of.state.sessions
    prompts = [to_record(sessions[one], {}, SHAPE)[1][0] for one in (sid, child, sid)]
    assert len({id(array) for array in prompts}) == 1
    assert tuple(prompts[0].numpy()) == PROMPT
