"""The log of a logpoint as numbers: how many records it holds, how large, and how many it lost.

The records themselves are the engine's. Which stretches may write how much is decided here; whether
a logpoint is reached and holds, in `breakpoints`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kernel_server.protocol.errors import BadArgument, QuotaExceeded
from kernel_server.protocol.messages import LogContent, SetBreakpoint
from kernel_server.state.events import LogResult
from kernel_server.state.quotas import size

#: Room for less than one record is no log.
MIN_LOG_BYTES = 4096


@dataclass(slots=True, kw_only=True)
class Log:
    """What is kept of one logpoint, and how much more may be."""

    what: LogContent
    max_bytes: int
    stop_when_full: bool
    #: number of the newest record ever kept
    last_seq: int = 0
    dropped: int = 0
    nbytes: int = 0
    #: bytes of each record kept, the oldest first
    sizes: deque[int] = field(default_factory=deque)

    @property
    def room(self) -> int:
        """Bytes that still fit."""
        return self.max_bytes - self.nbytes

    def take(self, result: LogResult) -> None:
        """Count what a stretch has noted."""
        self.sizes += result.sizes
        self.nbytes += sum(result.sizes)
        self.last_seq += len(result.sizes)
        self.dropped += result.dropped

    def release(self, seq: int) -> None:
        """Forget the records up to this number."""
        while self.sizes and self.last_seq - len(self.sizes) < seq:
            self.nbytes -= self.sizes.popleft()

    def empty(self) -> Log:
        """The same log without a record, for a fork."""
        return Log(what=self.what, max_bytes=self.max_bytes, stop_when_full=self.stop_when_full)

    def full(self, logpoint_id: int, needed: int, owner_limit: int) -> QuotaExceeded:
        """Says that a record found no room."""
        return QuotaExceeded(
            f"logpoint {logpoint_id} is full: {len(self.sizes)} records take {size(self.nbytes)} of"
            f" {size(self.max_bytes)} (all logs of one owner: {size(owner_limit)}), and the next"
            f" takes {size(needed)}: stream it with release=True, or remove it and set one with"
            " more max_bytes",
            needed=needed,
            have=self.nbytes,
            limit=self.max_bytes,
        )

    def check(self) -> None:
        """Assert that the numbers fit each other."""
        assert self.nbytes == sum(self.sizes) <= self.max_bytes, f"log of {self.nbytes} bytes"
        assert len(self.sizes) <= self.last_seq


def make_log(request: SetBreakpoint) -> Log | None:
    """The log of the logpoint asked for; None where it is another kind. Raises `BadArgument`."""
    if request.kind != "logpoint":
        return None
    if request.ignore or request.once:
        raise BadArgument("a logpoint never stops, so it takes no ignore and no once")
    most = request.max_bytes
    if type(most) is not int or most < MIN_LOG_BYTES:
        raise BadArgument(f"max_bytes is {most!r}: give at least {MIN_LOG_BYTES} bytes")
    return Log(what=request.what, max_bytes=most, stop_when_full=request.on_full == "stop")
