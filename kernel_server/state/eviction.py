"""Whose pages leave the device first. Pure arithmetic on what is known of sessions that do not run.

A session's pages are worth what they cost while nobody needs them: their number times the seconds
until they are needed. The waste of keeping the first of the order is the largest. Source: Abhyankar
et al., "InferCept" (2024), waste as bytes times time. What leaves within a session, and whether a
copy is needed first, is decided in `paging`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: Seconds after which nobody is expected to come back soon, for a session that is finished.
_FINISHED_S = 600.0
#: A session that was looked at just now is expected back after this many seconds at least.
_LEAST_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resting:
    """A session that is not in the engine."""

    session_id: str
    #: it is queued, and only waits for its turn
    runs: bool
    finished: bool
    pinned: bool
    num_pages: int
    #: since somebody last asked for it
    idle_s: float
    #: what its owner said, None if nothing
    resumes_in_s: float | None

    @property
    def expected_s(self) -> float:
        """Seconds until it is likely to run: as long again as it has been left alone."""
        if self.resumes_in_s is not None:
            return max(self.resumes_in_s, _LEAST_S)
        return max(self.idle_s, _LEAST_S) + _FINISHED_S * self.finished

    @property
    def waste(self) -> float:
        """Pages times seconds for which the device would hold them for nothing."""
        return self.num_pages * self.expected_s


def eviction_order(sessions: Iterable[Resting]) -> list[Resting]:
    """Sessions whose pages may leave, those that cost most for nothing first.

    Pinned ones never leave; those that wait for their turn leave last.

    >>> a = Resting(session_id="a", runs=False, finished=False, pinned=False, num_pages=8,
    ...             idle_s=60.0, resumes_in_s=None)
    >>> [one.session_id for one in eviction_order([a])]
    ['a']
    """
    leaving = [one for one in sessions if not one.pinned and one.num_pages]
    return sorted(leaving, key=lambda one: (one.runs, -one.waste, one.session_id))
