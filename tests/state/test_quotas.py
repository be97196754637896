"""Quotas: one owner at a limit is refused with the numbers, and the other goes on unharmed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import OutOfPages, QuotaExceeded
from kernel_server.state.pages import PagePool
from kernel_server.state.quotas import OwnerBytes
from tests.state.world import SHAPE, Limits, World, snapshot

#: Pages that a whole forward over the prompt of six tokens takes: two in each of three groups.
FORWARD = 6
ADA, BOB = "ada", "bob"


@pytest.fixture
def limited() -> Callable[..., World]:
    def make(**limits: Any) -> World:
        return World(limits=Limits(**limits))

    return make


def pages(count: int) -> int:
    return count * SHAPE.page_bytes


def test_pages_count_for_their_tenant_once_however_many_tables_name_them():
    pool = PagePool(num_pages=6, per_tenant=3)
    taken = pool.allocate(3, ADA)
    pool.retain(taken)

    assert (pool.held(ADA), pool.held(BOB)) == (3, 0)
    with pytest.raises(QuotaExceeded, match="needs 1 pages, and you hold 3 of the 3"):
        pool.allocate(1, ADA)
    assert pool.allocate(3, BOB)
    pool.release(taken)
    assert pool.held(ADA) == 3
    pool.release(taken)
    assert pool.held(ADA) == 0


def test_an_owner_at_the_limit_of_pages_is_refused_and_the_other_runs(limited):
    world = limited(kv_bytes_per_owner=pages(FORWARD))
    first, second = world.launch(max_new_tokens=1), world.launch(max_new_tokens=1)
    world.run(first, m.StepOut)
    before = snapshot(world.state)

    with pytest.raises(QuotaExceeded, match=f"you hold {FORWARD} of the {FORWARD}.*terminate"):
        world.go(second, m.StepOut)
    assert snapshot(world.state) == before
    theirs = world.launch(owner=BOB, max_new_tokens=1)
    assert world.run(theirs, m.StepOut).num_pages == FORWARD
    world.ask(m.Terminate(session_id=first))
    assert world.run(second, m.StepOut).num_pages == FORWARD


def test_a_run_that_grows_beyond_the_limit_rests_and_goes_on_when_there_is_room(limited):
    world = limited(kv_bytes_per_owner=pages(FORWARD + 3))
    sid = world.launch(max_new_tokens=4)  # the ninth token begins a third page in each group
    small = world.launch([1], max_new_tokens=1)
    world.run(small, m.StepOut)
    rests = world.run(sid, m.Continue)

    assert (rests.status, rests.error.code) == ("waiting", "QuotaExceeded")
    assert rests.error.details == {"needed": 3, "have": FORWARD + 3, "limit": FORWARD + 3}
    world.ask(m.Terminate(session_id=small))
    assert world.run(sid, m.Continue).status == "finished"


def test_a_launch_that_could_never_fit_the_share_is_refused_at_once(limited):
    world = limited(kv_bytes_per_owner=pages(FORWARD))
    before = snapshot(world.state)

    with pytest.raises(QuotaExceeded, match="need 9 pages, one owner may have 6"):
        world.launch(max_new_tokens=4)
    assert snapshot(world.state) == before


def test_without_a_limit_one_owner_may_fill_the_pool(limited):
    world = limited()

    with pytest.raises(OutOfPages):
        for _ in range(SHAPE.num_pages):
            world.run(world.launch(max_new_tokens=1), m.StepOut)
    assert world.state.pool.held(ADA) == SHAPE.num_pages


def test_sessions_are_counted_for_each_owner_alone(limited):
    world = limited(sessions_per_owner=2)
    first = world.launch()
    world.ask(m.Fork(session_id=first))

    for refused in (world.launch, lambda: world.ask(m.Fork(session_id=first))):
        with pytest.raises(QuotaExceeded, match="you have 2 sessions, the limit is 2: terminate"):
            refused()
    assert world.launch(owner=BOB)


def test_the_values_of_edits_are_counted_and_a_fork_shares_them(limited):
    vector = np.ones(SHAPE.hidden_size, np.float32)
    world = limited(edit_bytes_per_owner=2 * vector.nbytes)

    def edit(sid: str, owner: str = ADA) -> Any:
        value = Array("float32", vector.shape, vector.tobytes())
        spec = m.EditSpec(kind="add", location="layers.4.output", value=value, sticky=True)
        return world.ask(m.AddEdit(session_id=sid, seen=0, edit=spec), owner)

    sid = world.launch()
    edit(sid)
    fork = world.ask(m.Fork(session_id=sid)).session.id
    edit(fork)
    before = snapshot(world.state)

    with pytest.raises(QuotaExceeded, match="32 bytes of edits do not fit: you hold 64 bytes"):
        edit(sid)
    assert snapshot(world.state) == before
    assert edit(world.launch(owner=BOB), BOB)
    world.ask(m.Terminate(session_id=fork))
    assert edit(sid)


def test_bytes_of_one_owner_are_refused_whole_and_the_others_keep_theirs():
    held = OwnerBytes("captures", 100, "remove a capture")
    held.take(ADA, 60)

    with pytest.raises(QuotaExceeded) as refused:
        held.take(ADA, 41)
    assert str(refused.value) == (
        "41 bytes of captures do not fit: you hold 60 bytes, the limit of one owner is 100 bytes;"
        " remove a capture"
    )
    assert refused.value.details == {"needed": 41, "have": 60, "limit": 100}
    assert held.held(ADA) == 60
    held.take(ADA, 40)
    held.take(BOB, 100)
    held.give_back(ADA, 100)
    held.take(ADA, 100)


def test_giving_back_more_than_was_taken_is_a_fault():
    held = OwnerBytes("captures", None, "")
    held.take(ADA, 1 << 60)

    with pytest.raises(AssertionError, match="gives back more"):
        held.give_back(ADA, (1 << 60) + 1)
