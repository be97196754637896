"""Pages on their way: what leaves, what comes back, and the faults that others had."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections import Counter
from typing import Any

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, NotSupported, OutOfPages, PromptTooLong
from kernel_server.state import paging
from kernel_server.state.copies import RUN
from kernel_server.state.events import Ticked
from kernel_server.state.instructions import CopyPages
from kernel_server.state.leaving import DECODES_BETWEEN
from kernel_server.state.server_state import Limits
from tests.state.world import SHAPE, World

#: pages of a stopped session with the world's prompt: two in each of three groups
PAGES = 6
PAGE = SHAPE.page_bytes


def tiers(
    device: int, host: int = 0, disk: int = 0, limits: Limits | None = None, kind: type = World
) -> Any:
    shape = dataclasses.replace(
        SHAPE, num_pages=device + host + disk, num_host_pages=host, num_disk_pages=disk
    )
    return kind(shape, limits)


def stopped(world: World, at: str = "logits", **options: Any) -> str:
    """A session that stands at a location, and whose copies have not been told of."""
    session_id = world.launch(max_new_tokens=options.pop("max_new_tokens", 2), **options)
    world.go(session_id, m.RunTo, location=at)
    while world.engine.stretch is not None:
        world.done()
    return session_id


def wait(world: World, seconds: float) -> None:
    world.now += seconds
    world.handle(Ticked(now=world.now))


def texts(world: World, session_id: str) -> list[str]:
    return [
        e.text for e in world.events["ada"] if e.kind == "swapped" and e.session_id == session_id
    ]


def evict(world: World, session_id: str, to: Any = "host") -> m.SessionReply:
    """The answer to an eviction, once copies were made."""
    request = world.send(m.Evict(session_id=session_id, to=to))
    world.work()
    found: m.SessionReply = world.answer_to(request)
    return found


def device_pages(world: World, session_id: str) -> int:
    state = world.state
    return state.residency.count(state.sessions[session_id].tables)["device"]


# -- faults of others ---------------------------------------------------------------------------


def test_a_page_is_not_let_go_before_its_backup_is_done() -> None:
    """Write-through that lost prefixes evicted before their backup finished (SGLang 39444)."""
    world = tiers(device=PAGES, host=2 * PAGES)
    first = stopped(world)
    assert world.engine.copies, "nothing is being backed up"
    second = world.launch(max_new_tokens=2)
    world.go(second)

    assert device_pages(world, first) == PAGES
    assert world.engine.stretch is None, "the other runs on room that is not free yet"
    world.work()
    assert world.session(second).status == "finished"
    world.run(first)
    assert world.session(first).status == "finished"
    world.finish_checks()


def test_a_host_slot_is_not_used_again_while_a_copy_reads_it() -> None:
    """A host slot that was given to another page in the middle of a copy (SGLang 28468)."""
    world = tiers(device=2 * PAGES, host=PAGES)
    first = stopped(world)
    world.work()
    world.ask(m.Evict(session_id=first))
    request = world.send(m.Restore(session_id=first))
    (copy,) = world.engine.copies.values()
    assert copy.way == "host-device"
    world.ask(m.Terminate(session_id=first))
    stopped(world)

    assert not any(c.way == "device-host" for c in world.engine.copies.values())
    world.work()
    assert isinstance(world.replies[request], m.ErrorReply)
    assert world.state.residency.slots["host"].used == PAGES, "the second was not copied after all"
    world.finish_checks()


def test_a_page_written_while_it_is_copied_is_not_taken_for_copied() -> None:
    """Offloading that raced with the computation of the same page (vLLM 31341)."""
    world = tiers(device=2 * PAGES, host=2 * PAGES)
    session = stopped(world, at="layers.2.output")
    for copy in world.engine.copies.values():
        world.engine.move(copy)  # the bytes are read now, and told of after the page is written
    world.go(session, m.RunTo, location="logits")
    while world.engine.stretch is not None:
        world.done()
    request = world.send(m.Evict(session_id=session))
    world.work()
    assert world.answer_to(request).session.device_pages == 0
    world.run(session)

    assert world.session(session).status == "finished"
    world.finish_checks()


def test_pressure_ends_when_its_cause_does() -> None:
    """Pressure that was never recovered from (SGLang 12770): once the host was full, nothing was
    copied again."""
    world = tiers(device=3 * PAGES, host=PAGES)
    first, second = stopped(world), stopped(world)
    world.work()
    assert len(world.state.residency.dirty) == PAGES
    third = stopped(world)
    evict(world, second)
    with pytest.raises(OutOfPages, match="fit there"):
        world.ask(m.Evict(session_id=third))
    world.ask(m.Terminate(session_id=second))
    world.work()

    assert len(world.state.residency.dirty) == PAGES, "the host has room and nothing is copied"
    world.ask(m.Terminate(session_id=first))
    world.work()
    assert not world.state.residency.dirty and device_pages(world, third) == PAGES
    world.run(third)
    assert world.session(third).status == "finished"
    world.finish_checks()


def test_a_session_that_makes_room_gives_it_after_its_copy_only() -> None:
    """A preempted request whose pages were given away before their copy was done (vLLM 32398)."""
    world = tiers(device=PAGES, host=PAGES)
    first = stopped(world)
    request = world.send(m.Evict(session_id=first))
    free = world.state.residency.free

    assert request not in world.replies
    assert free("device") == 0
    world.land()
    assert request in world.replies
    assert free("device") == PAGES
    world.finish_checks()


def test_a_copy_that_fails_leaves_the_page_where_it_was() -> None:
    world = tiers(device=PAGES, host=PAGES)
    first = stopped(world)
    world.land(error=m.ErrorInfo(code="OutOfDeviceMemory", message="no room"))

    assert device_pages(world, first) == PAGES
    world.run(first)
    assert world.session(first).status == "finished"


# -- how many copies ----------------------------------------------------------------------------

LONG_PROMPT = [7] * 60


def pages_of(world: World, session_id: str) -> set[int]:
    return {page for table in world.state.sessions[session_id].tables for page in table}


def test_a_request_looks_at_its_pages_when_there_is_something_to_decide() -> None:
    """Not at each copy: a swap of hundreds of pages took longer to decide than to carry out."""
    world = tiers(device=100, host=100, limits=Limits(copies_in_flight=0))
    session = stopped(world, prompt=LONG_PROMPT)
    pages = len(pages_of(world, session))
    looked, settled = [], world.state._settled

    def note(*given: Any) -> bool:
        looked.append(len(world.engine.copies))
        return settled(*given)

    world.state._settled = note
    request = world.send(m.Evict(session_id=session))
    assert [len(copy.sources) for copy in world.engine.copies.values()] == [pages]
    world.work()
    assert world.answer_to(request).session.device_pages == 0
    request = world.send(m.Restore(session_id=session))
    world.work()
    assert world.answer_to(request).session.device_pages == pages

    assert looked == [0, 0, 0, 0], "to begin the copies, and when all are made"
    world.ask(m.Evict(session_id=session))
    world.go(session)
    world.done()
    needed = [len(copy.sources) for copy in world.engine.copies.values()]
    assert max(needed) == RUN < pages, "whoever computes meanwhile waits for a few at a time"
    world.work()
    assert world.session(session).status == "finished"
    world.finish_checks()


def test_a_restoration_looks_at_no_page_by_itself_where_none_is_on_the_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For hundreds of pages that was most of what a swap took the state."""
    world = tiers(device=100, host=100)
    session = stopped(world, prompt=LONG_PROMPT)
    evict(world, session)
    looked = list[int]()
    place = world.state.residency.place
    monkeypatch.setattr(
        world.state.residency, "place", lambda page: looked.append(page) or place(page)
    )
    world.state.checking = False
    request = world.send(m.Restore(session_id=session))
    assert not looked
    monkeypatch.undo()
    world.work()
    assert world.answer_to(request).session.device_pages > PAGES


def test_a_copy_that_fails_is_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although others of the same request are under way."""
    monkeypatch.setattr(paging, "WHOLE_RUN", 16)
    world = tiers(device=100, host=100, limits=Limits(copies_in_flight=0))
    session = stopped(world, prompt=LONG_PROMPT)
    request = world.send(m.Evict(session_id=session))
    assert len(world.engine.copies) == 3
    assert world.state.residency.moving == pages_of(world, session)
    world.land()
    assert len(world.state.residency.moving) == len(pages_of(world, session)) - 16
    world.land(error=m.ErrorInfo(code="OutOfDeviceMemory", message="no room"))
    assert isinstance(world.replies[request], m.ErrorReply)
    world.work()
    assert device_pages(world, session) == len(pages_of(world, session))
    world.finish_checks()


def pieces(copies: Any) -> int:
    """How many copies of slots in a row to slots in a row these are."""
    found = 0
    for copy in copies:
        pairs = sorted(zip(copy.sources, copy.targets, strict=True))
        found += 1
        found += sum((a + 1, b + 1) != after for (a, b), after in itertools.pairwise(pairs))
    return found


def swapped_in(world: World, session: str) -> tuple[int, int]:
    """Pieces in which a session leaves and comes back, as long as it takes to be asked twice."""
    request = world.send(m.Evict(session_id=session))
    left = pieces(world.engine.copies.values())
    world.work()
    assert world.answer_to(request).session.device_pages == 0
    request = world.send(m.Restore(session_id=session))
    came = pieces(world.engine.copies.values())
    world.work()
    assert world.answer_to(request).session.device_pages == len(pages_of(world, session))
    return left, came


def test_pages_that_move_together_lie_in_a_row_and_move_in_one_piece() -> None:
    """A swap of 64 pages was half as many copies, since slots were taken from a stack."""
    world = tiers(device=200, host=200, limits=Limits(copies_in_flight=2))
    sessions = [stopped(world, prompt=LONG_PROMPT[:50], max_new_tokens=9) for _ in range(3)]
    world.work()  # all of them are copied beforehand, in turns of a few pages
    pages = len(pages_of(world, sessions[0]))
    assert pages > 2 * RUN

    for session in (*sessions, *sessions[::-1]):
        assert swapped_in(world, session) == (0, 1)
    for other, session in enumerate(sessions):
        # the page of each group that it writes goes back to where its copy was
        world.run(session, m.RunTo, location="layers.1.output")
        world.run(session, m.RunTo, location="logits")
        assert swapped_in(world, session) == (0, 1)
        world.ask(m.Evict(session_id=sessions[other - 1]))
    world.finish_checks()


def test_a_session_that_has_grown_is_whole_again_after_it_was_copied() -> None:
    """Its new pages lie elsewhere, a group's each; below they are put in their order."""
    world = tiers(device=200, host=200, limits=Limits(copies_in_flight=0))
    session, other = (stopped(world, prompt=LONG_PROMPT[:30], max_new_tokens=30) for _ in range(2))
    groups, before = SHAPE.num_groups, len(pages_of(world, session))
    for _ in range(10):
        for one in (session, other):
            world.run(one, m.RunTo, location="logits")
    grown = len(pages_of(world, session)) - before
    assert grown >= 2 * groups
    left, came = swapped_in(world, session)

    assert 1 < left <= groups + grown and came == 1
    assert swapped_in(world, session) == (0, 1)
    world.ask(m.Evict(session_id=session))
    world.go(session)
    assert pieces(world.engine.copies.values()) == len(world.engine.copies), "in the order of need"
    world.work()
    world.finish_checks()


def test_what_came_to_rest_is_copied_from_the_next_tick_on() -> None:
    """Who steps through layers shall not wait for copies, of pages that are then written again."""
    limits = Limits(copies_from_ticks=True)
    world = tiers(device=8 * PAGES, host=4 * PAGES, limits=limits)
    session, other = stopped(world, max_new_tokens=9), stopped(world, max_new_tokens=9)
    for _ in range(3):
        world.run(session, m.RunTo, location="layers.1.output")
        world.run(session, m.RunTo, location="logits")
    assert not world.engine.copies
    world.go(session, m.RunTo, location="layers.1.output")
    wait(world, 0.5)
    while world.engine.stretch is not None:
        world.done()
    world.work()
    assert not world.state.residency.dirty & set(pages_of(world, other)), "the other one rested"
    assert world.state.residency.dirty & set(pages_of(world, session)), "this one ran"
    wait(world, 0.5)
    world.work()

    assert not world.state.residency.dirty
    world.finish_checks()


def test_what_came_to_rest_is_copied_at_once_where_much_of_the_device_cannot_leave() -> None:
    limits = Limits(copies_from_ticks=True)
    world = tiers(device=3 * PAGES, host=4 * PAGES, limits=limits)
    sessions = [stopped(world) for _ in range(2)]
    assert not world.engine.copies
    sessions.append(stopped(world))
    assert world.state.pressing and world.engine.copies
    world.work()

    assert not world.state.residency.dirty
    for session in sessions:
        world.run(session)
    world.finish_checks()


def test_beside_decodes_few_copies_are_made_beforehand_and_large_ones() -> None:
    """A decode waits for the host at every layer; a server at rest, and a prefill, do not."""
    world = tiers(device=200, host=200, limits=Limits(copies_in_flight=2))
    dirty, under_way = world.state.residency.dirty, world.engine.copies
    waiting = [stopped(world, prompt=LONG_PROMPT) for _ in range(3)]
    assert [len(copy.sources) for copy in under_way.values()] == [RUN, RUN]
    begun, copy = list[tuple[int, int]](), world.state._copy

    def note(session: Any, pages: list[int], *given: Any, **how: Any) -> None:
        begun.append((world.state.slot.number, len(pages)))
        copy(session, pages, *given, **how)

    world.state._copy = note
    world.go(world.launch(prompt=[3], max_new_tokens=20))
    while dirty & set().union(*(pages_of(world, session) for session in waiting)):
        while under_way:
            world.land()
        world.done()
    whole = len(pages_of(world, waiting[0]))
    assert [pages for _, pages in begun] == [whole - 2 * RUN, whole, whole] and whole > RUN
    numbers = [number for number, _ in begun]
    assert numbers == list(range(numbers[0], numbers[-1] + 1, DECODES_BETWEEN))
    del world.state._copy
    world.work()

    for session in waiting:
        world.ask(m.Terminate(session_id=session))
    stopped(world, prompt=LONG_PROMPT), stopped(world, prompt=LONG_PROMPT)
    world.go(world.launch(prompt=LONG_PROMPT))
    world.land()
    world.land()
    assert len(under_way) == 2, "beside a prefill fewer are made than at rest"
    world.work()
    world.finish_checks()


# -- marks --------------------------------------------------------------------------------------


def test_the_host_gives_to_the_disk_between_the_marks_and_no_further() -> None:
    """Begun above 85 % of the device, ended at 75 %: the rest stays on the host."""
    world = tiers(device=44, host=20, disk=40)
    sessions = [stopped(world) for _ in range(3)]
    world.work()
    for session in sessions:
        world.ask(m.Evict(session_id=session))
    disk, dirty = world.state.residency.slots["disk"], world.state.residency.dirty
    for _ in range(6):
        stopped(world)
        assert not world.state.pressing
        assert disk.used == 0, "the disk was used below the mark"
    stopped(world)
    assert len(dirty) > 0.85 * 44
    assert world.state.pressing
    world.work()

    assert not world.state.pressing
    assert 0.5 * 44 < len(dirty) <= 0.75 * 44
    assert disk.used
    world.finish_checks()


# -- tiers below that are full ------------------------------------------------------------------


def below(world: World, session_id: str) -> tuple[int, int, int]:
    """Pages of a session on the device, the host and the disk."""
    found = world.state.residency.count(world.state.sessions[session_id].tables)
    return found["device"], found["host"], found["disk"]


@pytest.mark.parametrize("to", ["host", "disk"])
def test_an_eviction_takes_the_place_of_copies_that_others_do_not_need(to: str) -> None:
    """The host holds copies of what is on the device, and the disk is empty: an eviction was
    refused, or answered without anything having left."""
    world = tiers(device=4 * PAGES, host=PAGES + 1, disk=4 * PAGES)
    first, second, third = (stopped(world) for _ in range(3))
    world.work()
    assert below(world, first)[0] == PAGES and world.state.residency.slots["host"].used >= PAGES
    for session in (third, second):
        evict(world, session, to)
        assert below(world, session)[0] == 0
        assert below(world, session)[2 if to == "disk" else 1] or below(world, session)[2]
    assert device_pages(world, first) == PAGES
    for session in (first, second, third):
        world.run(session)
        assert world.session(session).status == "finished"
    world.finish_checks()


def test_evictions_one_after_the_other_all_leave_while_the_disk_has_room() -> None:
    world = tiers(device=8 * PAGES, host=PAGES + 2, disk=8 * PAGES)
    sessions = []
    for _ in range(7):
        sessions.append(stopped(world))
        evict(world, sessions[-1])
        assert below(world, sessions[-1])[0] == 0
    for session in sessions:
        world.run(session)
        assert world.session(session).status == "finished"
    world.finish_checks()


def test_without_a_disk_an_eviction_has_others_give_up_copies_and_they_go_on() -> None:
    world = tiers(device=3 * PAGES, host=PAGES)
    first, second = stopped(world), stopped(world)
    world.work()
    evict(world, second)

    assert below(world, second) == (0, PAGES, 0)
    assert below(world, first) == (PAGES, 0, 0) and len(world.state.residency.dirty) == PAGES
    with pytest.raises(OutOfPages, match=r"6 pages .* go down, and 0 fit there"):
        world.ask(m.Evict(session_id=first))
    world.run(first)
    world.run(second)
    world.finish_checks()


def test_an_eviction_to_a_full_disk_is_refused_with_numbers() -> None:
    world = tiers(device=3 * PAGES, host=2 * PAGES, disk=PAGES + 2)
    first, second = stopped(world), stopped(world)
    evict(world, first, "disk")
    with pytest.raises(OutOfPages, match=r"6 pages .* and 2 fit there.*--disk-memory") as caught:
        world.ask(m.Evict(session_id=second, to="disk"))

    assert (caught.value.details["needed"], caught.value.details["free"]) == (PAGES, 2)
    assert device_pages(world, second) == PAGES


@pytest.mark.parametrize("copied", [True, False])
def test_a_restoration_has_others_at_rest_leave_even_if_they_are_to_be_copied_first(
    copied: bool,
) -> None:
    limits = Limits(copies_from_ticks=True, high_mark=1.0)
    world = tiers(device=2 * PAGES, host=3 * PAGES, limits=limits)
    first = stopped(world)
    evict(world, first)
    others = [stopped(world) for _ in range(2)]
    if copied:
        wait(world, 0.5)
        world.work()
    request = world.send(m.Restore(session_id=first))
    assert bool(world.engine.copies) and not world.replies.get(request)
    world.work()

    assert world.answer_to(request).session.device_pages == PAGES
    assert sum(device_pages(world, other) for other in others) == PAGES
    assert any("room for" in text for other in others for text in texts(world, other))
    for session in (first, *others):
        world.run(session)
    world.finish_checks()


def test_two_restorations_at_once_do_not_send_each_other_away() -> None:
    limits = Limits(copies_from_ticks=True, high_mark=1.0)
    world = tiers(device=2 * PAGES, host=4 * PAGES, limits=limits)
    away = [stopped(world) for _ in range(2)]
    for session in away:
        evict(world, session)
    others = [stopped(world) for _ in range(2)]
    requests = [world.send(m.Restore(session_id=session)) for session in away]
    world.work()
    assert [world.answer_to(one).session.device_pages for one in requests] == [PAGES] * 2
    assert [device_pages(world, other) for other in others] == [0, 0]
    request = world.send(m.Restore(session_id=others[0]))
    world.work()

    assert world.answer_to(request).session.device_pages == PAGES
    for session in (*away, *others):
        world.run(session)
    world.finish_checks()


def test_a_restoration_for_which_others_cannot_leave_is_refused_and_nothing_moves() -> None:
    limits = Limits(copies_from_ticks=True, high_mark=1.0)
    world = tiers(device=2 * PAGES, host=PAGES + 2, limits=limits)
    first = stopped(world)
    evict(world, first)
    others = [stopped(world) for _ in range(2)]
    before = [below(world, session) for session in (first, *others)]
    with pytest.raises(OutOfPages, match="too few others can leave it"):
        world.ask(m.Restore(session_id=first))

    assert not world.engine.copies
    assert [below(world, session) for session in (first, *others)] == before
    world.finish_checks()


@pytest.mark.parametrize("asked", [True, False])
def test_pages_come_up_through_a_host_that_is_full(asked: bool) -> None:
    """A restoration, or a hint, of a session on the disk, while the host is full of copies."""
    world = tiers(device=4 * PAGES, host=PAGES + 1, disk=2 * PAGES)
    first = stopped(world)
    evict(world, first, "disk")
    others = [stopped(world) for _ in range(2)]
    world.work()
    assert below(world, first) == (0, 0, PAGES)
    assert world.state.residency.slots["host"].used >= PAGES
    if asked:
        request = world.send(m.Restore(session_id=first))
        world.work()
        assert world.answer_to(request).session.device_pages == PAGES
    else:
        world.ask(m.Hint(session_id=first, resume_in_s=0.0))
        world.work()
    assert below(world, first) == (PAGES, PAGES, PAGES), "it gave up copies of its own"
    for session in (first, *others):
        world.run(session)
    world.finish_checks()


def test_an_idle_session_that_does_not_fit_below_leaves_once_there_is_room() -> None:
    limits = Limits(idle_after_s=30.0)
    world = tiers(device=3 * PAGES, host=PAGES, limits=limits)
    first, second = stopped(world), stopped(world)
    world.work()
    wait(world, 31.0)
    world.work()
    assert (device_pages(world, first), device_pages(world, second)) == (0, PAGES)
    looked = list[int]()
    room_to_leave = world.state.room_to_leave
    world.state.room_to_leave = lambda *given, **more: (
        looked.append(1) or room_to_leave(*given, **more)
    )
    for _ in range(3):
        wait(world, 1.0)
    assert not looked, "nothing has moved"
    story = world.state.story(second)
    assert sum("do not fit below" in line for line in story) == 1, story
    world.ask(m.Terminate(session_id=first))
    world.work()
    wait(world, 1.0)
    world.work()

    assert below(world, second) == (0, PAGES, 0)
    assert "left alone for" in texts(world, second)[-1]
    world.run(second)
    world.finish_checks()


def test_idle_sessions_go_on_to_the_disk_when_the_host_is_full_of_copies() -> None:
    limits = Limits(idle_after_s=30.0)
    world = tiers(device=6 * PAGES, host=2 * PAGES, disk=6 * PAGES, limits=limits)
    sessions = [stopped(world) for _ in range(5)]
    world.work()
    for _ in range(12):
        wait(world, 10.0)
        world.work()

    assert [device_pages(world, session) for session in sessions] == [0] * 5
    for session in sessions:
        world.run(session)
    world.finish_checks()


@pytest.mark.parametrize("asked", [True, False])
def test_copies_of_a_pinned_session_make_room_below_and_it_stays(asked: bool) -> None:
    world = tiers(
        device=3 * PAGES, host=PAGES + 1, disk=4 * PAGES, limits=Limits(idle_after_s=30.0)
    )
    pinned = stopped(world)
    world.ask(m.Pin(session_id=pinned))
    world.work()
    other = stopped(world)
    world.work()
    assert below(world, pinned)[:2] == (PAGES, PAGES)
    if asked:
        evict(world, other)
    for _ in range(4):
        wait(world, 31.0)
        world.work()

    assert device_pages(world, other) == 0 and device_pages(world, pinned) == PAGES
    assert asked or sum(" idle " in line for line in world.state.story(other)) == 1
    for session in (other, pinned):
        world.run(session)
    world.finish_checks()


@pytest.mark.parametrize(
    ("tier", "flag"),
    [("device", "--kv-memory"), ("host", "--host-memory"), ("disk", "--disk-memory")],
)
def test_what_cannot_move_on_names_the_flag_of_the_tier_that_is_full(tier: Any, flag: str) -> None:
    world = tiers(device=3 * PAGES, host=PAGES, disk=PAGES)
    session = world.state.sessions[stopped(world)]
    world.work()
    with pytest.raises(OutOfPages, match=f"2 pages .* cannot go to the {tier}.*{flag}"):
        world.state._require_under_way(session, tier, [1, 2])


# -- what time does -----------------------------------------------------------------------------


def test_an_idle_session_leaves_and_its_event_says_why() -> None:
    world = tiers(device=2 * PAGES, host=2 * PAGES, limits=Limits(idle_after_s=30.0))
    session = stopped(world)
    world.work()
    wait(world, 29.0)
    assert device_pages(world, session) == PAGES
    wait(world, 2.0)

    assert device_pages(world, session) == 0
    assert texts(world, session) == ["6 pages left the device, copied before: left alone for 31 s"]


def test_without_the_policy_an_idle_session_stays() -> None:
    world = tiers(device=2 * PAGES, host=2 * PAGES, limits=Limits(idle_after_s=None))
    session = stopped(world)
    world.work()
    wait(world, 1e6)

    assert device_pages(world, session) == PAGES


def test_a_hint_brings_pages_back_in_time_from_those_expected_later() -> None:
    world = tiers(device=PAGES, host=3 * PAGES)
    hinted = stopped(world)
    world.ask(m.Hint(session_id=hinted, resume_in_s=20.0))
    world.work()
    other = stopped(world)
    world.work()
    assert device_pages(world, hinted) == 0
    wait(world, 18.0)
    assert device_pages(world, hinted) == 0
    wait(world, 1.0)
    world.work()

    assert device_pages(world, hinted) == PAGES
    assert "its hint says" in texts(world, hinted)[-1]
    assert device_pages(world, other) == 0


# -- budgets ------------------------------------------------------------------------------------


def budgets(world: World, **pages: int) -> tuple[m.Budget, ...]:
    """Set how many pages each of these tiers may hold."""
    sizes = {tier: count * PAGE for tier, count in pages.items()}
    return world.ask(m.SetBudget(**sizes)).budgets


def budget(world: World, tier: str, pages: int) -> m.Budget:
    (found,) = budgets(world, **{tier: pages})
    return found


def limits_of(world: World) -> dict[str, int]:
    return {tier: slots.capacity for tier, slots in world.state.residency.slots.items()}


def test_a_lowered_budget_has_pages_leave_and_a_raised_one_takes_them_again() -> None:
    world = tiers(device=3 * PAGES, host=3 * PAGES)
    sessions = [stopped(world) for _ in range(3)]
    reply = budget(world, "device", PAGES)
    assert (reply.nbytes, reply.allocated) == (PAGES * PAGE, 3 * PAGES * PAGE)
    world.work()

    assert world.state.residency.slots["device"].used <= PAGES
    for session in sessions:
        world.run(session)
        assert world.session(session).status == "finished"
        assert world.state.residency.slots["device"].used <= PAGES
    budget(world, "device", 3 * PAGES)
    assert world.state.residency.free("device") >= 2 * PAGES
    world.finish_checks()


def test_a_host_budget_moves_pages_on_to_the_disk() -> None:
    world = tiers(device=2 * PAGES, host=2 * PAGES, disk=2 * PAGES)
    session = stopped(world)
    world.work()
    world.ask(m.Evict(session_id=session))
    budget(world, "host", 2)
    world.work()

    assert world.state.residency.slots["host"].used <= 2
    with pytest.raises(OutOfPages, match="would have to leave the disk"):
        budget(world, "disk", 0)
    budget(world, "host", 2 * PAGES)
    world.run(session)
    assert world.session(session).status == "finished"
    world.finish_checks()


def test_a_budget_that_cannot_be_kept_is_refused_with_numbers() -> None:
    world = tiers(device=2 * PAGES, host=2)
    session = stopped(world)
    world.work()
    with pytest.raises(BadArgument, match=f"give 3,000 to {2 * PAGES},000 bytes"):
        budget(world, "device", 2 * PAGES + 1)
    with pytest.raises(BadArgument, match="--host-memory"):
        budget(world, "host", 3)
    with pytest.raises(OutOfPages) as caught:
        budget(world, "device", 3)

    assert caught.value.details["needed"] == 3
    assert caught.value.details["free"] == 2
    assert device_pages(world, session) == PAGES
    with pytest.raises(NotSupported, match="2 owners"):
        budget(tiers(device=PAGES, limits=Limits(owners=2)), "device", 3)


# -- many agents --------------------------------------------------------------------------------


class Counting(World):
    """Counts how often each page crosses the border of the device."""

    crossings: Counter[int]

    def _carry_out(self, instruction: Any) -> None:
        if isinstance(instruction, CopyPages) and "device" in instruction.way:
            for page in self.state.copying[instruction.ticket].moves.pages:
                self.crossings[page] += 1
        super()._carry_out(instruction)


@pytest.mark.parametrize("hints", [False, True])
def test_eighty_agents_that_think(hints: bool) -> None:
    """Each acts, thinks for some seconds and acts again, on a device for a quarter of them."""
    agents, acts, any_ = 80, 4, random.Random(7)
    limits = Limits(sessions_per_owner=agents, idle_after_s=30.0)
    world = tiers(device=120, host=200, disk=500, limits=limits, kind=Counting)
    world.crossings = Counter()
    world.draw = lambda position: position % 40
    due: list[tuple[float, int, str]] = []
    for number in range(agents):
        heapq.heappush(due, (any_.uniform(0, 60), number, world.launch(max_new_tokens=acts)))
    acted = Counter[str]()
    while due:
        at, number, session_id = heapq.heappop(due)
        while world.now + 1.0 < at:
            wait(world, 1.0)
            world.work()
        world.now = max(world.now, at)
        session = world.state.sessions[session_id]
        mine = {page for table in session.tables for page in table}
        # down once after it was written, and up once
        assert all(world.crossings.pop(page, 0) <= 2 for page in mine), session_id
        world.run(session_id, m.RunTo, location="logits")
        acted[session_id] += 1
        slots = world.state.residency.slots["device"]
        assert slots.used <= slots.capacity
        assert session.status == "stopped", (session.error.message, world.now, sum(acted.values()))
        think = any_.choice([2.0, 10.0, 45.0, 120.0]) * any_.uniform(0.5, 1.5)
        if hints:
            world.ask(m.Hint(session_id=session_id, resume_in_s=think))
        if acted[session_id] < acts:
            heapq.heappush(due, (world.now + think, number, session_id))

    assert min(acted.values()) == acts
    assert len(acted) == agents
    assert world.state.residency.num_absent > 100, "everything fitted: nothing was tested"
    for session_id in list(acted):
        world.run(session_id)
        end = world.session(session_id)
        assert end.status == "finished"
        assert end.tokens[6:] == tuple(position % 40 for position in range(6, 6 + acts))
    world.finish_checks()


# -- an exchange --------------------------------------------------------------------------------


def all_stopped(world: World, count: int) -> list[str]:
    """Sessions of six pages each, stopped one after the other, all copies made."""
    found = []
    for _ in range(count):
        found.append(stopped(world))
        world.work()
        assert world.session(found[-1]).status == "stopped"
    return found


def test_pages_change_places_through_one_spare_slot() -> None:
    """Device and host are full but for one slot: the room that is there is enough."""
    world = tiers(device=PAGES, host=PAGES + 1)
    first, second = all_stopped(world, 2)
    assert device_pages(world, first) == 0 and device_pages(world, second) == PAGES
    world.run(first)

    assert world.session(first).status == "finished"
    assert device_pages(world, second) == 0
    told = [text for text in texts(world, second) if "left the device" in text]
    assert told and all("room for session" in text for text in told)
    world.run(second)
    assert world.session(second).status == "finished"
    world.finish_checks()


def test_without_a_spare_slot_the_exchange_is_refused_and_nothing_moves() -> None:
    world = tiers(device=PAGES, host=PAGES)
    first, second = all_stopped(world, 2)
    before = {p: world.state.residency.place(p) for p in _all_pages(world)}
    world.run(first)

    session = world.session(first)
    assert session.status == "waiting" and session.error is not None
    assert session.error.code == "OutOfPages" and "0 of 6 can leave" in session.error.message
    now = {p: world.state.residency.place(p) for p in _all_pages(world)}
    assert now == before and not world.engine.copies
    world.ask(m.Terminate(session_id=second))
    world.run(first)
    assert world.session(first).status == "finished"
    world.finish_checks()


def _all_pages(world: World) -> list[int]:
    return sorted(world.state.residency.pages())


@pytest.mark.parametrize("disk", [0, 1, 4, 2 * PAGES])
@pytest.mark.parametrize("spare", [1, 2, 5])
def test_whatever_fits_goes_on_in_any_order(disk: int, spare: int) -> None:
    """Three sessions in tiers that hold their pages and a few slots more: each gets its turn.

    With a disk one more slot of the host is kept for what passes through it.
    """
    host = 2 * PAGES + spare - min(disk, PAGES) + (disk > 0)
    world = tiers(device=PAGES, host=host, disk=disk)
    world.draw = lambda position: position % 40
    sessions = [stopped_late(world) for _ in range(3)]
    any_ = random.Random(spare)
    for _ in range(12):
        session_id = any_.choice(sessions)
        session = world.session(session_id)
        if session.status != "finished":
            world.run(session_id, m.Next)
            session = world.session(session_id)
            assert session.error is None and (session.stop is None or session.stop.error is None)
    for session_id in sessions:
        if world.session(session_id).status != "finished":
            world.run(session_id)
        assert world.session(session_id).status == "finished"
    world.finish_checks()


def stopped_late(world: World) -> str:
    """One that takes no new page on its way to its end."""
    session_id = stopped(world, max_new_tokens=3)
    world.work()
    return session_id


def test_two_that_want_to_run_take_turns_at_an_exchange() -> None:
    world = tiers(device=PAGES, host=2 * PAGES + 1)
    sessions = all_stopped(world, 3)
    for session_id in sessions:
        world.go(session_id)
    world.work()

    assert [world.session(s).status for s in sessions] == ["finished"] * 3
    world.finish_checks()


def test_an_exchange_whose_session_is_ended_lets_the_others_go_on() -> None:
    world = tiers(device=PAGES, host=2 * PAGES + 1)
    first, second, third = all_stopped(world, 3)
    world.go(first)
    world.done()  # the token of the forward it stood in
    assert world.state.exchange == first and world.engine.stretch is None
    world.go(second)
    world.ask(m.Terminate(session_id=first))
    world.work()

    assert world.session(second).status == "finished" and world.state.exchange is None
    world.run(third)
    assert world.session(third).status == "finished"
    world.finish_checks()


def test_an_exchange_never_takes_a_pinned_session() -> None:
    world = tiers(device=2 * PAGES, host=PAGES + 1)
    first, second, third = all_stopped(world, 3)
    resident = next(s for s in (third, second, first) if device_pages(world, s) == PAGES)
    world.ask(m.Pin(session_id=resident))
    for session_id in {first, second, third} - {resident}:
        world.run(session_id)
        assert world.session(session_id).status == "finished"
        assert device_pages(world, resident) == PAGES
    world.finish_checks()


def test_agents_go_on_while_all_tiers_are_nearly_full() -> None:
    """Twenty sessions that act by turns, with three slots more than their pages."""
    count, any_ = 20, random.Random(3)
    limits = Limits(sessions_per_owner=count, idle_after_s=None)
    pages = count * PAGES
    world = tiers(device=3 * PAGES, host=pages // 2, disk=pages // 2 + 3 - 3 * PAGES, limits=limits)
    sessions = [stopped_late(world) for _ in range(count)]
    for _ in range(60):
        session_id = any_.choice(sessions)
        if world.session(session_id).status == "finished":
            continue
        session = world.run(session_id, m.Next)
        assert session.error is None and (session.stop is None or session.stop.error is None)
    for session_id in sessions:
        world.run(session_id)
        assert world.session(session_id).status == "finished"
    world.finish_checks()


def test_of_several_budgets_none_changes_where_one_is_refused() -> None:
    world = tiers(device=2 * PAGES, host=2 * PAGES, disk=PAGES)
    before = limits_of(world)
    with pytest.raises(BadArgument, match="for the host holds 13 pages"):
        budgets(world, device=PAGES, host=2 * PAGES + 1)
    with pytest.raises(BadArgument, match="for the disk holds -1 pages"):
        budgets(world, device=PAGES, host=0, disk=-1)
    with pytest.raises(BadArgument, match="name a tier"):
        budgets(world)

    assert limits_of(world) == before
    found = budgets(world, disk=0, device=PAGES)
    assert [(one.tier, one.nbytes) for one in found] == [("device", PAGES * PAGE), ("disk", 0)]
    assert limits_of(world) == {"device": PAGES, "host": 2 * PAGES, "disk": 0}
    world.finish_checks()


def test_room_that_one_budget_takes_is_none_for_another() -> None:
    """Each alone could be kept: the device by its copies on the host, the host by the device."""
    world = tiers(device=2 * PAGES, host=2 * PAGES)
    session = stopped(world)
    world.work()
    before = limits_of(world)
    with pytest.raises(OutOfPages, match=r"4 pages would have to leave the host .*, and 3 can"):
        budgets(world, device=3, host=2)

    assert limits_of(world) == before
    assert device_pages(world, session) == PAGES
    budgets(world, device=3, host=3)
    world.work()
    used = {tier: slots.used for tier, slots in world.state.residency.slots.items()}
    assert used == {"device": 3, "host": 3, "disk": 0}
    world.finish_checks()


def test_a_page_in_two_tiers_leaves_one_of_them_only() -> None:
    world = tiers(device=2 * PAGES, host=2 * PAGES, disk=2 * PAGES)
    session = stopped(world)
    world.work()
    for request in (m.Evict(session_id=session, to="disk"), m.Restore(session_id=session)):
        world.send(request)
        world.work()
    world.ask(m.Evict(session_id=session))
    world.work()
    residency = world.state.residency
    assert residency.pages_in["host"] == residency.pages_in["disk"] != set()
    assert not residency.pages_in["device"]
    before = limits_of(world)
    with pytest.raises(OutOfPages, match="would have to leave the disk for a budget of 0"):
        budgets(world, host=0, disk=0)

    assert limits_of(world) == before
    world.run(session)
    assert world.session(session).status == "finished"
    world.finish_checks()


def test_what_a_lowered_budget_refuses_names_the_budget() -> None:
    world = tiers(device=2 * PAGES, host=PAGES)
    with pytest.raises(PromptTooLong, match=r"the whole pool has 12: .* more --kv-memory$"):
        world.launch((1,) * 10, max_new_tokens=8)
    budgets(world, device=PAGES, host=1)
    with pytest.raises(
        PromptTooLong, match=r"need 9 .* device may hold 6 of 12: .*\(device=\.\.\.\)$"
    ):
        world.launch((1,) * 5, max_new_tokens=5)
    with pytest.raises(PromptTooLong, match=r"more --kv-memory$"):
        world.launch((1,) * 10, max_new_tokens=8)
    first = stopped(world)
    world.ask(m.Pin(session_id=first))
    second = world.launch(max_new_tokens=2)
    world.go(second)
    world.work()

    error = world.session(second).error
    assert error is not None
    assert error.message.endswith("server.set_budget(device=..., host=...)")
    with pytest.raises(OutOfPages, match=r"server\.set_budget\(host=\.\.\.\)"):
        world.ask(m.Pin(session_id=first, pinned=False))
        world.ask(m.Evict(session_id=first))
