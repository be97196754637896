"""Requests about where a session's pages are, and what time does to sessions left alone.

A session that nobody has asked for in a while leaves the device, before anyone needs its room; one
whose owner says when it goes on comes back in time. Nothing of it is lost either way, and nothing
expires. How pages move is `paging`'s business.
"""

from __future__ import annotations

import math
from typing import Any

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadArgument,
    DjinnError,
    NotStopped,
    NotSupported,
    OutOfPages,
)
from kernel_server.state.events import PoolGrown, Requested, Ticked
from kernel_server.state.paging import Settling
from kernel_server.state.residency import Tier
from kernel_server.state.saving import Saving
from kernel_server.state.sessions import Session

#: Most seconds ahead that a hint may name: a day.
_MAX_HINT_S = 86400.0
#: A hinted session is brought back so many seconds before, and those its bytes take at this rate:
#: more than lies between two ticks of the clock.
_LEAD_S, _LEAD_BYTES_PER_S = 1.25, 10e9


#: Why pages move because somebody said so.
ASKED = "asked for"


class Residing(Saving):
    """Evict, restore, pin, hint; idle sessions."""

    def evict(self, event: Requested, request: m.Evict, session: Session) -> None:
        self._require_still(session)
        if session.pinned:
            raise NotSupported(f"session {session.id} is pinned to the device: unpin it first")
        slots = self.residency.slots[request.to]
        ways: tuple[Tier, ...] = ("host", request.to)  # pages reach the disk through the host
        for tier in ways:
            if self.allocated(tier) and self.residency.slots[tier].budget == 0:
                raise OutOfPages(f"the budget of the {tier} is 0: {self.more_room(tier)}", free=0)
        if not slots.capacity:
            flag = "--host-memory" if request.to == "host" else "--disk-memory"
            raise NotSupported(f"this server has no {request.to} tier: start it with {flag}")
        if request.to == "disk" and not self.residency.slots["host"].capacity:
            raise NotSupported("pages reach the disk through the host: start with --host-memory")
        self._require_below(session, request.to)
        self.require_way(session, request.to)
        for line in session.tree.lines:
            if line not in self.settling:
                self._ask_for(None, self.sessions[line], request.to, ASKED)
        self._ask_for(event.request_id, session, request.to, ASKED)

    def restore(self, event: Requested, request: m.Restore, session: Session) -> None:
        self._require_still(session)
        self.require_way(session, "device")
        if not self.make_room_at_rest(session):
            absent, free = len(self._absent(session)), self.residency.free("device")
            raise OutOfPages(
                f"{absent} pages of session {session.id} are to come, and {free} of"
                f" {self.residency.slots['device'].capacity} are free on the device and too few"
                " others can leave it: evict another session first, or continue this one,"
                " which makes room by itself",
                needed=absent,
                free=free,
                total=self.residency.slots["device"].capacity,
            )
        self._ask_for(event.request_id, session, "device", ASKED)

    def pin(self, event: Requested, request: m.Pin, session: Session) -> None:
        session.pinned = request.pinned
        self.publish(session, "changed")
        self.reply(event.request_id, m.SessionReply(session=self.info(session)))

    def hint(self, event: Requested, request: m.Hint, session: Session) -> None:
        seconds = request.resume_in_s
        if seconds is not None and not (math.isfinite(seconds) and 0 <= seconds <= _MAX_HINT_S):
            raise BadArgument(
                f"resume_in_s is {seconds}: give seconds from 0 to {_MAX_HINT_S:.0f}, or None"
            )
        session.resumes_at = None if seconds is None else self.now + seconds
        self.reply(event.request_id, m.SessionReply(session=self.info(session)))
        self._come_back_in_time(session)

    def settled(
        self, request_id: int | None, session: Session | None, error: DjinnError | None
    ) -> None:
        if session is None:
            error = NotStopped("the session was terminated while its pages moved")
        elif error is not None:
            self._note_once(session, "not settled", f"{error.code}: {error.message}")
            session.idled = False  # it may be tried again
        if request_id is None:
            return
        if session is None or error is not None:
            assert error is not None
            self.reply(request_id, m.ErrorReply(error=m.error_info(error)))
            return
        self.reply(request_id, m.SessionReply(session=self.told_info(session)))

    def _note_once(self, session: Session, name: str, detail: str) -> None:
        """Note what is found at every look at the clock when it is found otherwise."""
        if session.noted_last != (name, detail):
            session.noted_last = name, detail
            self.note(session, name, detail)

    def _require_still(self, session: Session) -> None:
        if session.status == "running":
            raise NotStopped(
                f"session {session.id} is running, its pages are in use: pause it first",
                status=session.status,
            )
        if session.id in self.settling:
            raise NotStopped(f"pages of session {session.id} are moving already: wait for that")

    def _require_below(self, session: Session, tier: Tier) -> None:
        """Room below for every page that has no copy there yet."""
        if tier == "host" and not self._dirty(session):
            return  # clean: it leaves at once
        used = self._used_by_others(session)
        mine = {page for table in session.tables for page in table} - used
        dirty = len(mine & self.residency.dirty - self.residency.moving)
        self._require_space(session, "host", dirty, self.room_to_leave(mine, asked=True))
        if tier == "disk":
            lacking = len(mine - self.residency.pages_in["disk"])
            self._require_space(session, "disk", lacking, self.residency.free("disk"))

    def _require_space(self, session: Session, tier: Tier, count: int, room: int) -> None:
        if count <= room:
            return
        raise OutOfPages(
            f"{count} pages of session {session.id} are to go down, and {room} fit there"
            + self._what_next(f"terminate a session, or {self.more_room(tier)}"),
            needed=count,
            free=room,
            **self._why_refused(),
        )

    def _ask_for(self, request_id: int | None, session: Session, tier: Tier, reason: str) -> None:
        self.settling[session.id] = Settling(request_id, tier, reason, reason == ASKED)
        self._settle()

    def _absent(self, session: Session) -> set[int]:
        return {page for table in session.tables for page in self.residency.absent(table)}

    def _room_from_others(self, session: Session, count: int, later_than_s: float) -> bool:
        """Have pages of others at rest leave that are not expected before so many seconds, if that
        alone and at once makes room for `count`."""
        lacking = count - self.residency.slots["device"].room
        if lacking <= 0:
            return True
        expected = {entry.session_id: entry for entry in self._resting(session, None)}
        leaving = [
            (page, other)
            for page, other in self._leavers(self.staying(session), session).droppable
            if not expected[other.id].runs and expected[other.id].expected_s > later_than_s
        ]
        if len(leaving) < lacking:
            return False
        self._drop_all(leaving[:lacking], f"room for session {session.id}")
        return True

    # -- time -----------------------------------------------------------------------------------

    def ticked(self, event: Ticked) -> None:
        """Let sessions that were left alone leave the device, and bring hinted ones back."""
        self.clean_rested()
        after = self.limits.idle_after_s
        for session in list(self.sessions.values()):
            if session.status == "running" or session.scratch or session.id in self.settling:
                continue
            if session.resumes_at is not None:
                self._come_back_in_time(session)
            elif after is not None and self.now - session.touched >= after:
                self._leave_idle(session)

    def _leave_idle(self, session: Session) -> None:
        there = self.residency.pages_in["device"]
        on_device = not all(map(there.isdisjoint, session.tables))
        below = self.residency.slots["host"].capacity
        if session.pinned or not on_device or not below or session.idled:
            return
        if (
            self._dirty(session)
            and "host" in self.refusals
            and (self.refuses("host") or self.copying)
        ):
            return  # its turn comes when the host takes pages again
        if session.stuck_at == self._where_pages_are():
            return  # with thousands of pages a look takes half a millisecond, twice a second
        dirty, idle_s = self._dirty(session), self.now - session.touched
        mine = {page for table in session.tables for page in table}
        room = self.room_to_leave(mine, asked=False)
        if len(dirty) > room:
            # it is looked at again when something has moved: room may have come
            session.stuck_at = self._where_pages_are()
            self._note_once(session, "idle", f"{len(dirty)} pages do not fit below, {room} do")
            return
        session.idled = True
        if session.noted_last is None or session.noted_last[0] != "not settled":
            self.note(session, "idle", idle_s)  # else it is tried again, twice a second
        self._ask_for(None, session, "host", f"left alone for {idle_s:.0f} s")

    def _where_pages_are(self) -> tuple[Any, ...]:
        """Differs whenever other pages may fit somewhere than before."""
        slots = self.residency.slots.values()
        return self.residency.changes, *((tier.capacity, tier.refusal) for tier in slots)

    def _come_back_in_time(self, session: Session) -> None:
        absent = self._absent(session)
        if session.resumes_at is None or not absent or session.id in self.settling:
            return
        if self.loss(session, absent) or (self.refuses("host") and self._deep(list(absent))):
            return
        left_s = session.resumes_at - self.now
        lead_s = _LEAD_S + len(absent) * self.shape.page_bytes / _LEAD_BYTES_PER_S
        if left_s <= lead_s and self._room_from_others(session, len(absent), max(left_s, _LEAD_S)):
            self._ask_for(None, session, "device", "its hint says that it goes on soon")

    def pool_grown(self, event: PoolGrown) -> None:
        """More of the host's pool is ready."""
        self.residency.slots["host"].grow(event.num_slots)
        for session in self.sessions.values():
            if session.status != "running":
                self.to_clean[session.id] = None
