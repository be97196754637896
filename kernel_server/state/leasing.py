"""Leases: how long a session that nobody uses keeps its pages and tensors, if whoever runs the
server says so. Nothing expires: at nine tenths of the lease its owner is warned, at the end it is
*dormant*, as after a restart, and computed again when it is needed.

It counts from when the session came to rest or was last used, the time that sends idle sessions off
the device too. Before anything is given back its record must be on disk; what cannot be recorded
stays as it is, and says why. What the records of logpoints hold stays in memory. How a dormant
session is computed again is `rebuilding`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernel_server.protocol.durations import in_words
from kernel_server.protocol.location import NOT_STARTED
from kernel_server.state.events import DurabilityChanged, Recorded, Ticked
from kernel_server.state.residing import Residing
from kernel_server.state.sessions import Session

#: The part of a lease that is left when it warns; as long as that lies between warning and end.
LEFT = 0.1
#: What cannot be recorded is tried again no sooner, seconds.
_AGAIN_S = 1.0


@dataclass(slots=True)
class Lease:
    """How far the lease of one session is."""

    #: seconds of the server's clock: when it began, and when it warned
    since: float
    warned_at: float | None = None
    #: its record is being written, under this number
    ticket: int | None = None
    #: why it could not be written, and when that is tried again
    lacks: str = ""
    again_at: float = 0.0


class Leasing(Residing):
    """Warns of leases that end, and puts sessions to rest."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.limits.lease_s is not None and not self.journal:
            raise ValueError("a lease needs a journal: what it gives back is in no other place")
        #: by session, of those that rest and hold something
        self.leases: dict[str, Lease] = {}
        self._leases_ended = 0

    def ticked(self, event: Ticked) -> None:
        super().ticked(event)
        lease_s = self.limits.lease_s
        if lease_s is None:
            return
        # scratch forks that answer questions, and builders
        in_use = {s.parent for s in self.sessions.values() if s.scratch and not s.branch}
        found: dict[str, Lease] = {}
        for session in self.sessions.values():
            if session.scratch:
                continue
            if not in_use.isdisjoint((session.id, *session.tree.lines)):
                session.touched = self.now
            elif self._may_be_put_to_rest(session):
                found[session.id] = self._lease_of(session)
        self.leases = found
        for session_id, lease in found.items():
            self._judge(self.sessions[session_id], lease, lease_s)

    def _lease_of(self, session: Session) -> Lease:
        """Its lease: a new one if it was used since."""
        known, since = self.leases.get(session.id), self._rests_since(session)
        return known if known is not None and known.since == since else Lease(since)

    def _rests_since(self, session: Session) -> float:
        """When its lease began; who hinted at a time to go on is given until then, and a lease."""
        return max(session.touched, session.resumes_at or 0.0)

    def _may_be_put_to_rest(self, session: Session) -> bool:
        """Whether it rests, nothing of it is under way, and it holds what can be computed again."""
        if session.pinned or session.pending is not None:
            return False
        if session.status in ("running", "failed"):
            return False
        parts = self._parts(session)
        if any(part.id in self.settling for part in parts):
            return False
        return bool(session.tree.kept) or any(map(_holds, parts))

    def _parts(self, session: Session) -> tuple[Session, ...]:
        """The session and its hidden branches."""
        return (session, *(self.sessions[line] for line in session.tree.lines))

    def _judge(self, session: Session, lease: Lease, lease_s: float) -> None:
        left_s = LEFT * lease_s
        if lease.warned_at is None:
            if self.now - lease.since >= lease_s - left_s:
                lease.warned_at = self.now
                self._warn(session, lease_s, left_s)
            return
        if lease.ticket is not None or self.now < max(lease.warned_at + left_s, lease.again_at):
            return
        self._leases_ended += 1
        lease.ticket = self.awaited[session.id] = self._leases_ended
        self.changed[session.id] = None

    # -- the end of a lease ---------------------------------------------------------------------

    def session_recorded(self, event: Recorded) -> None:
        """Its record is on disk, or is not: put it to rest, unless somebody was faster."""
        session, lease = self.sessions.get(event.session_id), self.leases.get(event.session_id)
        if session is None or lease is None or lease.ticket != event.ticket:
            return
        lease.ticket = None
        used = lease.since != self._rests_since(session) or any(
            s.scratch and not s.branch and s.parent in (session.id, *session.tree.lines)
            for s in self.sessions.values()
        )
        if used or not self._may_be_put_to_rest(session):
            return
        if not event.lacks:
            self._put_to_rest(session)
            return
        assert self.limits.lease_s is not None
        lease.again_at = self.now + max(_AGAIN_S, LEFT * self.limits.lease_s)
        if event.lacks != lease.lacks:
            lease.lacks = event.lacks
            self._warn_of_record(session, event.lacks)

    def durability_changed(self, event: DurabilityChanged) -> None:
        super().durability_changed(event)
        if not event.text:
            for lease in self.leases.values():
                lease.again_at = 0.0

    def _put_to_rest(self, session: Session) -> None:
        """Give back its pages in every tier and its tensors, those of its branches with them."""
        del self.leases[session.id]
        pages = 0
        self.drop_kept(session, session.tree.kept)
        for part in self._parts(session):
            if not _holds(part):
                continue
            pages += sum(map(len, part.tables))
            part.dormant, part.slots, part.not_rebuilt = True, {}, None
            self.free(part, but_logs=True)
            self.to_clean.pop(part.id, None)
        session.lease_ended = session.dormant
        self.note(session, "put to rest", f"{pages} pages given back")
        self.publish(
            session,
            "lease",
            remaining_s=0.0,
            text=f"session {_named(session)} is at rest on disk: nobody used it for"
            f" {in_words(self.now - self._rests_since(session))}, and its lease has ended; it is"
            " listed as before, and computed again, bit for bit, when it is next needed",
        )

    # -- telling --------------------------------------------------------------------------------

    def _warn(self, session: Session, lease_s: float, left_s: float) -> None:
        self.note(session, "lease", f"{left_s:.0f} s are left")
        self.publish(
            session,
            "lease",
            remaining_s=left_s,
            text=f"session {_named(session)} has not been used for"
            f" {in_words(lease_s - left_s)}: in {in_words(left_s)} its lease, {in_words(lease_s)}"
            " on this server, ends, and it is put to rest on disk, to be computed again, bit for"
            f" bit, when it is next needed; {_KEEP}",
        )

    def _warn_of_record(self, session: Session, lacks: str) -> None:
        self.note(session, "lease", f"not recorded: {lacks}")
        self.publish(
            session,
            "lease",
            remaining_s=0.0,
            text=f"the lease of session {_named(session)} has ended, but it cannot be put to rest,"
            f" and stays in memory: {lacks}; session.save(path) keeps a copy of your own",
        )

    def check_leases(self) -> None:
        """Assert that what is dormant holds nothing, and that only what rests has a lease."""
        for session in self.sessions.values():
            assert not (session.dormant and session.tree.kept), f"{session.id} keeps stops"
            assert not session.lease_ended or session.dormant, f"{session.id} does not rest"
        for session_id, lease in self.leases.items():
            warned = lease.warned_at is not None
            assert warned or lease.ticket is None, f"{session_id} was not warned of its lease"


_KEEP = (
    "to keep it, use it: session.refresh(), or session.continue_(); session.pin() lets it have no"
    " lease, session.save(path) keeps a copy of your own"
)


def _holds(session: Session) -> bool:
    """Whether it holds pages or tensors: what stands before the first layer does not."""
    return not session.dormant and (session.forward, session.point) != (0, NOT_STARTED)


def _named(session: Session) -> str:
    return session.id if session.name == session.id else f"{session.id} ({session.name})"
