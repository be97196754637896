"""How many requests of one owner are carried out at once, and which of them one after the other.

Counts and locks only; which requests are jobs and which of them use the engine, the gateway says.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

from kernel_server.protocol.errors import QuotaExceeded

#: Requests of one owner that may be waiting or carried out at a time.
JOBS_PER_OWNER = 32


class Jobs:
    """The requests being answered, by owner. Safe to use from any thread.

    jobs = Jobs(limit=32)
    with jobs.one("ann"):
        ...
    """

    def __init__(self, limit: int = JOBS_PER_OWNER) -> None:
        self.limit = limit
        self._running: Counter[str] = Counter()
        self._gates: dict[str, threading.Lock] = {}  # owners are few
        self._turns: dict[tuple[str, str], threading.Lock] = {}
        self._lock = threading.Lock()

    def running(self, owner: str) -> int:
        """Requests of this owner that wait or are carried out now."""
        with self._lock:
            return self._running[owner]

    @contextlib.contextmanager
    def one(self, owner: str) -> Iterator[None]:
        """Count one request while it is carried out; `QuotaExceeded` when there are too many."""
        with self._lock:
            have = self._running[owner]
            if have >= self.limit:
                raise QuotaExceeded(
                    f"{have} of your requests wait for answers, the limit of one owner is"
                    f" {self.limit}: wait for some, or start the server with more"
                    " --jobs-per-owner",
                    have=have,
                    limit=self.limit,
                )
            self._running[owner] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[owner] -= 1

    def gate(self, owner: str) -> threading.Lock:
        """The lock that keeps an owner's use of the interpreter to one call at a time."""
        with self._lock:
            return self._gates.setdefault(owner, threading.Lock())

    def turn(self, owner: str, what: str = "engine") -> threading.Lock:
        """The lock that keeps an owner's use of the engine, or of what is named, to one request at
        a time."""
        with self._lock:
            return self._turns.setdefault((owner, what), threading.Lock())
