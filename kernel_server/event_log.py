"""Events of each owner, kept in order until they are pulled or too old. Nothing is decided here."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from kernel_server.protocol.messages import Events

#: Events kept per owner; a client that asks for older ones is told to describe anew.
KEPT = 4096
#: Longest wait a client may ask for, seconds.
MAX_WAIT_S = 30.0
#: Progress is sent at most this often, seconds: a person sees no more.
PROGRESS_S = 0.1
#: Most events in one answer, and about how many bytes: a frame stays well under the wire's cap.
MAX_BATCH = 256
BATCH_BYTES = 2 << 20
#: About how many bytes are kept per owner, whoever does not pull them: the oldest give way.
KEPT_BYTES = 64 << 20


class EventLog:
    """Per owner, the newest events by sequence number, with a wait for the next one."""

    def __init__(self, kept: int = KEPT, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept = kept
        self._kept_bytes = kept_bytes
        #: owner -> (event, its bytes), oldest first; and the sum of these bytes
        self._events: dict[str, deque[tuple[Any, int]]] = {}
        self._bytes: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._woken = 0.0

    def append(self, owner: str, event: Any) -> None:
        """Keep an event and wake whoever waits for it.

        Progress wakes nobody within `PROGRESS_S` of the last waking: sending it with every token
        cost the engine 5 % of a small model's decode. It goes out with whatever comes next.
        """
        with self._changed:
            self._keep(owner, event)
            self._last[owner] = event.seq
            now = time.monotonic()
            if event.kind == "progress" and now - self._woken < PROGRESS_S:
                return
            self._woken = now
            self._changed.notify_all()

    def _keep(self, owner: str, event: Any) -> None:
        events = self._events.setdefault(owner, deque())
        nbytes = weight(event)
        events.append((event, nbytes))
        held = self._bytes.get(owner, 0) + nbytes
        while len(events) > self._kept or (held > self._kept_bytes and len(events) > 1):
            held -= events.popleft()[1]
        self._bytes[owner] = held

    def held_bytes(self, owner: str) -> int:
        """About how many bytes of events are kept for this owner."""
        with self._changed:
            return self._bytes.get(owner, 0)

    def last_seq(self, owner: str) -> int:
        """Sequence number of the owner's newest event, 0 before the first."""
        with self._changed:
            return self._last.get(owner, 0)

    def poll(self, owner: str, after: int, timeout_s: float) -> Events:
        """Events after sequence number `after`, waiting up to `timeout_s` for the first."""
        deadline = time.monotonic() + min(max(timeout_s, 0.0), MAX_WAIT_S)
        with self._changed:
            while self._last.get(owner, 0) <= after and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            kept = self._events.get(owner, ())
            found = []
            # newest first: a client that keeps up reads a few, whatever is kept
            for event, nbytes in reversed(kept):
                if event.seq <= after:
                    break
                found.append((event, nbytes))
            found.reverse()
            missed = bool(found) and found[0][0].seq > after + 1
            batch = _first(found)
            last = batch[-1].seq if batch else max(after, 0)
            return Events(events=batch, last_seq=last, missed=missed)

    def close(self) -> None:
        """Let every waiting poll return."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


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


def weight(event: Any) -> int:
    """About how many bytes an event takes, kept or sent: its lists of positions and token ids."""
    session = event.session
    if session is None:
        return 300
    numbers = len(session.tokens) + (len(session.stop.hit_tokens) if session.stop else 0)
    numbers += sum(len(edit.tokens_matched) for edit in session.edits)
    return 1500 + 8 * numbers + 400 * (len(session.edits) + len(session.breakpoints))
