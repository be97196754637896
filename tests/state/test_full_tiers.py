"""Tiers that are full: what makes room, who waits for it, and what is refused."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import OutOfPages, PromptTooLong
from kernel_server.state.server_state import Limits
from tests.state.tier_world import (
    PAGES,
    all_stopped,
    below,
    device_pages,
    evict,
    stopped,
    texts,
    tiers,
    wait,
)
from tests.state.world import World, snapshot


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


def test_a_session_that_is_there_is_restored_although_another_waits_for_room() -> None:
    """It lacks nothing, and was refused for what the other one lacks."""
    limits = Limits(copies_from_ticks=True, high_mark=1.0)
    world = tiers(device=2 * PAGES, host=2 * PAGES, limits=limits)
    first = stopped(world)
    evict(world, first)
    others = [stopped(world) for _ in range(2)]
    request = world.send(m.Restore(session_id=first))
    assert world.engine.copies and request not in world.replies
    requests = [world.send(m.Restore(session_id=other)) for other in others]
    world.work()

    assert all(world.answer_to(one).session.device_pages == PAGES for one in requests)
    assert request in world.replies
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


def test_pages_of_sessions_that_run_or_come_stay_whoever_shares_them() -> None:
    """A fork at rest shares them: what leaves with it left for a restoration."""
    limits = Limits(copies_from_ticks=True, high_mark=1.0)
    world = tiers(device=16, host=40, limits=limits)
    away = stopped(world, prompt=(2,) * 9)
    evict(world, away)
    parent = stopped(world, prompt=(1,) * 9, max_new_tokens=5)
    fork = world.ask(m.Fork(session_id=parent)).session.id
    other = world.launch(prompt=(3,), max_new_tokens=6)
    wait(world, 0.5)
    world.work()
    world.go(other)
    world.go(fork)
    assert world.session(fork).status == "running", "it waits for the other one"
    before = below(world, fork)
    with pytest.raises(OutOfPages, match="too few others can leave it"):
        world.ask(m.Restore(session_id=away))

    assert below(world, fork) == before
    world.work()
    world.finish_checks()


def test_a_restoration_ends_where_a_run_takes_the_room_that_it_made() -> None:
    """The two took it by turns, for ever."""
    world = tiers(device=13, host=4, disk=6, limits=Limits(copies_from_ticks=True))
    sizes = [(9, 4), (3, 1), (5, 2), (9, 2), (14, 1)]
    first, *_, last = (
        world.launch(prompt=[i] * size, max_new_tokens=new) for i, (size, new) in enumerate(sizes)
    )
    world.go(first, m.RunTo, location="logits")
    world.go(last, m.RunTo, location="layers.3.output")
    world.done()
    world.land()
    world.land(max(world.engine.copies))
    request = world.send(m.Restore(session_id=first))
    world.work()

    with pytest.raises(OutOfPages, match=f"room for session {last}.*and 3 are absent"):
        world.answer_to(request)
    assert world.session(last).status == "stopped"
    world.finish_checks()


def launched(world: World, tokens: int, number: int = 1, at: str | None = None) -> str:
    """A session of so many equal tokens, on its way to a place; copies are not told of."""
    session = world.launch(prompt=(number,) * tokens, max_new_tokens=3)
    if at is not None:
        world.go(session, m.RunTo, location=at)
    return session


def test_a_restoration_gives_up_no_copies_of_its_own_for_the_room_of_others() -> None:
    """Its pages came up from the disk, and lost their copies on the host on the way, for ever."""
    world = tiers(device=6, host=4, disk=6, limits=Limits(copies_from_ticks=True))
    first, *others = (
        launched(world, tokens, number, at)
        for number, (tokens, at) in enumerate(
            [(3, "logits"), (3, "layers.3.output"), (6, "logits")]
        )
    )
    world.work()
    world.send(m.Restore(session_id=first))
    world.work()
    others.append(launched(world, 5, 3, "layers.1.output"))
    world.ask(m.SetBudget(device=3000))
    world.work()
    for session in (first, *others):
        request = world.send(m.Restore(session_id=session))
        world.work()
        assert request in world.replies
    world.finish_checks()


def test_copies_of_a_pinned_session_are_no_room_for_a_restoration() -> None:
    world = tiers(device=40, host=8, disk=30, limits=Limits(copies_from_ticks=True))
    pinned, waiting, third, last = (launched(world, tokens) for tokens in (30, 14, 5, 30))
    for session, at in ((pinned, "layers.3.output"), (third, "layers.3.output"), (last, "logits")):
        world.go(session, m.RunTo, location=at)
    world.work()
    world.ask(m.Pin(session_id=pinned))
    world.work()
    for session in (pinned, waiting, third):
        world.send(m.Restore(session_id=session))
        world.work()
    before = snapshot(world.state)
    with pytest.raises(OutOfPages, match="too few others can leave it"):
        world.ask(m.Restore(session_id=last))

    assert snapshot(world.state) == before
    world.finish_checks()


def test_what_passes_through_the_host_has_its_room_there_or_nothing_comes() -> None:
    """Pages of others took the slots that its own, which are on the disk, had to pass through."""
    world = tiers(device=30, host=30, disk=12, limits=Limits(copies_from_ticks=True))
    pinned, other = (launched(world, 30, number) for number in (1, 2))
    world.go(pinned, m.RunTo, location="logits")
    world.go(other, m.RunTo, location="layers.3.output")
    world.work()
    world.ask(m.Pin(session_id=pinned))
    world.work()
    before = below(world, pinned), below(world, other)
    assert below(world, pinned)[2], "some of its pages are on the disk"
    with pytest.raises(OutOfPages, match=r"10 pages of .* are to come"):
        world.ask(m.Restore(session_id=pinned))

    assert (below(world, pinned), below(world, other)) == before
    world.finish_checks()


def at_rest(chance: random.Random) -> tuple[World, list[str]]:
    """Sessions that have stopped, some pinned and some evicted, in tiers of some sizes or other."""
    most = chance.choice([9, 30])
    sizes = chance.randint(5, 13 + most), chance.randint(1, most), chance.choice([0, most, 6])
    world: World = tiers(*sizes, limits=Limits(copies_from_ticks=chance.random() < 0.8))
    found = []
    for number in range(chance.randint(2, 6)):
        with contextlib.suppress(OutOfPages, PromptTooLong):  # smaller than its prompt
            prompt = (number,) * chance.randint(1, most)
            place = chance.choice(["logits", "layers.1.output", "layers.3.output"])
            found.append(world.launch(prompt=prompt, max_new_tokens=3))
            world.go(found[-1], m.RunTo, location=place)
            world.work()
            if chance.random() < 0.3:
                world.ask(m.Pin(session_id=found[-1]))
            if chance.random() < 0.3:
                to = chance.choice(["host", "disk"])
                world.send(m.Evict(session_id=chance.choice(found), to=to))
                world.work()
    return world, [s for s in found if world.session(s).status == "stopped"]


@pytest.mark.parametrize("seed", range(8))
def test_a_restoration_beside_sessions_at_rest_is_carried_out_or_changes_nothing(seed: int) -> None:
    chance, refused = random.Random(seed), 0
    for _ in range(40):
        world, sessions = at_rest(chance)
        for session in (*sessions, *sessions):
            before = snapshot(world.state)
            request = world.send(m.Restore(session_id=session))
            if isinstance(world.replies.get(request), m.ErrorReply):
                refused += 1
                assert snapshot(world.state) == before
                continue
            world.work()
            assert below(world, session)[0] == world.answer_to(request).session.num_pages
        world.finish_checks()
    assert refused


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
