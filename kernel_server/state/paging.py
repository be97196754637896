"""Pages on their way: those a session needs come to the device, or go where somebody wants them.

Before a stretch is given to the engine the pages of the groups it reaches are brought in, in the
order it needs them; the engine starts while the later ones are under way. How room is made is
decided in `leaving`, and in `exchanging` where the tiers below are full too; who goes first in
`eviction`; what is where is counted in `residency`; the bytes are the engine's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kernel_server.protocol.errors import DjinnError, NotStopped, OutOfPages, SessionFailed
from kernel_server.protocol.location import Point, layers_begun, layers_executed
from kernel_server.state.copies import WHOLE_RUN
from kernel_server.state.events import CopiesDone
from kernel_server.state.exchanging import Exchanging
from kernel_server.state.pages import WritePlan
from kernel_server.state.residency import Tier
from kernel_server.state.sessions import Session


@dataclass(slots=True)
class Settling:
    """A request that is answered when its session's pages are where it wants them."""

    #: None: nobody asked, it is policy
    request_id: int | None
    tier: Tier
    #: what its events say
    reason: str
    #: whether an owner wants it; policy gives up no copies of others for it
    asked: bool
    #: of pages that are to be on the device, why some of them left it again
    left_for: str = ""


@dataclass(slots=True)
class Room:
    """What a stretch needs of the device before it may begin."""

    #: pages to come from below, by group, in the order of need
    absent: dict[int, list[int]] = field(default_factory=dict)
    fresh: int = 0

    @property
    def total(self) -> int:
        return self.fresh + sum(map(len, self.absent.values()))


class Paging(Exchanging):
    """Brings pages in before they are needed, and moves them when asked."""

    # -- before a stretch -------------------------------------------------------------------

    def room_for(self, session: Session, until: Point, plan: WritePlan) -> Room:
        """What the session needs on the device to run to `until`."""
        room = Room(fresh=plan.num_pages)
        if not self.residency.num_absent:
            return room
        for group in self._groups(session.point, until):
            absent = self.residency.absent(session.tables[group])
            if absent:
                room.absent[group] = absent
        return room

    def bring(
        self, session: Session, until: Point, plan: WritePlan
    ) -> tuple[tuple[int, int], ...] | None:
        """Have the session's pages brought; (group, ticket) of each copy to wait for.

        None: they cannot come yet, and the session waits in `arriving`. Raises OutOfPages when
        they can never come as things are, and changes nothing then.
        """
        if not self.residency.num_absent and plan.num_pages <= self.residency.free("device"):
            return self._tickets(session, until, plan)  # every decode that fits
        room = self.room_for(session, until, plan)
        if loss := self.loss(session, (p for pages in room.absent.values() for p in pages)):
            raise loss
        lacking = room.total - self.residency.slots["device"].room if room.total else 0
        waits = self.exchange not in (None, session.id) and lacking > 0 and bool(self.copying)
        if waits or self._must_wait(session, room, lacking, until):
            if not self.copying:
                self._exchanged(session)
                raise self._out_of_pages(room.total, 0)
            self.arriving[session.id] = None
            return None
        return self._tickets(session, until, plan)

    def _exchanged(self, session: Session) -> None:
        """Its exchange, if it was for this session, has come to its end."""
        if self.exchanging == session.id:
            self.exchanging = None

    def _must_wait(self, session: Session, room: Room, lacking: int, until: Point) -> bool:
        """Have room made and pages brought; True while some have not begun their way."""
        absent = [page for pages in room.absent.values() for page in pages]
        needed = self._needed(session, until)
        if lacking > 0:
            try:
                if not self._make_room(lacking, session, needed):
                    return True
            except OutOfPages:
                # pages on their way can leave, or go elsewhere, once they are there
                if not self._exchange(session, absent, room.fresh, needed) and not self.copying:
                    raise
                return True
        return bool(absent) and self._let_come(session, absent, needed)

    def _tickets(
        self, session: Session, until: Point, plan: WritePlan
    ) -> tuple[tuple[int, int], ...] | None:
        """The copies that each group of the session waits for; None, and the session waits in
        `arriving`, where pages that are still to come would be copied first."""
        found: list[tuple[int, int]] = []
        if self.inbound:
            for group in self._groups(session.point, until):
                table = session.tables[group]
                # each of them: one may fail although a later one is made
                under_way = {self.inbound[page] for page in table if page in self.inbound}
                found += [(group, ticket) for ticket in sorted(under_way)]
        if found and plan.shared:
            # a copy that fails would leave a fresh page without what was to be in it
            self.arriving[session.id] = None
            return None
        self._exchanged(session)
        return tuple(found)

    def _needed(self, session: Session, until: Point) -> set[int]:
        return {p for g in self._groups(session.point, until) for p in session.tables[g]}

    def _groups(self, point: Point, until: Point) -> range:
        """Page groups that layers between two points use."""
        num_layers, size = self.shape.num_layers, self.shape.layers_per_group
        first, last = layers_executed(point, num_layers), layers_begun(until, num_layers)
        return range(first // size, -(-last // size)) if first < last else range(0)

    def will_write(self, session: Session, until: Point) -> None:
        """The stretch writes the pages of its tokens: their copies are stale."""
        if not self.residency.slots["host"].capacity:
            return  # there are no copies
        first = session.first_token // self.shape.page_tokens
        for group in self._groups(session.point, until):
            for page in session.tables[group][first:]:
                self.residency.write(page)

    # -- copies ---------------------------------------------------------------------------------

    def copies_done(self, event: CopiesDone) -> None:
        """Count what arrived, and let those that waited for it go on."""
        copying = self.copying.pop(event.ticket)
        if copying.moves.target == "device":
            # a page of this number may be another one by now, on its way by another copy
            coming = self.inbound
            for page in [p for p in copying.moves.pages if coming.get(p) == event.ticket]:
                del coming[page]
        if event.error is None:
            self._made(copying.moves)
        else:
            self._not_made(copying, event.error)
        self._tell(copying, event)
        for session_id in list(self.arriving):
            del self.arriving[session_id]
            session = self.sessions[session_id]
            # others would take the slots that its exchange goes through
            self.queue(session, first=session_id == self.exchange)
        self._settle(after_copy=event.error is None)

    # -- asked for ------------------------------------------------------------------------------

    def _settle(self, *, after_copy: bool = False) -> None:
        """Answer those whose pages are where they wanted them, or cannot come there; push on with
        the others.

        after_copy: a copy was just made, and nothing else has happened. Whoever waits for another
        one has nothing to decide: to go through all its pages at every copy was most of what a swap
        of many pages took the state (notebooks/LOG.md).
        """
        for session_id in list(self.settling):
            session, settling = self.sessions.get(session_id), self.settling[session_id]
            runs = session is not None and session.status == "running"
            if after_copy and session is not None and not runs and self._moves(session):
                continue
            error = None
            try:
                if session is not None and not self._settled(session, settling):
                    continue
            except (OutOfPages, SessionFailed, NotStopped) as found:
                error = found
            del self.settling[session_id]
            self.settled(settling.request_id, session, error)

    def _moves(self, session: Session) -> bool:
        """Whether a page of it is under way."""
        return not all(map(self.residency.moving.isdisjoint, session.tables))

    def _settled(self, session: Session, settling: Settling) -> bool:
        """Take the next step towards having all the session's pages in a tier; True: they are.

        Raises OutOfPages where a tier on the way refuses, or is full and nothing is under way that
        could change that; SessionFailed where a page is lost, NotStopped where the session went on
        and its pages were to leave.
        """
        tier, reason, asked = settling.tier, settling.reason, settling.asked
        if tier != "device" and session.status == "running":
            raise NotStopped(
                f"session {session.id} went on while its pages were leaving: pause it, then repeat",
                status=session.status,
            )
        self.require_way(session, tier)
        if self._moves(session):
            return False
        residency, pages = self.residency, _pages_of(session)
        if tier == "device":
            absent = residency.absent(pages)
            if not absent:
                return True
            if settling.left_for:  # or the two would take the room by turns, for ever
                raise OutOfPages(
                    f"pages of session {session.id} left the device again ({settling.left_for}),"
                    f" and {len(absent)} are absent now: restore it later, or continue it, and it"
                    " takes its turn",
                    needed=len(absent),
                    free=residency.free("device"),
                )
            if asked and len(absent) > residency.free("device"):
                self.make_room_at_rest(session)
            if deep := self._deep(absent):
                staying = set(pages)
                if not self.clear_host(len(deep), staying):
                    return False  # one by one they would come, and give up their own copies
                self._let_come(session, absent, staying, reason, WHOLE_RUN)
            else:
                free = residency.free("device")
                self._copy(session, absent[:free], "host", "device", reason, run=WHOLE_RUN)
            self._require_under_way(session, tier, absent)
            return False
        used = self._used_by_others(session)
        mine = pages if used.isdisjoint(pages) else [p for p in pages if p not in used]
        if not residency.dirty.isdisjoint(mine):
            dirty = [page for page in mine if page in residency.dirty]
            going = [(page, session) for page in dirty]
            self._push_down(going, reason, set(mine), run=WHOLE_RUN, asked=asked)
            self._require_under_way(session, "host", dirty)
            return False
        if tier == "disk":
            places = {p: residency.place(p) for p in mine}
            high = [p for p in mine if places[p].disk is None]
            if high:
                self._copy(session, high[: residency.free("disk")], "host", "disk", reason)
                self._require_under_way(session, "disk", high)
                return False
            for page in mine:
                if places[page].disk is not None and places[page].host is not None:
                    residency.drop(page, "host")
        # nothing is under way and nothing dirty: what is there has a good copy below
        there = residency.pages_in["device"]
        on_device = mine if there.issuperset(mine) else [p for p in mine if p in there]
        self._drop(session, on_device, reason)
        return True

    def _require_under_way(self, session: Session, tier: Tier, pages: list[int]) -> None:
        """Raise OutOfPages where pages are to go to a tier, and no copy is under way after which
        there might be more room."""
        if self.copying:
            return
        slots = self.residency.slots
        count = "1 page" if len(pages) == 1 else f"{len(pages)} pages"
        raise OutOfPages(
            f"{count} of session {session.id} cannot go to the {tier}: nothing can"
            f" make room (device: {slots['device'].room} of {slots['device'].capacity}"
            f" free, host: {slots['host'].room} of {slots['host'].capacity}, disk:"
            f" {slots['disk'].room} of {slots['disk'].capacity})"
            + self._what_next(f"terminate a session, or {self.more_room(tier)}"),
            needed=len(pages),
            free=max(0, slots[tier].room),
            **self._why_refused(),
        )

    def require_way(self, session: Session, tier: Tier) -> None:
        """Raise unless the session's pages can go to a tier, as far as what failed tells.

        Raises SessionFailed for pages that are lost, OutOfPages where a tier on the way refuses.
        """
        barred = self.refuses("host") or (tier == "disk" and self.refuses("disk"))
        if not barred and not (self.lost and tier == "device"):
            return
        residency = self.residency
        places = [(page, residency.place(page)) for page in _pages_of(session)]
        if tier == "device":
            absent = [page for page, place in places if place.device is None]
            if loss := self.loss(session, absent):
                raise loss
            stuck = len(self._deep(absent)) if self.refuses("host") else 0
        else:
            used = self._used_by_others(session)
            still = [
                (page, place) for page, place in places if not place.moving and page not in used
            ]
            stuck = 0
            if self.refuses("host"):
                stuck = sum(place.device is not None and not place.clean for _, place in still)
            if tier == "disk" and self.refuses("disk") and not stuck:
                stuck = sum(place.disk is None for _, place in still)
        if stuck:
            pages = "1 page" if stuck == 1 else f"{stuck} pages"
            raise OutOfPages(
                f"{pages} of session {session.id} cannot go to the {tier}" + self._what_next(""),
                needed=stuck,
                free=0,
                **self._why_refused(),
            )

    def _used_by_others(self, session: Session) -> set[int]:
        """The pages that other sessions which run need on the device; it may share some."""
        used = set(self.slot.sources) if self.slot is not None else set()
        for other in self.sessions.values():
            if other.status == "running" and other is not session:
                used.update(*other.tables)
        return used

    def settled(
        self, request_id: int | None, session: Session | None, error: DjinnError | None
    ) -> None:
        """Answer a request about residency; defined by who takes requests."""
        raise NotImplementedError


def _pages_of(session: Session) -> list[int]:
    """Its pages; no table names one twice, and no two the same."""
    return [page for table in session.tables for page in table]
