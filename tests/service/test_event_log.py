"""Events in order, by sequence number, for their owner only; what goes on wakes seldom."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from kernel_server.event_log import MAX_BATCH, QUIET_S, EventLog, weight
from kernel_server.protocol import codec
from kernel_server.protocol.messages import Event, SessionInfo
from kernel_server.wire import PAYLOAD_CAP


def _event(seq: int, kind: str = "changed") -> Event:
    return Event(seq=seq, kind=kind, session_id="s1")  # type: ignore[arg-type]


def _long(seq: int, num_tokens: int) -> Event:
    """An event of a session with many tokens."""
    session = SessionInfo(
        id="s1",
        name="s1",
        owner="ann",
        status="waiting",
        tokens=tuple(range(100_000, 100_000 + num_tokens)),
        num_prompt_tokens=num_tokens,
        max_new_tokens=1,
        temperature=0.0,
        top_p=1.0,
        seed=1,
        forward=0,
        location=None,
        layers_executed=0,
        layers_replayed=0,
        stop_number=0,
        stop=None,
        finish_reason=None,
        error=None,
        parent=None,
        num_pages=0,
        kv_bytes=0,
        revision=seq,
        event_seq=seq,
    )
    return Event(seq=seq, kind="changed", session_id="s1", session=session)


def test_an_answer_fits_a_frame_however_long_the_sessions_are() -> None:
    log = EventLog()
    for seq in range(1, MAX_BATCH + 1):
        log.append("ann", _long(seq, 100_000))
    seen, last = [], 0
    while (found := log.poll("ann", last, 0)).events:
        assert len(codec.encode(found)) < PAYLOAD_CAP
        seen += [event.seq for event in found.events]
        last = found.last_seq

    assert seen == list(range(seen[0], MAX_BATCH + 1))


def test_who_does_not_pull_has_the_oldest_dropped_beyond_a_number_of_bytes() -> None:
    event_bytes = weight(_long(1, 1000))
    log = EventLog(kept_bytes=3 * event_bytes)
    for seq in range(1, 6):
        log.append("ann", _long(seq, 1000))
    log.append("bob", _long(1, 1000))

    found = log.poll("ann", 0, 0)
    assert [event.seq for event in found.events] == [3, 4, 5]
    assert found.missed
    assert log.held_bytes("ann") == 3 * event_bytes
    assert not log.poll("bob", 0, 0).missed


def test_an_event_larger_than_the_limit_is_kept_until_the_next() -> None:
    log = EventLog(kept_bytes=10)
    log.append("ann", _long(1, 1000))

    assert [event.seq for event in log.poll("ann", 0, 0).events] == [1]


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
    found = log.poll("ann", 0, 60)
    threading.Timer(0.05, log.close).start()
    nothing = log.poll("ann", 1, 60)

    assert [e.seq for e in found.events] == [1]
    assert nothing.events == ()
    assert time.monotonic() - began < 60


def test_progress_wakes_seldom_and_goes_out_with_what_comes_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = EventLog()
    changed = log._of("ann").changed
    wake, woken_at = changed.notify_all, list[float]()

    def note() -> None:
        woken_at.append(time.monotonic())
        wake()

    monkeypatch.setattr(changed, "notify_all", note)
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
    follower.join(60)

    assert done.is_set()
    assert [seq for answer in answers for seq in answer] == list(range(1, 61))
    # how often the follower asks is the machine's business, how often it is woken is the log's
    assert len(answers) <= took / QUIET_S + 2
    assert len(woken_at) <= took / QUIET_S + 2


@pytest.mark.parametrize("kind", ["progress", "swapped", "continued", "launched"])
def test_what_wakes_nobody_is_told_although_nothing_follows(kind: str) -> None:
    log = EventLog()
    log.append("ann", _event(1, "stopped"))
    for seq in (2, 3, 4):
        log.append("ann", _event(seq, kind))
    began = time.monotonic()
    found = log.poll("ann", 1, 60)

    assert [e.seq for e in found.events] == [2, 3, 4]
    assert time.monotonic() - began < 30
    assert not log.poll("ann", 4, 0).events
    log.append("ann", _event(5, kind))
    seen = [event.seq for event in log.poll("ann", 4, 0).events]
    assert seen == [5], "who does not wait gets what is there"


@pytest.mark.parametrize("kind", ["continued", "launched"])
@pytest.mark.parametrize("before_s", [0.0, 2 * QUIET_S])
def test_what_an_answer_tells_goes_out_with_what_comes_next(before_s: float, kind: str) -> None:
    """Whether or not nothing had happened for long: whoever waits is not answered for it alone."""
    log = EventLog()
    log.append("ann", _event(1, "stopped"))
    time.sleep(before_s)
    answers: list[list[int]] = []
    waiting = threading.Event()
    wait = log._of("ann").changed.wait
    log._of("ann").changed.wait = lambda timeout: waiting.set() or wait(timeout)  # type: ignore

    def follow() -> None:
        answers.append([event.seq for event in log.poll("ann", 1, 60).events])

    follower = threading.Thread(target=follow)
    follower.start()
    waiting.wait(60)
    began = time.monotonic()
    log.append("ann", _event(2, kind))
    log.append("ann", _event(3, "stopped"))
    took = time.monotonic() - began
    follower.join(60)
    # a machine that holds this thread up for so long between the two may answer for the first
    assert answers == [[2, 3]] or took > QUIET_S


def test_an_event_wakes_those_of_its_owner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog()
    answers: dict[str, list[int]] = {}
    waits: dict[str, int] = {"ann": 0, "bob": 0}
    followers = []
    for owner in waits:
        changed = log._of(owner).changed
        wait = changed.wait

        def note(timeout: float, wait: Any = wait, owner: str = owner) -> bool:
            waits[owner] += 1
            return bool(wait(timeout))

        def follow(owner: str = owner) -> None:
            answers[owner] = [event.seq for event in log.poll(owner, 0, 60).events]

        monkeypatch.setattr(changed, "wait", note)
        followers.append(threading.Thread(target=follow))
        followers[-1].start()
    while min(waits.values()) < 1:
        time.sleep(0.001)
    for seq in range(1, 6):
        log.append("bob", _event(seq))
    followers[1].join(60)

    assert answers == {"bob": answers["bob"]} and answers["bob"][0] == 1
    assert waits["ann"] == 1, "woken for nothing"
    log.close()
    followers[0].join(60)
    assert answers["ann"] == []


def test_of_many_swaps_in_an_answer_the_last_tells_how_the_session_is() -> None:
    log = EventLog()
    for seq in range(1, 5):
        log.append("ann", replace(_long(seq, 10), kind="swapped", text=f"swap {seq}"))
    log.append("ann", replace(_long(5, 10), kind="stopped"))
    log.append("ann", replace(_long(6, 10), kind="swapped"))
    events = log.poll("ann", 0, 0).events

    assert [event.seq for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.text for event in events[:4]] == ["swap 1", "swap 2", "swap 3", "swap 4"]
    assert [event.session is not None for event in events] == [False] * 4 + [True] * 2
    assert [event.session.revision for event in events[4:]] == [5, 6]
    later = log.poll("ann", 3, 0).events[0]
    assert later.seq == 4 and later.session is None
    assert log.poll("ann", 0, 0).events == events, "what is kept is whole, and read again"


def test_the_only_swap_in_an_answer_tells_of_its_session() -> None:
    log = EventLog()
    log.append("ann", replace(_long(1, 10), kind="swapped"))
    first = log.poll("ann", 0, 0).events[0]
    log.append("ann", replace(_long(2, 10), kind="swapped"))

    assert first.session is not None
    assert log.poll("ann", 1, 0).events[0].session is not None


def _stop(seq: int, session_id: str = "s1", kind: str = "stopped") -> Event:
    event = _long(seq, 3)
    assert event.session is not None
    return replace(
        event, kind=kind, session_id=session_id, session=replace(event.session, id=session_id)
    )  # type: ignore[arg-type]


class _Asker(threading.Thread):
    """One who waits for `s1` to rest after event 1, begun when that is certain to wait."""

    def __init__(self, log: EventLog, timeout_s: float = 60) -> None:
        super().__init__(daemon=True)
        self.log, self.timeout_s, self.found = log, timeout_s, ["nothing yet"]
        self.start()
        while "s1" not in log._of("ann").awaited:
            time.sleep(0.001)

    def run(self) -> None:
        self.found = [self.log.rest("ann", "s1", 1, self.timeout_s)]

    def told(self) -> Any:
        self.join(60)
        return self.found[0]


def test_who_waits_for_a_session_to_rest_is_told_of_its_first_rest_alone() -> None:
    log = EventLog()
    log.append("ann", _stop(1))
    asker = _Asker(log)
    log.append("ann", _event(2, "continued"))
    log.append("ann", _stop(3, "s2"))
    log.append("bob", _stop(3))
    assert asker.is_alive() and asker.found == ["nothing yet"]
    log.append("ann", _stop(4))
    log.append("ann", _stop(5))

    assert asker.told().event_seq == 4
    assert not log._of("ann").awaited


def test_a_rest_that_came_before_anyone_waited_is_told_at_once() -> None:
    log = EventLog()
    for event in (_stop(1), _event(2, "continued"), _stop(3), _event(4, "continued"), _stop(5)):
        log.append("ann", event)

    assert log.rest("ann", "s1", 1, 60).event_seq == 3
    assert log.rest("ann", "s1", 3, 60).event_seq == 5


def test_who_waits_in_vain_is_let_go_and_polls_are_told_at_once_again() -> None:
    log = EventLog()
    log.append("ann", _event(1, "continued"))

    assert log.rest("ann", "s1", 1, 0.01) is None
    assert not log._of("ann").awaited
    log.append("ann", _stop(2))
    assert log._of("ann").urgent == 2


@pytest.mark.parametrize("ends", ["terminated", "closed"])
def test_who_waits_is_let_go_when_there_is_nothing_to_wait_for(ends: str) -> None:
    log = EventLog()
    asker = _Asker(log)
    log.append("ann", _event(2, "terminated")) if ends == "terminated" else log.close()

    assert asker.told() is None
    assert log.rest("ann", "s2", 1, 60) is None if ends == "closed" else True


def test_a_rest_that_was_told_goes_out_to_polls_a_little_later() -> None:
    """To every poll, once, in order; it wakes nobody by itself."""
    log = EventLog()
    log.append("ann", _event(1, "continued"))
    asker = _Asker(log)
    log.append("ann", _stop(2))
    assert asker.told().event_seq == 2
    assert log._of("ann").urgent < 2
    began = time.monotonic()
    seen = [event.seq for event in log.poll("ann", 1, 60).events]

    assert seen == [2] and time.monotonic() - began < 30
