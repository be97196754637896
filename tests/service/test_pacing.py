"""Who has to wait for their turn, judged with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kernel_server.pacing import DEBT_S, LONGEST_S, RUN_SHARE, SHARE, Pacer

BURST_S = 0.2


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pacer(clock: Clock) -> Pacer:
    return Pacer(burst_s=BURST_S, active_s=1.0, clock=clock)


def call(pacer: Pacer, owner: str, used_s: float = 0.0) -> None:
    pacer.end(owner, pacer.begin(owner), used_s)


def test_an_owner_who_is_alone_never_waits(pacer: Pacer) -> None:
    for _ in range(100):
        call(pacer, "ann", 1.0)

    assert pacer.wait_s("ann") == 0


def test_of_two_the_one_who_used_much_waits_and_the_other_does_not(pacer: Pacer) -> None:
    call(pacer, "bob")
    call(pacer, "ann", 0.1)
    assert pacer.wait_s("ann") == 0  # within what may be used at once
    call(pacer, "ann", 10.0)

    assert pacer.wait_s("ann") > 0
    assert pacer.wait_s("bob") == 0


def test_the_wait_ends_when_the_others_are_gone(pacer: Pacer, clock: Clock) -> None:
    call(pacer, "bob")
    call(pacer, "ann", 10.0)
    assert pacer.wait_s("ann") > 0
    clock.now += 1.1

    assert pacer.wait_s("ann") == 0


@pytest.mark.parametrize("others", [1, 2, 5])
def test_a_flood_gets_a_share_of_the_time(pacer: Pacer, clock: Clock, others: int) -> None:
    cost_s, calls = 0.001, 0
    until = clock.now + 30
    while clock.now < until:
        for other in range(others):
            call(pacer, f"other {other}")
        if (wait_s := pacer.wait_s("flood")) > 0:
            clock.now += wait_s
        else:
            call(pacer, "flood", cost_s)
            clock.now += cost_s
            calls += 1

    share = (calls * cost_s - BURST_S) / 30
    assert share == pytest.approx(SHARE, rel=0.05)


def test_two_who_use_as_much_as_each_other_are_not_held(pacer: Pacer, clock: Clock) -> None:
    for _ in range(10_000):
        for owner in ("ann", "bob"):
            assert pacer.wait_s(owner) == 0
            call(pacer, owner, 0.001)
            clock.now += 0.001


def test_beside_a_flood_one_who_uses_much_is_not_held(pacer: Pacer, clock: Clock) -> None:
    held = 0
    for _ in range(10_000):
        assert pacer.wait_s("busy") == 0
        call(pacer, "busy", 0.0005)
        if pacer.wait_s("flood") > 0:
            held += 1
        else:
            call(pacer, "flood", 0.001)
        clock.now += 0.001

    assert held > 4000


def test_two_floods_do_not_hide_each_other(pacer: Pacer, clock: Clock) -> None:
    begun = 0
    for _ in range(30_000):
        call(pacer, "honest")
        for owner in ("one flood", "another"):
            if pacer.wait_s(owner) == 0:
                call(pacer, owner, 0.001)
                begun += 1
        clock.now += 0.001

    assert begun * 0.001 / 30 < 2.2 * SHARE


def test_calls_at_once_do_not_slip_through_before_the_first_is_counted(pacer: Pacer) -> None:
    call(pacer, "bob")
    for _ in range(200):
        call(pacer, "ann", 0.0005)  # their mean cost is known now
    begun = 0
    while pacer.wait_s("ann") == 0:
        pacer.begin("ann")  # and none of them ends
        begun += 1
        assert begun < 1000

    assert begun <= BURST_S / 0.0005


def test_time_the_engine_spends_counts_too(pacer: Pacer) -> None:
    call(pacer, "bob")
    call(pacer, "ann")
    pacer.spend("ann", 5.0)

    assert pacer.wait_s("ann") > 0


def swap_beside(
    pacer: Pacer, clock: Clock, seconds: float, *owners: str, used_s: float = 0.002
) -> dict[str, float]:
    """How much each owner is let use who swaps without a pause while ann's session runs.

    Half of what a swap uses is the copies', told after the call.
    """
    used = dict.fromkeys(owners, 0.0)
    pacer.runs("ann")
    until = clock.now + seconds
    while clock.now < until:
        waits = {owner: pacer.wait_s(owner) for owner in owners}
        for owner in owners:
            if waits[owner] == 0:
                call(pacer, owner, used_s / 2)
                pacer.take(owner, used_s / 2)
                used[owner] += used_s
                clock.now += used_s
        if all(waits.values()):
            clock.now += min(waits.values())
    return used


def test_who_swaps_beside_anothers_run_gets_a_small_share(pacer: Pacer, clock: Clock) -> None:
    used = swap_beside(pacer, clock, 60, "bob")

    assert (used["bob"] - BURST_S) / 60 == pytest.approx(RUN_SHARE, rel=0.05)


@pytest.mark.parametrize("others", [2, 5])
def test_all_who_swap_beside_a_run_have_that_share_together(
    pacer: Pacer, clock: Clock, others: int
) -> None:
    used = swap_beside(pacer, clock, 120, *(f"other {n}" for n in range(others)))

    shares = [(each - BURST_S) / 120 for each in used.values()]
    assert sum(shares) == pytest.approx(RUN_SHARE, rel=0.1)
    assert min(shares) > 0.8 * max(shares)


def test_control_who_swaps_while_nobody_runs_is_not_held(pacer: Pacer, clock: Clock) -> None:
    pacer.runs("ann")
    pacer.runs(None)
    for _ in range(10_000):
        assert pacer.wait_s("bob") == 0
        call(pacer, "bob", 0.001)
        pacer.take("bob", 0.001)
        clock.now += 0.002
    pacer.runs("ann")

    assert pacer.wait_s("bob") == 0  # that was nobody's loss
    assert pacer.left_s("bob") < 0.001  # but he has had what may be had at once


@pytest.mark.parametrize("told", [call, Pacer.take])
def test_what_is_used_while_nobody_runs_cannot_be_had_at_once_later(
    pacer: Pacer, told: Callable[[Pacer, str, float], None]
) -> None:
    for _ in range(300):
        told(pacer, "bob", 0.001)
    assert pacer.left_s("bob") < 0.002 and pacer.left_s("eve") == BURST_S
    pacer.runs("ann")

    assert pacer.wait_s("bob") == 0


def test_many_short_runs_lose_no_more_than_a_long_one(pacer: Pacer, clock: Clock) -> None:
    used_s = 0.0
    for _ in range(100):
        used_s += swap_beside(pacer, clock, 0.3, "bob")["bob"]
        pacer.runs(None)
        for _ in range(100):  # and swaps on while nobody runs
            call(pacer, "bob", 0.002)
            clock.now += 0.003

    # a call that has begun when a run begins ends beside it
    assert used_s - BURST_S <= 100 * (0.3 * RUN_SHARE + 0.002)


def test_the_owner_of_the_run_is_not_held_for_it(pacer: Pacer, clock: Clock) -> None:
    used = swap_beside(pacer, clock, 10, "ann")
    assert used["ann"] == pytest.approx(10, rel=0.01)
    pacer.runs("bob")

    assert pacer.wait_s("ann") == 0  # nor was anything taken from anybody before


def test_one_swap_now_and_then_is_never_held(pacer: Pacer, clock: Clock) -> None:
    swap_beside(pacer, clock, 60, "bob")
    for _ in range(100):
        assert pacer.wait_s("eve") == 0
        call(pacer, "eve", 0.005)
        if pacer.wait_s("bob") == 0:
            call(pacer, "bob", 0.005)
        clock.now += 0.5


def test_once_the_run_has_ended_nobody_is_held_for_it(pacer: Pacer, clock: Clock) -> None:
    swap_beside(pacer, clock, 60, "bob")
    call(pacer, "bob", 0.1)
    assert pacer.wait_s("bob") > 0
    for runner in ("bob", None):
        pacer.runs(runner)
        assert pacer.wait_s("bob") == 0


def test_a_held_call_is_held_until_it_is_under_the_share_and_no_longer(
    pacer: Pacer, clock: Clock
) -> None:
    pacer.runs("ann")
    call(pacer, "bob", BURST_S + 0.01)
    waited_s = 0.0
    while (wait_s := pacer.wait_s("bob")) > 0:
        assert wait_s <= LONGEST_S
        clock.now += wait_s
        waited_s += wait_s

    assert waited_s == pytest.approx(0.01 / RUN_SHARE, rel=0.01)


def test_one_long_answer_does_not_lock_its_owner_out(pacer: Pacer, clock: Clock) -> None:
    pacer.runs("ann")
    pacer.take("bob", 60.0)
    clock.now += DEBT_S / RUN_SHARE

    assert pacer.wait_s("bob") == 0


def test_two_who_take_as_much_from_each_others_runs_are_not_held(
    pacer: Pacer, clock: Clock
) -> None:
    for _ in range(5_000):
        for runner, asks in (("ann", "bob"), ("bob", "ann")):
            pacer.runs(runner)
            assert pacer.wait_s(asks) == 0
            call(pacer, asks, 0.001)
            clock.now += 0.001


def test_calls_at_once_beside_a_run_are_counted_before_they_end(pacer: Pacer, clock: Clock) -> None:
    pacer.runs("ann")
    for _ in range(200):
        call(pacer, "bob", 0.0005)  # their mean cost is known now
        clock.now += 1.0
    begun = 0
    while pacer.wait_s("bob") == 0:
        pacer.begin("bob")  # and none of them ends
        begun += 1
        assert begun < 1000

    assert begun <= 1 + BURST_S / 0.0005
