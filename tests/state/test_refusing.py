"""Copies that are not made: who is told, how often it is tried, and what goes on afterwards."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import NotStopped, OutOfPages, SessionFailed, TornPage
from kernel_server.state import copies
from kernel_server.state.events import Ticked
from kernel_server.state.instructions import CopyPages
from kernel_server.state.refusing import READS, REFUSES_S
from kernel_server.state.server_state import Limits
from tests.state.tier_world import (
    PAGES,
    all_stopped,
    budget,
    device_pages,
    stopped,
    texts,
    tiers,
    wait,
)
from tests.state.world import World

FULL = m.ErrorInfo(code="ServerFault", message="No space left on device")
UNREADABLE = m.ErrorInfo(code="ServerFault", message="Input/output error")
TORN = m.ErrorInfo(code="TornPage", message="slot 3 is not what was written")


class Counting(World):
    """Counts the copies begun, by way."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun: dict[str, int] = {}

    def _carry_out(self, instruction: Any) -> None:
        if isinstance(instruction, CopyPages):
            self.begun[instruction.way] = self.begun.get(instruction.way, 0) + 1
        super()._carry_out(instruction)


def broken(way: str, error: m.ErrorInfo = FULL, **sizes: Any) -> Counting:
    """A world in which copies one way fail until `mend`."""
    world: Counting = tiers(kind=Counting, **sizes)
    world.broken[way] = error
    return world


def mend(world: World) -> None:
    """Copies are made again, and those who refuse have time to notice."""
    world.broken.clear()
    wait(world, REFUSES_S)
    world.work()


def ends_well(world: World, *session_ids: str) -> None:
    for session_id in session_ids:
        if world.session(session_id).status != "finished":
            world.run(session_id)
        assert world.session(session_id).status == "finished", world.session(session_id).error
    world.finish_checks()


# -- asked for ----------------------------------------------------------------------------------


def test_an_evict_whose_copy_fails_is_answered_at_once_and_changes_nothing() -> None:
    world = broken(
        "device-host", device=2 * PAGES, host=2 * PAGES, limits=Limits(copies_in_flight=0)
    )
    session = stopped(world)
    request = world.send(m.Evict(session_id=session))
    assert request not in world.replies
    world.land()

    with pytest.raises(OutOfPages, match="of session s1 cannot go to the host; the host refuses"):
        world.answer_to(request)
    error = world.replies[request].error
    assert "No space left on device" in error.message and error.details["needed"] == PAGES
    assert error.details["refused"] == {"host": "No space left on device"}
    assert world.begun == {"device-host": 1} and not world.engine.copies
    assert device_pages(world, session) == PAGES
    assert texts(world, session) == [
        "6 pages device to host failed (No space left on device): asked for"
    ]
    mend(world)
    request = world.send(m.Evict(session_id=session))
    world.work()
    assert world.answer_to(request).session.device_pages == 0
    ends_well(world, session)


def test_what_a_refusing_tier_is_asked_for_is_refused_without_a_copy() -> None:
    world = broken("host-disk", device=2 * PAGES, host=2 * PAGES, disk=2 * PAGES)
    session = stopped(world)
    world.work()
    request = world.send(m.Evict(session_id=session, to="disk"))
    world.work()
    with pytest.raises(OutOfPages, match="cannot go to the disk; the disk refuses pages for 5 s"):
        world.answer_to(request)
    wait(world, 2.0)
    begun = dict(world.begun)
    with pytest.raises(OutOfPages, match="for 3 s more, since writing there failed"):
        world.ask(m.Evict(session_id=session, to="disk"))

    assert world.begun == begun
    assert world.ask(m.Evict(session_id=session)).session.device_pages == 0, "the host is well"
    world.broken.clear()
    budget(world, "disk", 2 * PAGES)
    request = world.send(m.Evict(session_id=session, to="disk"))
    world.work()
    assert world.answer_to(request).session.disk_pages == PAGES, "a budget ends a refusal"
    ends_well(world, session)


def test_a_session_that_goes_on_while_its_pages_leave_keeps_them() -> None:
    """Its pages were let go while the engine wrote them."""
    world = tiers(device=2 * PAGES, host=2 * PAGES)
    session = stopped(world)
    request = world.send(m.Evict(session_id=session))
    world.go(session)
    while world.engine.copies:
        world.land()

    with pytest.raises(NotStopped, match="went on while its pages were leaving"):
        world.answer_to(request)
    assert device_pages(world, session) == PAGES
    world.work()
    ends_well(world, session)


# -- beforehand ---------------------------------------------------------------------------------


def test_write_behind_that_fails_is_told_once_and_tried_again_later_one_copy_at_a_time() -> None:
    world = broken("device-host", device=4 * PAGES, host=4 * PAGES)
    sessions = [stopped(world) for _ in range(3)]
    world.work()
    begun = world.begun["device-host"]
    assert begun <= 3, "it was tried again at once"
    for _ in range(20):
        world.session(sessions[0])
        wait(world, 0.2)
    assert world.begun["device-host"] == begun
    told = [text for session in sessions for text in texts(world, session)]
    assert told == ["6 pages device to host failed (No space left on device): write-behind"]
    wait(world, REFUSES_S)
    assert len(world.engine.copies) == 1, "a tier on trial takes one copy"
    world.work()
    assert world.begun["device-host"] == begun + 1
    told = [text for session in sessions for text in texts(world, session)]
    assert len(told) == 2, "another refusal"

    mend(world)
    assert not world.state.residency.dirty and not world.state.refusals
    ends_well(world, *sessions)


def test_each_owner_learns_once_that_a_tier_refuses() -> None:
    world = broken("device-host", device=4 * PAGES, host=4 * PAGES)
    for owner in ("ada", "bob"):
        session = world.launch(owner=owner)
        world.run(session, m.RunTo, location="logits")
    for owner, count in (("ada", 1), ("bob", 0)):
        failures = [e for e in world.events[owner] if "failed" in e.text]
        assert len(failures) == count, owner


def test_the_host_does_not_press_a_full_disk() -> None:
    world = broken("host-disk", device=44, host=12, disk=60)
    sessions = [stopped(world) for _ in range(2)]
    world.work()
    evicting = [world.send(m.Evict(session_id=session)) for session in sessions]
    world.work()
    world.answer_to(evicting[0])
    with pytest.raises(OutOfPages, match=r"1 page of session .* the disk refuses pages"):
        world.answer_to(evicting[1])
    sessions += [stopped(world) for _ in range(7)]
    world.work()
    assert world.state.pressing and world.begun["host-disk"] == 1
    for _ in range(20):
        world.session(sessions[0])
        wait(world, 0.2)
    assert world.begun["host-disk"] == 1
    failures = [e.text for e in world.events["ada"] if "failed" in e.text]
    assert len(failures) == 1 and failures[0].endswith("room on the host")

    mend(world)
    assert not world.state.pressing
    ends_well(world, *sessions)


def test_a_budget_that_is_to_be_kept_frees_no_slots_of_a_host_that_refuses() -> None:
    limits = Limits(high_mark=1.0, copies_in_flight=0)
    sizes = {"device": 2 * PAGES, "host": PAGES + 1, "disk": 2 * PAGES}
    world = broken("device-host", limits=limits, **sizes)
    world.broken.clear()
    first = evicted(world, "host")
    second = stopped(world)
    world.broken["device-host"] = FULL
    budget(world, "device", 3)
    world.work()
    assert world.state.refuses("host") and world.begun["host-disk"] == 1
    begun, used = dict(world.begun), world.state.residency.slots["host"].used
    for _ in range(9):
        wait(world, 0.5)
    assert world.begun == begun and world.state.residency.slots["host"].used == used

    mend(world)
    assert device_pages(world, second) == 3, "the budget is kept after all"
    budget(world, "device", 2 * PAGES)
    ends_well(world, first, second)


# -- a session that needs room ------------------------------------------------------------------


@pytest.mark.parametrize("way", ["device-host", "host-disk"])
def test_who_lacks_room_learns_why_and_goes_on_afterwards(way: str) -> None:
    limits = Limits(high_mark=1.0)  # nobody presses beforehand
    world: Counting = tiers(
        device=PAGES, host=PAGES + 1, disk=2 * PAGES, limits=limits, kind=Counting
    )
    sessions = [stopped(world), stopped(world)]
    world.work()
    world.broken[way] = FULL
    third = world.launch(max_new_tokens=2)
    world.run(third)
    ends = world.session(third)

    assert ends.status == "waiting" and ends.error is not None
    assert ends.error.code == "OutOfPages" and "No space left on device" in ends.error.message
    assert ends.error.details["refused"] and ends.error.details["total"] == PAGES
    assert sum(world.begun.values()) < 12 and not world.engine.copies
    begun = dict(world.begun)
    world.run(third)
    assert world.session(third).status == "waiting" and world.begun == begun
    mend(world)
    ends_well(world, third, *sessions)


def test_one_that_waits_when_the_last_copy_fails_beside_another_that_runs_is_not_lost() -> None:
    world = tiers(device=2 * PAGES, host=PAGES + 1)
    first = stopped(world)
    second = world.launch(max_new_tokens=2)
    world.go(second, m.RunTo, location="logits")
    third = world.launch(max_new_tokens=2)
    world.go(third)
    world.broken["device-host"] = FULL
    while world.engine.copies:
        world.land()
    world.work()

    assert world.session(second).status == "stopped"
    assert world.session(third).status == "waiting" and not world.state.arriving
    mend(world)
    ends_well(world, third, second, first)


def test_others_go_on_while_the_disk_is_full() -> None:
    world = broken("host-disk", device=3 * PAGES, host=PAGES + 1, disk=4 * PAGES)
    resting = stopped(world)
    world.work()
    request = world.send(m.Evict(session_id=resting, to="disk"))
    other = world.launch(max_new_tokens=4)
    world.run(other)

    assert world.session(other).status == "finished"
    assert isinstance(world.replies[request], m.ErrorReply)
    mend(world)
    ends_well(world, resting)


def test_an_exchange_that_fails_ends_and_the_next_one_works() -> None:
    world = tiers(device=PAGES, host=PAGES + 1)
    first, second = all_stopped(world, 2)
    world.broken["device-host"] = FULL
    world.run(first)
    ended = world.session(first)
    assert ended.status in ("waiting", "stopped") and ended.error is not None
    assert ended.error.code == "OutOfPages" and world.state.exchange is None

    mend(world)
    ends_well(world, first, second)


# -- pages that cannot be read ------------------------------------------------------------------


def evicted(world: World, to: Any = "disk") -> str:
    session = stopped(world)
    request = world.send(m.Evict(session_id=session, to=to))
    world.work()
    assert world.answer_to(request).session.device_pages == 0
    return session


@pytest.mark.parametrize("way, to", [("disk-host", "disk"), ("host-device", "host")])
def test_a_page_that_cannot_be_read_is_read_again_and_then_lost(way: str, to: str) -> None:
    world = broken(way, UNREADABLE, device=2 * PAGES, host=2 * PAGES, disk=2 * PAGES)
    session = evicted(world, to)
    world.run(session)
    found = world.session(session)

    assert found.status == "waiting" and found.error is not None
    assert found.error.code == "SessionFailed" and "Input/output error" in found.error.message
    assert world.begun[way] == READS
    with pytest.raises(SessionFailed, match="could not be read back: Input/output error"):
        world.ask(m.Restore(session_id=session))
    world.run(session)
    assert world.begun[way] == READS, "what is lost is read again"
    other = world.launch()
    ends_well(world, other)
    world.ask(m.Terminate(session_id=session))
    assert not world.state.lost and not world.state.failed_reads


@pytest.mark.parametrize("way, to", [("disk-host", "disk"), ("host-device", "host")])
@pytest.mark.parametrize("asks", [True, False])
def test_a_page_that_is_read_at_last_counts_for_nothing(way: str, to: str, asks: bool) -> None:
    world = broken(way, UNREADABLE, device=2 * PAGES, host=2 * PAGES, disk=2 * PAGES)
    session = evicted(world, to)
    request = None
    if asks:
        request = world.send(m.Restore(session_id=session))
    else:
        world.go(session)
    while world.begun.get(way, 0) < READS or not world.engine.copies:
        if world.engine.stretch is not None:
            world.done()
        else:
            world.land()
    world.broken.clear()
    assert world.state.failed_reads
    world.work()

    assert not world.state.failed_reads and not world.state.lost
    if request is not None:
        assert world.answer_to(request).session.device_pages == PAGES
    ends_well(world, session)


def test_a_restore_of_torn_pages_is_answered_and_not_tried_for_ever() -> None:
    world = broken("disk-host", TORN, device=2 * PAGES, host=2 * PAGES, disk=2 * PAGES)
    session = evicted(world)
    request = world.send(m.Restore(session_id=session))
    world.work()

    with pytest.raises(TornPage, match="6 pages of session s1 could not be read back: slot 3"):
        world.answer_to(request)
    assert world.begun["disk-host"] == 1
    world.ask(m.Hint(session_id=session, resume_in_s=0.0))
    for _ in range(10):
        wait(world, 0.5)
    assert world.begun["disk-host"] == 1, "its hint has it tried again"
    world.finish_checks()


def test_a_page_torn_after_its_session_ended_is_no_other_sessions_loss() -> None:
    world = broken("disk-host", TORN, device=PAGES, host=2 * PAGES, disk=2 * PAGES)
    session = evicted(world)
    world.send(m.Restore(session_id=session))
    world.ask(m.Terminate(session_id=session))
    other = world.launch(max_new_tokens=2)
    world.go(other)
    world.land()

    assert not world.state.lost and not world.state.failed_reads
    world.work()
    ends_well(world, other)


@pytest.mark.parametrize("which, reached", [(0, -1), (1, 2)])
def test_a_stretch_ends_before_the_pages_that_do_not_come(which: int, reached: int) -> None:
    """It was to write some of them: they are below as they were, and are brought once more."""
    world = tiers(device=40, host=40, kind=Counting)
    session = stopped(world, prompt=[5] * 34, max_new_tokens=4)
    world.work()
    world.ask(m.Evict(session_id=session))
    world.go(session)
    world.done()  # its token, for which no page is needed
    tickets = [ticket for _, ticket in world.stretch.arrivals]
    assert len(set(tickets)) == 2, tickets
    failing = sorted(set(tickets))[which]
    assert world.state.sessions[session].forward == 1
    world.land(failing, UNREADABLE)
    world.done()

    assert world.stretch.point == reached, "it went on where it had come to"
    assert world.begun["host-device"] == 3
    world.work()
    ends_well(world, session)


def test_a_group_waits_for_each_of_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them does not come although a later one does."""
    monkeypatch.setattr(copies, "RUN", 1)
    world = tiers(device=2 * PAGES, host=2 * PAGES)
    session = stopped(world, max_new_tokens=4)
    world.work()
    request = world.send(m.Evict(session_id=session))
    world.work()
    assert world.answer_to(request).session.device_pages == 0
    world.go(session)
    world.done()
    tickets = [ticket for group, ticket in world.stretch.arrivals if group == 2]
    assert len(tickets) == 2
    world.land(tickets[0], UNREADABLE)
    world.land(tickets[1])
    world.done()

    assert world.state.sessions[session].point == 4, "the last group begins with layer 4"
    world.work()
    ends_well(world, session)


def test_a_fork_writes_no_page_before_what_it_copies_has_come() -> None:
    world = tiers(device=3 * PAGES, host=4 * PAGES)
    parent = stopped(world, max_new_tokens=4)
    world.work()
    world.ask(m.Evict(session_id=parent))
    child = world.ask(m.Fork(session_id=parent)).session.id
    world.broken["host-device"] = UNREADABLE
    world.go(child)
    while world.engine.stretch is not None:
        world.done()
    assert world.engine.copies and child in world.state.arriving
    world.land()
    world.broken.clear()
    world.work()

    ends_well(world, parent, child)


# -- time ---------------------------------------------------------------------------------------


def test_idle_sessions_leave_once_the_host_takes_pages_again() -> None:
    limits = Limits(idle_after_s=30.0, copies_in_flight=0)
    world = broken("device-host", device=4 * PAGES, host=4 * PAGES, limits=limits)
    sessions = [stopped(world) for _ in range(3)]
    wait(world, 31.0)
    world.work()
    begun = world.begun["device-host"]
    assert begun <= 3
    for _ in range(8):
        wait(world, 0.5)
        world.work()
    assert world.begun["device-host"] == begun, "a host that refuses is tried"
    assert all(device_pages(world, session) == PAGES for session in sessions)
    wait(world, 1.0)
    world.work()
    assert world.begun["device-host"] == begun + 1, "on trial one goes first"

    world.broken.clear()
    for _ in range(20):
        wait(world, 0.5)
        world.work()
    assert not any(device_pages(world, session) for session in sessions)
    ends_well(world, *sessions)


# -- anything -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_any_copies_may_fail_at_any_time(seed: int) -> None:
    """Clients do what they like while disk and host fail, recover and fail again. Nothing leaks,
    nobody waits for ever, copies are not begun in vain, and in the end all go on."""
    any_ = random.Random(seed)
    limits = Limits(sessions_per_owner=12, idle_after_s=20.0)
    world: Counting = tiers(device=40, host=24, disk=40, limits=limits, kind=Counting)
    world.draw = lambda position: position % 40
    live: list[str] = []
    refused = failed = 0
    for step in range(2500):
        choice = any_.randrange(12)
        found = world.state.sessions
        rests = [s for s in live if found[s].status in ("waiting", "stopped")]
        if choice == 0 and len(live) < 8:
            live.append(world.launch(max_new_tokens=any_.randint(3, 6)))
        elif choice in (1, 2, 3) and rests:
            kind = any_.choice([m.Continue, m.Next, m.StepOut, m.RunTo])
            options = {"location": "logits"} if kind is m.RunTo else {}
            request = world.send(
                kind(
                    session_id=(one := any_.choice(rests)),
                    seen=found[one].stop_number,
                    **options,
                )
            )
            assert request in world.replies
        elif choice == 4 and live:
            to = any_.choice(["host", "disk"])
            world.send(m.Evict(session_id=any_.choice(live), to=to))
        elif choice == 5 and live:
            world.send(m.Restore(session_id=any_.choice(live)))
        elif choice == 6:
            wait(world, any_.uniform(0.1, 4.0))
        elif choice == 7 and any_.random() < 0.4:
            way = any_.choice(["device-host", "host-disk"])
            if world.broken.pop(way, None) is None:
                world.broken[way] = FULL
        elif choice == 8 and live and (any_.random() < 0.2 or len(live) == 8):
            gone = live.pop(any_.randrange(len(live)))
            world.ask(m.Terminate(session_id=gone))
        elif choice == 9 and rests and len(live) < 8 and any_.random() < 0.3:
            live.append(world.ask(m.Fork(session_id=any_.choice(rests))).session.id)
        elif choice == 10 and any_.random() < 0.1:
            tier = any_.choice(["host", "disk"])
            world.send(m.SetBudget(**{tier: world.shape.page_bytes * 24}))
        else:
            for _ in range(any_.randint(1, 4)):
                error = None
                if world.engine.copies and any_.random() < 0.5:
                    ticket = any_.choice(sorted(world.engine.copies))
                    reads = world.engine.copies[ticket].way in ("disk-host", "host-device")
                    # less often in a row than a page is read, but in any copy
                    pages = world.state.copying[ticket].moves.pages
                    tries = max(world.state.failed_reads.get(page, 0) for page in pages)
                    if reads and tries < READS - 1 and any_.random() < 0.3:
                        error = UNREADABLE
                    elif not reads and any_.random() < 0.1:
                        error = FULL
                    failed += error is not None or world.engine.copies[ticket].way in world.broken
                    world.land(ticket, error)
                elif world.engine.stretch is not None:
                    world.done()
        refused += bool(world.state.refusals)
        assert len(world.engine.copies) < 40, f"copies pile up at step {step}"
    assert failed > 50 and refused > 300, "hardly anything failed: nothing was tested"

    world.broken.clear()
    world.work()
    wait(world, REFUSES_S)
    world.work()
    assert not world.state.lost
    budget(world, "host", 24)
    for session_id in live:
        ends_well(world, session_id)
        tokens = world.session(session_id).tokens[6:]
        assert tokens == tuple(position % 40 for position in range(6, 6 + len(tokens)))
        world.ask(m.Terminate(session_id=session_id))
    world.work()
    assert world.state.pool.num_free == world.shape.num_pages
    assert not any(slots.used for slots in world.state.residency.slots.values())


def test_a_refusal_ends_by_the_clock_and_by_nothing_else() -> None:
    world = broken("device-host", device=2 * PAGES, host=2 * PAGES)
    stopped(world)
    world.work()
    assert world.state.residency.free("host") == 0
    world.handle(Ticked(now=world.now + REFUSES_S - 0.1))
    assert world.state.residency.free("host") == 0
    world.handle(Ticked(now=world.now + REFUSES_S))

    assert world.state.residency.free("host") > 0
