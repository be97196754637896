"""Budgets of tiers, lowered and raised while the server runs."""

from __future__ import annotations

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, NotSupported, OutOfPages, PromptTooLong
from kernel_server.state.server_state import Limits
from tests.state.tier_world import (
    PAGE,
    PAGES,
    budget,
    budgets,
    device_pages,
    evict,
    stopped,
    tiers,
)
from tests.state.world import World


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


@pytest.mark.parametrize(("to", "closed"), [("host", "host"), ("disk", "disk"), ("disk", "host")])
def test_an_eviction_where_a_budget_is_0_names_the_budget(to: str, closed: str) -> None:
    world = tiers(device=2 * PAGES, host=2 * PAGES, disk=2 * PAGES)
    session = stopped(world)
    world.work()
    budgets(world, **{closed: 0})
    world.work()
    with pytest.raises(OutOfPages, match=rf"{closed} is 0.*set_budget\({closed}=\.\.\.\)"):
        world.ask(m.Evict(session_id=session, to=to))
    budgets(world, **{closed: 2 * PAGES})

    assert evict(world, session, to).session.device_pages == 0
    world.finish_checks()
