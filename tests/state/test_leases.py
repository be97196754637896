"""Sessions that nobody uses: warned of, put to rest when they are on disk, and there again."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import NotRebuilt
from kernel_server.state.events import DurabilityChanged, Ticked
from kernel_server.state.instructions import DropTensors
from kernel_server.state.server_state import Limits, ServerState
from tests.state.test_record import FINGERPRINT, built, like, restarted, walk
from tests.state.world import PROMPT, SHAPE, World

#: Seconds of the lease in most of these tests; it warns at 900.
LEASE = 1000.0


def world(lease_s: float | None = LEASE, **options: Any) -> World:
    made = World(
        journal=True,
        fingerprint=FINGERPRINT,
        limits=Limits(lease_s=lease_s, idle_after_s=None),
        **options,
    )
    made.draw = lambda position: position * 7 % 40
    return made


def stopped(of: World, owner: str = "ada", at: str = "layers.2.output", **options: Any) -> str:
    session_id = of.launch(owner=owner, **options)
    of.run(session_id, m.RunTo, location=at)
    return session_id


def until(of: World, now: float) -> None:
    """Let the clock come to `now`, as it does: in small steps."""
    step = max(4.0, (now - of.now) / 300)
    while of.now < now:
        of.now = min(of.now + step, now)
        of.handle(Ticked(now=of.now))


def told(of: World, owner: str = "ada") -> list[m.Event]:
    return [event for event in of.events.get(owner, []) if event.kind == "lease"]


def texts(of: World, owner: str = "ada") -> list[str]:
    return [event.text for event in told(of, owner)]


def test_it_warns_once_at_nine_tenths_and_then_rests_on_disk():
    made = world()
    session_id = stopped(made)
    until(made, 899)
    assert not told(made)

    until(made, 950)

    (warning,) = told(made)
    assert (warning.session_id, warning.remaining_s) == (session_id, 100)
    assert warning.session is not None and not warning.session.dormant
    for word in (session_id, "15 min", "100 s", "16.7 min", "session.refresh()", "session.save("):
        assert word in warning.text, warning.text
    assert "\n" not in warning.text

    until(made, 997)
    assert not made.state.sessions[session_id].dormant
    until(made, 1100)

    _, ended = told(made)
    assert ended.remaining_s == 0 and ended.session is not None
    assert ended.session.dormant and ended.session.lease_ended
    assert "at rest on disk" in ended.text and "\n" not in ended.text
    assert made.state.pool.num_free == SHAPE.num_pages
    assert session_id not in made.engine.sessions
    until(made, 5000)
    assert len(told(made)) == 2, "it is not said again"
    made.finish_checks()


def test_it_is_listed_as_it_stood_and_goes_on_as_if_nothing_had_been():
    made = world()
    session_id = stopped(made)
    expected = world(None)
    stopped(expected)
    expected.run("s1")
    was = made.session(session_id)
    until(made, 1200)

    now = made.session(session_id)
    assert like(now) == like(was) and (now.status, now.stop) == (was.status, was.stop)
    assert (now.dormant, now.num_pages) == (True, 0)
    built(made, session_id, m.Continue(session_id=session_id, seen=was.stop_number))
    made.work()

    after = made.session(session_id)
    assert (after.status, after.dormant, after.lease_ended) == ("finished", False, False)
    assert after.tokens == expected.session("s1").tokens
    made.finish_checks()


@pytest.mark.parametrize(
    "use",
    [
        m.Describe(session_id="s1"),
        m.ReadValue(session_id="s1", seen=1, tokens=m.ALL),
        m.SetBreakpoint(session_id="s1", locations=("layers.3.output",)),
        m.ReadRecord(session_id="s1"),
    ],
    ids=lambda message: type(message).__name__,
)
@pytest.mark.parametrize("when", [500.0, 950.0])
def test_any_use_begins_it_anew(use, when):
    made = world()
    stopped(made)
    until(made, when)
    made.ask(use)
    before = len(told(made))

    until(made, when + 890)
    assert len(told(made)) == before
    until(made, when + 903)
    assert len(told(made)) == before + 1, "a new lease is a cause to warn again"
    assert not made.state.sessions["s1"].dormant
    until(made, when + 1010)
    assert made.state.sessions["s1"].dormant


def test_what_notebooks_ask_by_themselves_is_no_use():
    made = world()
    stopped(made)
    for now in (500, 920, 960):
        until(made, now)
        made.ask(m.ListBranches(session_id="s1"))
        made.ask(m.ListSessions())
    until(made, 1010)

    assert made.state.sessions["s1"].dormant
    assert len(told(made)) == 2


def test_one_that_runs_has_none_and_it_counts_from_when_it_came_to_rest():
    made = world()
    session_id = made.launch(max_new_tokens=4)
    made.go(session_id, m.RunTo, location="layers.2.output")
    until(made, 3000)
    assert not told(made)
    made.work()

    until(made, 3890)
    assert not told(made)
    until(made, 3905)
    assert len(told(made)) == 1


def test_a_pinned_session_has_no_lease():
    made = world()
    pinned, other = stopped(made), stopped(made)
    made.ask(m.Pin(session_id=pinned, pinned=True))
    until(made, 9999)

    assert {event.session_id for event in told(made)} == {other}
    assert not made.state.sessions[pinned].dormant
    made.ask(m.Pin(session_id=pinned, pinned=False))
    until(made, 9999 + 1100)
    assert made.state.sessions[pinned].dormant


def test_a_pinned_session_has_no_lease_after_a_restart_either():
    before = world()
    pinned, other = stopped(before), stopped(before)
    before.ask(m.Pin(session_id=pinned))
    after = restarted(before, limits=before.state.limits)
    until(after, 5000)
    assert after.state.sessions[pinned].dormant and not told(after)
    for session_id in (pinned, other):
        seen = after.session(session_id).stop_number
        built(after, session_id, m.ReadValue(session_id=session_id, seen=seen, tokens=m.ALL))

    until(after, 9999)

    assert {event.session_id for event in told(after)} == {other}
    assert after.state.sessions[other].lease_ended
    assert not after.state.sessions[pinned].dormant
    after.finish_checks()


def test_a_hint_is_waited_for():
    made = world()
    session_id = stopped(made)
    made.ask(m.Hint(session_id=session_id, resume_in_s=5000.0))
    until(made, 5000)
    assert not told(made)
    until(made, 6100)
    assert made.state.sessions[session_id].dormant


def test_what_holds_nothing_is_not_warned_of():
    made = world()
    made.launch()
    until(made, 9999)
    assert not told(made)
    assert not made.state.leases


def test_what_cannot_be_recorded_stays_and_says_why_once_for_each_reason():
    made = world()
    session_id = stopped(made)
    made.disk = "the disk is full (No space left on device)"
    until(made, 1005)

    assert not made.state.sessions[session_id].dormant
    assert len(told(made)) == 2 and "No space left" in texts(made)[-1]
    assert "stays in memory" in texts(made)[-1] and "\n" not in texts(made)[-1]
    for moment in range(1100, 3000, 50):
        until(made, moment)
    assert len(told(made)) == 2, "the same reason is not told again"
    made.disk = "the disk is gone"
    until(made, 3200)
    assert len(told(made)) == 3
    assert not made.state.sessions[session_id].dormant

    made.disk = ""
    made.handle(DurabilityChanged(text=""))
    until(made, 3203)
    assert made.state.sessions[session_id].dormant
    assert session_id in made.journal
    made.finish_checks()


def test_its_record_is_in_the_journal_before_anything_is_given_back():
    made = world()
    session_id = stopped(made)
    until(made, 998)
    made.journal.clear()
    made.prompt_records = False
    until(made, 1010)

    assert session_id in made.journal and made.records
    assert not made.state.sessions[session_id].dormant
    assert made.engine.sessions[session_id]
    made.tell_recorded()
    assert made.state.sessions[session_id].dormant


@pytest.mark.parametrize("owner", ["ada", "bob"])
@pytest.mark.parametrize(
    "use",
    [m.Continue(session_id="s1", seen=1), m.Describe(session_id="s1"), m.Fork(session_id="s1")],
    ids=lambda message: type(message).__name__,
)
def test_whoever_uses_it_while_it_is_recorded_wins_and_nothing_is_lost(use, owner):
    made = world()
    stopped(made, owner=owner)
    made.prompt_records = False
    until(made, 1010)
    assert made.records
    made.ask(use, owner)
    made.tell_recorded()

    assert not made.state.sessions["s1"].dormant
    made.work()
    until(made, 1500)
    assert not made.state.sessions["s1"].dormant
    if made.session("s1", owner).status == "stopped":
        made.run("s1")
    assert made.session("s1", owner).status == "finished"
    made.finish_checks()


def test_whoever_comes_after_it_went_to_rest_waits_until_it_is_computed_again():
    made = world()
    stopped(made)
    until(made, 1010)
    seen = made.session("s1").stop_number

    with pytest.raises(NotRebuilt, match="s1 rested on disk and is computed again"):
        made.ask(m.Continue(session_id="s1", seen=seen))
    made.work()
    assert made.ask(m.Continue(session_id="s1", seen=seen)).session.status == "running"


def test_to_restore_it_computes_it_again():
    made = world()
    stopped(made)
    until(made, 1010)
    built(made, "s1", m.Restore(session_id="s1"))

    assert not made.session("s1").dormant
    assert made.session("s1").num_pages > 0


def test_one_that_was_computed_again_has_a_whole_lease():
    made = world()
    stopped(made)
    until(made, 1010)
    with pytest.raises(NotRebuilt):
        made.ask(m.Restore(session_id="s1"))
    until(made, 9000)  # it takes longer than a lease
    assert made.state.builders
    made.work()
    assert not made.state.sessions["s1"].dormant
    until(made, 9880)
    assert not made.state.sessions["s1"].dormant and len(told(made)) == 2


def test_a_fork_has_a_lease_of_its_own_and_shared_pages_stay_while_it_holds_them():
    made = world()
    parent = stopped(made)
    until(made, 600)
    child = made.ask(m.Fork(session_id=parent)).session.id
    held = set(page for table in made.state.sessions[child].tables for page in table)
    made.now = 700
    made.ask(m.Describe(session_id=child))
    until(made, 1610)

    assert made.state.sessions[parent].dormant
    assert not made.state.sessions[child].dormant
    assert {page for table in made.state.sessions[child].tables for page in table} == held
    assert {event.session_id for event in told(made) if event.remaining_s == 0} == {parent}
    assert made.run(child).status == "finished"
    made.finish_checks()


def test_its_branches_rest_with_it_and_can_be_returned_to():
    made = world()
    session_id = stopped(made, max_new_tokens=4)
    for location in ("logits", "layers.1.output"):
        made.run(session_id, m.RunTo, location=location)
    made.run(session_id, m.StepBack)
    made.edit(session_id, location="logits", kind="scale", factor=2.0)
    made.run(session_id)
    nodes = made.ask(m.ListBranches(session_id=session_id)).nodes
    assert any(node.branch for node in nodes)
    until(made, 1100)
    assert made.state.pool.num_free == SHAPE.num_pages
    assert not [key for key in made.engine.sessions if key.startswith(session_id)]

    for node in reversed(nodes):
        seen = made.session(session_id).stop_number
        message = m.GoTo(session_id=session_id, seen=seen, node=node.number)
        for _ in range(3):  # the session is computed, then the branch
            try:
                made.ask(message)
                break
            except NotRebuilt:
                made.work()
        made.work()
        now = made.session(session_id)
        assert (now.status, now.forward, len(now.tokens)) == (
            node.status, node.forward, node.num_tokens,
        )  # fmt: skip
    made.finish_checks()


def test_one_that_is_looked_at_is_not_at_rest():
    made = world()
    stopped(made)
    request = made.send(
        m.ReadSites(session_id="s1", seen=1, locations=("layers.1.output",), tokens=m.ALL)
    )
    until(made, 5000)
    assert request not in made.replies and not told(made)
    made.work()
    made.answer_to(request)
    until(made, 5800)
    assert not told(made)


def test_edits_under_way_are_waited_for():
    made = world()
    stopped(made)
    made.prompt_edits = False
    edit = m.EditSpec(kind="zero", location="layers.2.output")
    made.send(m.AddEdit(session_id="s1", seen=1, edit=edit))
    until(made, 5000)
    assert not told(made)
    made.apply_edits()


def test_records_of_logpoints_are_kept_and_can_be_read_while_it_rests():
    made = world()
    session_id = made.launch(max_new_tokens=4)
    made.break_at(session_id, "layers.1.output", kind="logpoint", max_bytes=9000)
    made.run(session_id, m.RunTo, location="layers.3.output")
    noted = made.breakpoint(session_id)
    assert noted.records == 1
    out: list[Any] = []
    carry = made._carry_out
    made._carry_out = lambda i: (out.append(i), carry(i))  # type: ignore[method-assign]
    until(made, 1010)

    drops = [i for i in out if isinstance(i, DropTensors) and i.session_id == session_id]
    assert [drop.but_logs for drop in drops] == [True]
    assert made.breakpoint(session_id) == noted
    made.ask(m.ReadLog(session_id=session_id, breakpoint_id=noted.id, after=0))
    assert made.session(session_id).dormant, "nothing needs to be computed for that"
    built(made, session_id, m.Restore(session_id=session_id))
    assert made.breakpoint(session_id) == noted


def test_a_clock_that_goes_back_changes_nothing():
    made = world()
    stopped(made)
    until(made, 950)
    for now in (3.0, 949.0, 0.0):
        made.handle(Ticked(now=now))
    assert len(told(made)) == 1
    until(made, 1010)
    assert len(told(made)) == 2


def test_one_that_was_never_warned_is_warned_first_however_late_the_clock_is():
    made = world()
    stopped(made)
    made.now = 1e6
    made.handle(Ticked(now=1e6))

    assert [event.remaining_s for event in told(made)] == [100]
    until(made, 1e6 + 90)
    assert not made.state.sessions["s1"].dormant
    until(made, 1e6 + 103)
    assert made.state.sessions["s1"].dormant


def test_each_owner_hears_of_his_own():
    made = world()
    stopped(made)
    made.now = 500
    stopped(made, owner="bob")
    until(made, 1600)
    assert {event.session_id for event in told(made)} == {"s1"}
    assert {event.session_id for event in told(made, "bob")} == {"s2"}
    assert made.state.pool.num_free == SHAPE.num_pages


def test_a_server_that_starts_meanwhile_lists_it_as_before():
    made = world()
    stopped(made, at="layers.2.middle")
    was = made.session("s1")
    until(made, 1010)
    after = restarted(made)

    now = after.session("s1")
    assert like(now) == like(was) and (now.status, now.stop) == (was.status, was.stop)
    assert now.dormant and not now.lease_ended
    built(after, "s1", m.Continue(session_id="s1", seen=was.stop_number))
    after.work()
    assert after.session("s1").status == "finished"
    after.finish_checks()


def test_without_a_lease_all_stay():
    made = world(None)
    stopped(made)
    until(made, 1e9)
    assert not told(made) and not made.state.sessions["s1"].dormant


def test_there_is_none_without_a_journal():
    with pytest.raises(ValueError, match="journal"):
        ServerState(SHAPE, Limits(lease_s=LEASE))


@pytest.mark.parametrize("seed", range(20))
def test_whatever_was_done_all_end_as_if_undisturbed(seed):
    """Random things that people do, long waits between them; the engine checks every page."""
    rng = random.Random(seed)
    made = world()
    made.launch(PROMPT, max_new_tokens=5)
    made.launch(PROMPT, max_new_tokens=4, seed=3)
    for _ in range(8):
        walk(made, rng, 3)
        made.prompt_records = rng.random() < 0.7
        until(made, made.now + rng.choice([100, 950, 1200]))
        until(made, made.now + rng.choice([1, 150]))
        while made.records:
            made.tell_recorded()
        made.work()
    made.prompt_records = True
    until(made, made.now + 1200)
    made.work()
    until(made, made.now + 1200)
    assert made.state.pool.num_free == SHAPE.num_pages, "all rest"
    for session in [s for s in made.state.sessions.values() if not s.scratch]:
        for _ in range(60):
            if session.status == "finished":
                break
            message = m.Continue(session_id=session.id, seen=session.stop_number)
            with contextlib.suppress(NotRebuilt):
                made.ask(message)
            made.work()
        assert session.status == "finished"
    made.finish_checks()
