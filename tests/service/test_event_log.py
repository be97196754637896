"""Events in order, by sequence number, for their owner only; progress wakes seldom."""

from __future__ import annotations

import threading
import time

from kernel_server.event_log import PROGRESS_S, EventLog
from kernel_server.protocol.messages import Event


def _event(seq: int, kind: str = "changed") -> Event:
    return Event(seq=seq, kind=kind, session_id="s1")  # type: ignore[arg-type]


def test_a_poll_gets_what_came_after_in_order() -> None:
    log = EventLog()
    for seq in (1, 2, 3):
        log.append("ann", _event(seq))

    assert [e.seq for e in log.poll("ann", 1, 0).events] == [2, 3]
    assert log.poll("ann", 3, 0).events == ()
    assert log.poll("bob", 0, 0).events == ()
    assert log.last_seq("ann") == 3


def test_who_asks_for_events_that_are_gone_is_told() -> None:
    log = EventLog(kept=2)
    for seq in (1, 2, 3):
        log.append("ann", _event(seq))

    assert log.poll("ann", 0, 0).missed
    assert not log.poll("ann", 1, 0).missed


def test_a_waiting_poll_is_woken_by_the_next_event_and_by_the_end() -> None:
    log = EventLog()
    threading.Timer(0.05, log.append, ("ann", _event(1))).start()
    began = time.monotonic()
    found = log.poll("ann", 0, 10)
    threading.Timer(0.05, log.close).start()
    nothing = log.poll("ann", 1, 10)

    assert [e.seq for e in found.events] == [1]
    assert nothing.events == ()
    assert time.monotonic() - began < 5


def test_progress_wakes_seldom_and_goes_out_with_what_comes_next() -> None:
    log = EventLog()
    answers: list[list[int]] = []
    done = threading.Event()

    def follow() -> None:
        last = 0
        while not done.is_set():
            found = log.poll("ann", last, 10)
            answers.append([e.seq for e in found.events])
            last = found.last_seq
            if found.events and found.events[-1].kind == "stopped":
                done.set()

    follower = threading.Thread(target=follow)
    follower.start()
    began = time.monotonic()
    for seq in range(1, 60):
        log.append("ann", _event(seq, "progress"))
        time.sleep(0.002)
    log.append("ann", _event(60, "stopped"))
    took = time.monotonic() - began
    follower.join(10)

    assert done.is_set()
    assert [seq for answer in answers for seq in answer] == list(range(1, 61))
    # one waking per interval, one more answer for what came while that was on its way
    assert len(answers) <= 2 * (took / PROGRESS_S + 2)
