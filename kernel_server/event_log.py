"""Events of each owner, kept in order until they are pulled or too old. Nothing is decided here.

An answer to a poll costs the server more than all else that an event costs, and the interpreter it
is made in is the engine's too. So an event wakes those who wait for its own owner's and nobody
else, and of events that only tell how something goes on many go out together (`QUIET_S`). That
something goes on at all, or is there, is told with what comes next: who asked for it has had an
answer, and the engine is to begin.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from kernel_server.protocol.messages import Events

#: Events kept per owner; a client that asks for older ones is told to describe anew.
KEPT = 4096
#: Longest wait a client may ask for, seconds.
MAX_WAIT_S = 30.0
#: Events of these kinds tell how something goes on, and nobody waits for them.
QUIET = ("progress", "swapped")
#: One of these never goes out at once: whoever asked for it has an answer that tells as much.
NEVER_AT_ONCE = ("continued", "launched")
#: After one of these a session does not run.
ENDS_A_RUN = ("stopped", "finished", "failed", "terminated")
#: They go out together with what comes next, but after so many seconds at the latest: a person sees
#: no more.
QUIET_S = 0.1
#: Most events in one answer, and about how many bytes: a frame stays well under the wire's cap.
MAX_BATCH = 256
BATCH_BYTES = 2 << 20
#: About how many bytes are kept per owner, whoever does not pull them: the oldest give way.
KEPT_BYTES = 64 << 20


@dataclass(slots=True)
class _Waiter:
    """One who waits for the end of a run. A lock, taken until it is told."""

    session_id: str
    told: threading.Lock
    event: Any = None


@dataclass(slots=True)
class _Kept:
    """What is kept of one owner, and how those who wait for it are woken."""

    changed: threading.Condition
    #: (event, its bytes), oldest first; and the sum of these bytes
    events: deque[tuple[Any, int]] = field(default_factory=deque)
    nbytes: int = 0
    #: sequence numbers of the newest event, and of the newest that goes out at once
    last: int = 0
    urgent: int = 0
    #: quiet events that come until then wait for that time, seconds of the clock
    quiet_until: float = 0.0
    #: who waits for a session to rest, by session
    awaited: dict[str, list[_Waiter]] = field(default_factory=dict)


class EventLog:
    """Per owner, the newest events by sequence number, with a wait for the next one."""

    def __init__(self, kept: int = KEPT, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept = kept
        self._kept_bytes = kept_bytes
        self._owners: dict[str, _Kept] = {}  # owners are few
        self._lock = threading.Lock()
        self._closed = False

    def append(self, owner: str, event: Any) -> None:
        """Keep an event and wake whoever waits for it.

        Those of `QUIET` wake nobody within `QUIET_S` of the last waking: sending progress with
        every token cost the engine 5 % of a small model's decode.
        """
        of = self._of(owner)
        with of.changed:
            self._keep(of, event)
            of.last = event.seq
            now = time.monotonic()
            told = event.kind in ENDS_A_RUN and self._tell(of, event)
            if (told or event.kind in (*QUIET, *NEVER_AT_ONCE)) and now < of.quiet_until:
                return  # who waits looks again by himself
            if told or event.kind in NEVER_AT_ONCE:
                of.quiet_until = now + QUIET_S
                of.changed.notify_all()  # to wait until then
                return
            of.urgent = event.seq
            of.quiet_until = now + QUIET_S
            of.changed.notify_all()

    def rest(self, owner: str, session_id: str, after: int, timeout_s: float) -> Any:
        """The session, where it first rests after sequence number `after`; None if it does not
        within `timeout_s`, or ends.

        Who is told so need not be told by a poll, so that the event goes out like a quiet one.
        """
        of = self._of(owner)
        waiter = _Waiter(session_id, threading.Lock())
        with of.changed:
            for event, _ in reversed(of.events):
                if event.seq <= after:
                    break
                if event.session_id == session_id and event.kind in ENDS_A_RUN:
                    waiter.event = event  # the last one found is the first there was
            if waiter.event is not None or self._closed:
                return waiter.event and waiter.event.session
            waiter.told.acquire()
            of.awaited.setdefault(session_id, []).append(waiter)
        waiter.told.acquire(timeout=max(0.0, timeout_s))
        with of.changed:
            if waiter.event is None and waiter in (waiting := of.awaited.get(session_id, [])):
                waiting.remove(waiter)
                if not waiting:
                    del of.awaited[session_id]
        return waiter.event and waiter.event.session

    def _tell(self, of: _Kept, event: Any) -> bool:
        """Tell those who wait for this session; whether there were any."""
        waiting = of.awaited.pop(event.session_id, [])
        for waiter in waiting:
            waiter.event = event
            waiter.told.release()
        return bool(waiting)

    def _of(self, owner: str) -> _Kept:
        found = self._owners.get(owner)
        if found is None:
            with self._lock:
                found = self._owners.setdefault(owner, _Kept(threading.Condition()))
        return found

    def _keep(self, of: _Kept, event: Any) -> None:
        nbytes = weight(event)
        of.events.append((event, nbytes))
        held = of.nbytes + nbytes
        while len(of.events) > self._kept or (held > self._kept_bytes and len(of.events) > 1):
            held -= of.events.popleft()[1]
        of.nbytes = held

    def held_bytes(self, owner: str) -> int:
        """About how many bytes of events are kept for this owner."""
        return self._of(owner).nbytes

    def last_seq(self, owner: str) -> int:
        """Sequence number of the owner's newest event, 0 before the first."""
        return self._of(owner).last

    def poll(self, owner: str, after: int, timeout_s: float) -> Events:
        """Events after sequence number `after`, waiting up to `timeout_s` for the first."""
        deadline = time.monotonic() + min(max(timeout_s, 0.0), MAX_WAIT_S)
        of = self._of(owner)
        with of.changed:
            while of.urgent <= after and not self._closed:
                now = time.monotonic()
                quiet = now < of.quiet_until
                if now >= deadline or (of.last > after and not quiet):
                    break
                of.changed.wait((min(of.quiet_until, deadline) if quiet else deadline) - now)
            found = []
            # newest first: a client that keeps up reads a few, whatever is kept
            for event, nbytes in reversed(of.events):
                if event.seq <= after:
                    break
                found.append((event, nbytes))
            if found and of.urgent <= after:
                of.quiet_until = time.monotonic() + QUIET_S
        found.reverse()
        missed = bool(found) and found[0][0].seq > after + 1
        batch = _first(found)
        last = batch[-1].seq if batch else max(after, 0)
        return Events(events=_told_once(batch), last_seq=last, missed=missed)

    def close(self) -> None:
        """Let every waiting poll return."""
        self._closed = True
        with self._lock:
            owners = list(self._owners.values())
        for of in owners:
            with of.changed:
                of.changed.notify_all()
                for waiter in (one for waiting in of.awaited.values() for one in waiting):
                    waiter.told.release()
                of.awaited.clear()


def _first(found: list[tuple[Any, int]]) -> tuple[Any, ...]:
    """The first events, as many as one answer holds, and at least one."""
    batch: list[Any] = []
    left = BATCH_BYTES
    for event, nbytes in found[:MAX_BATCH]:
        if batch and nbytes > left:
            break
        batch.append(event)
        left -= nbytes
    return tuple(batch)


def _told_once(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same events, of which one that is only about pages, or about going on, leaves out its
    session where a later one of the answer tells how that is now."""
    told: set[str] = set()
    events = []
    for event in reversed(batch):
        if event.session is not None:
            if event.kind in ("swapped", "continued") and event.session_id in told:
                event = replace(event, session=None)
            told.add(event.session_id)
        events.append(event)
    return tuple(reversed(events))


def weight(event: Any) -> int:
    """About how many bytes an event takes, kept or sent: its lists of positions and token ids."""
    session = event.session
    if session is None:
        return 300
    numbers = len(session.tokens) + (len(session.stop.hit_tokens) if session.stop else 0)
    numbers += sum(len(edit.tokens_matched) for edit in session.edits)
    return 1500 + 8 * numbers + 400 * (len(session.edits) + len(session.breakpoints))
