"""Pages on their way: what leaves, what comes back, and the faults that others had."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from typing import Any

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import OutOfPages
from kernel_server.state import paging
from kernel_server.state.copies import RUN
from kernel_server.state.instructions import CopyPages
from kernel_server.state.leaving import DECODES_BETWEEN
from kernel_server.state.server_state import Limits
from tests.state.tier_world import (
    PAGES,
    device_pages,
    evict,
    pages_of,
    stopped,
    texts,
    tiers,
    wait,
)
from tests.state.world import SHAPE, World

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
