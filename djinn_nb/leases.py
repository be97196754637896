"""What servers tell of leases: said once by each connection, and shown as long as it holds.

A lease is the time that a session which nobody uses keeps its pages; whether there is one, and what
its end means, is decided by the server. A warning is over when the session is used.
"""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

from kernel_server.protocol import messages as m

#: What is asked by views on their own, and is no use of a session.
_UNASKED = (m.ListBranches,)
#: The end of a lease is told at most so much later than it was said to be, seconds.
GRACE_S = 5.0


class Leases:
    """The leases that events have warned of, or that have ended.

    leases.take(event)
    leases.asked(m.Continue(session_id="s1", seen=2))   # the warning about s1 is over
    leases.warn()
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: by session, in the order they were told, with when that was
        self._standing: dict[str, tuple[m.Event, float]] = {}
        self._unsaid: dict[str, m.Event] = {}

    def take(self, event: m.Event) -> None:
        """Note what an event tells; may come on any thread."""
        with self._lock:
            if event.kind == "swapped":
                return  # nobody used it for that
            self._standing.pop(event.session_id, None)
            self._unsaid.pop(event.session_id, None)
            if event.kind == "lease":
                self._standing[event.session_id] = event, time.monotonic()
                self._unsaid[event.session_id] = event

    def asked(self, message: Any) -> None:
        """A request that uses a session: what was to be warned of is over."""
        session_id = getattr(message, "session_id", None)
        if session_id is None or isinstance(message, _UNASKED):
            return
        with self._lock:
            found = self._standing.get(session_id)
            if found is not None and found[0].remaining_s:
                del self._standing[session_id]
                self._unsaid.pop(session_id, None)

    def forget(self) -> None:
        """Another server has come, and lists its sessions anew."""
        with self._lock:
            self._standing.clear()
            self._unsaid.clear()

    @property
    def standing(self) -> tuple[m.Event, ...]:
        """What holds of leases now, oldest first: one event of each session.

        A warning whose time has passed, and nothing followed, is over: another client was there.
        """
        now = time.monotonic()
        with self._lock:
            return tuple(
                event
                for event, told_at in self._standing.values()
                if not event.remaining_s or now - told_at < event.remaining_s + GRACE_S
            )

    def warn(self) -> None:
        """Tell the person, on their own thread, what they were not told."""
        with self._lock:
            unsaid = list(self._unsaid.values())
            self._unsaid.clear()
        for event in unsaid:
            warnings.warn(event.text, stacklevel=4)
