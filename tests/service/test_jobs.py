"""The requests of one owner at a time: counted, bounded, and nobody else's business."""

from __future__ import annotations

import contextlib

import pytest

from kernel_server.jobs import Jobs
from kernel_server.protocol.errors import QuotaExceeded


def test_one_too_many_is_refused_and_the_other_owner_is_not() -> None:
    jobs = Jobs(limit=2)
    with contextlib.ExitStack() as running:
        running.enter_context(jobs.one("ann"))
        running.enter_context(jobs.one("ann"))

        with (
            pytest.raises(
                QuotaExceeded, match=r"2 of your requests wait.* limit of one owner is 2"
            ),
            jobs.one("ann"),
        ):
            pass
        with jobs.one("bob"):
            assert (jobs.running("ann"), jobs.running("bob")) == (2, 1)
    with jobs.one("ann"):
        assert (jobs.running("ann"), jobs.running("bob")) == (1, 0)


def test_a_failed_job_gives_its_place_back() -> None:
    jobs = Jobs(limit=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), jobs.one("ann"):
            raise ZeroDivisionError

    assert jobs.running("ann") == 0


def test_interpreter_and_engine_are_taken_one_at_a_time_by_each_owner() -> None:
    jobs = Jobs()

    for lock in (jobs.gate, jobs.turn):
        assert lock("ann") is lock("ann")
        assert lock("ann") is not lock("bob")
    assert jobs.gate("ann") is not jobs.turn("ann")


def test_what_goes_on_beside_the_engine_has_a_turn_of_its_own() -> None:
    jobs = Jobs()

    assert jobs.turn("ann", "pages that leave") is jobs.turn("ann", "pages that leave")
    assert jobs.turn("ann", "pages that leave") is not jobs.turn("ann", "pages that come")
    assert jobs.turn("ann", "pages that leave") is not jobs.turn("ann")
