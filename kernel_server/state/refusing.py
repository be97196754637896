"""What follows from a copy that was not made: a tier that refuses, a page that cannot be read.

A tier to which a copy could not be written *refuses*: for some seconds it has no room for anything
new, so that nothing is tried again at every event, and whoever needs its room is told why. What
lies in it stays there and is read as before. Afterwards it is *on trial*: where nobody asked, one
copy at a time goes there until one was made. A page that could not be read is read again a few
times, then it is lost. What is done without room is decided in `leaving` and `paging`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kernel_server.protocol.errors import SessionFailed, TornPage
from kernel_server.protocol.messages import ErrorInfo
from kernel_server.state.copies import Copies, Copying
from kernel_server.state.residency import Moves, Tier
from kernel_server.state.sessions import Session

#: How long a tier refuses after a copy to it failed, seconds.
REFUSES_S = 5.0
#: How often a page is read from below before it counts as lost.
READS = 3


@dataclass(slots=True)
class Refusal:
    """Why a tier takes no pages; kept beyond its end until a copy to the tier was made."""

    why: str
    #: seconds of the server's clock
    until: float


class Refusing(Copies):
    """Counts copies that were not made."""

    # -- copies ---------------------------------------------------------------------------------

    def _made(self, moves: Moves) -> None:
        """Count a copy that was made."""
        self.residency.done_all(moves)
        if self.failed_reads and moves.is_read:
            for page in moves.pages:
                self.failed_reads.pop(page, None)
        if not moves.is_read and self.residency.slots[moves.target].refusal is None:
            self.refusals.pop(moves.target, None)

    def _not_made(self, copying: Copying, error: ErrorInfo) -> None:
        """Count a copy that was not made, and tell of it where nobody else would be told."""
        moves = copying.moves
        pages = self.residency.failed_all(moves)
        if moves.is_read:
            for page in pages:
                self._not_read(page, error)
            return
        if moves.source == "device":
            # nothing else would have them copied again once there is room
            self.to_clean.update(dict.fromkeys(s for p in pages for s in self._owners(p)))
        if not self._refuse(moves.target, error.message):
            return
        session = self.sessions.get(copying.session_id or "")
        if session is None or session.scratch:
            self._tell_owners(pages, self.failure_text(copying, error))

    def _not_read(self, page: int, error: ErrorInfo) -> None:
        self.failed_reads[page] = self.failed_reads.get(page, 0) + 1
        if error.code == "TornPage" or self.failed_reads[page] >= READS:
            self.lost[page] = error

    def _tell_owners(self, pages: list[int], text: str) -> None:
        """Tell each owner of these pages, with one of the sessions they are of."""
        told: set[str] = set()
        for page in pages:
            for session_id in self._owners(page):
                session = self.sessions[session_id]
                if session.branch:
                    session = self.sessions.get(session.parent or "", session)
                if session.owner not in told and not session.scratch:
                    told.add(session.owner)
                    self.note(session, "swapped", text)
                    self.publish(session, "swapped", text=text)

    def _owners(self, page: int) -> list[str]:
        return [s.id for s in self.sessions.values() if any(page in t for t in s.tables)]

    # -- tiers ----------------------------------------------------------------------------------

    def _refuse(self, tier: Tier, why: str) -> bool:
        """Let a tier refuse from now on; False when it did already."""
        slots = self.residency.slots[tier]
        news = slots.refusal is None
        slots.refusal = why
        self.refusals[tier] = Refusal(why, self.now + REFUSES_S)
        return news

    def refuses(self, tier: Tier) -> bool:
        """Whether a tier takes no pages, since writing there failed a short while ago."""
        return self.residency.slots[tier].refusal is not None

    def end_refusals(self) -> None:
        """Time has passed: tiers that have refused long enough are on trial."""
        for tier, refusal in self.refusals.items():
            if refusal.until <= self.now:
                self.residency.slots[tier].refusal = None

    def forgive(self, tier: Tier) -> None:
        """Let a tier be used as if nothing had failed."""
        self.refusals.pop(tier, None)
        self.residency.slots[tier].refusal = None

    def _what_next(self, otherwise: str) -> str:
        """The end of a message about too little room: which tiers refuse and why, or `otherwise`
        where none does."""
        refusing = [(t, r) for t, r in self.refusals.items() if self.refuses(t)]
        if not refusing:
            return f": {otherwise}"
        parts = [
            f"the {tier} refuses pages for {max(refusal.until - self.now, 0.0):.0f} s more, since"
            f" writing there failed ({refusal.why})"
            for tier, refusal in refusing
        ]
        return f"; {' and '.join(parts)}: mend that and repeat, or terminate a session"

    def _why_refused(self) -> dict[str, Any]:
        """The same for the details of an error."""
        found: dict[str, str] = {t: r.why for t, r in self.refusals.items() if self.refuses(t)}
        return {"refused": found} if found else {}

    # -- pages ----------------------------------------------------------------------------------

    def loss(self, session: Session, pages: Iterable[int]) -> SessionFailed | None:
        """What to tell of those of the pages that are lost; None when none is."""
        lost = [page for page in pages if page in self.lost]
        if not lost:
            return None
        error = self.lost[lost[0]]
        kind = TornPage if error.code == "TornPage" else SessionFailed
        count = "1 page" if len(lost) == 1 else f"{len(lost)} pages"
        return kind(
            f"{count} of session {session.id} could not be read back: {error.message}; launch it"
            " again with the same seed"
        )
