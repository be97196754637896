"""Pages on their way: those a session needs come to the device, those nobody needs soon leave it.

Before a stretch is given to the engine the pages of the groups it reaches are brought in, in the
order it needs them; the engine starts while the later ones are under way. Room is made by dropping
pages that have a good copy below, and by copying others down. Pages of sessions at rest are copied
down beforehand (*write-behind*), so that most drops cost nothing. Who goes first is decided in
`eviction`, what is where is counted in `residency`; the bytes are the engine's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from kernel_server.protocol.errors import OutOfPages, SessionFailed
from kernel_server.protocol.location import Point, layers_begun, layers_executed
from kernel_server.state.core import Core
from kernel_server.state.events import CopiesDone
from kernel_server.state.eviction import Resting, eviction_order
from kernel_server.state.instructions import CopyPages
from kernel_server.state.pages import WritePlan
from kernel_server.state.residency import Move, Tier
from kernel_server.state.sessions import Session

#: Pages in one copy: the first of them can be used before the last has come.
_RUN = 16


@dataclass(slots=True)
class Copying:
    """One copy under way."""

    moves: tuple[Move, ...]
    #: whose swap this is, and why; None for write-behind
    session_id: str | None
    reason: str = ""


@dataclass(slots=True)
class Settling:
    """A request that is answered when its session's pages are where it wants them."""

    #: None: nobody asked, it is policy
    request_id: int | None
    tier: Literal["device", "host", "disk"]


@dataclass(slots=True)
class Room:
    """What a stretch needs of the device before it may begin."""

    #: pages to come from below, by group, in the order of need
    absent: dict[int, list[int]] = field(default_factory=dict)
    fresh: int = 0

    @property
    def total(self) -> int:
        return self.fresh + sum(map(len, self.absent.values()))


class Paging(Core):
    """Brings pages in before they are needed, and lets them go."""

    # -- before a stretch -------------------------------------------------------------------

    def room_for(self, session: Session, until: Point, plan: WritePlan) -> Room:
        """What the session needs on the device to run to `until`."""
        room = Room(fresh=plan.num_pages)
        if not self.residency.num_absent:
            return room
        for group in self._groups(session.point, until):
            absent = [p for p in session.tables[group] if not self.residency.is_resident(p)]
            if absent:
                room.absent[group] = absent
        return room

    def bring(self, session: Session, until: Point, plan: WritePlan) -> dict[int, int] | None:
        """Have the session's pages brought; the ticket to wait for, by group.

        None: they cannot come yet, and the session waits in `arriving`. Raises OutOfPages when
        they can never come as things are, and changes nothing then.
        """
        room = self.room_for(session, until, plan)
        lost = [p for pages in room.absent.values() for p in pages if p in self.lost]
        if lost:
            error = self.lost[lost[0]]
            raise SessionFailed(f"{len(lost)} pages of session {session.id} are lost: {error}")
        free = self.residency.free("device")
        if (
            room.total > free and not self._make_room(room.total - free, session, until)
        ) or self._fetch_from_disk(session, room):
            if not self.copying:
                raise self._out_of_pages(room.total, 0)
            self.arriving[session.id] = None
            return None
        for pages in room.absent.values():
            self._copy(session, pages, "host", "device", "needed")
        return self._tickets(session, until)

    def _tickets(self, session: Session, until: Point) -> dict[int, int]:
        """The newest copy that a group of the session waits for."""
        found: dict[int, int] = {}
        if self.inbound:
            for group in self._groups(session.point, until):
                under_way = [self.inbound[p] for p in session.tables[group] if p in self.inbound]
                if under_way:
                    found[group] = max(under_way)
        return found

    def _groups(self, point: Point, until: Point) -> range:
        """Page groups that layers between two points use."""
        num_layers, size = self.shape.num_layers, self.shape.layers_per_group
        first, last = layers_executed(point, num_layers), layers_begun(until, num_layers)
        return range(first // size, -(-last // size)) if first < last else range(0)

    def will_write(self, session: Session, until: Point) -> None:
        """The stretch writes the pages of its tokens: their copies are stale."""
        first = session.first_token // self.shape.page_tokens
        for group in self._groups(session.point, until):
            for page in session.tables[group][first:]:
                self.residency.write(page)

    # -- making room --------------------------------------------------------------------------

    def _make_room(self, count: int, whom: Session, until: Point) -> bool:
        """Free so many slots of the device; False when they come free a little later.

        Raises OutOfPages when they cannot.
        """
        needed = {p for g in self._groups(whom.point, until) for p in whom.tables[g]}
        droppable, copyable, coming = list[int](), list[int](), 0
        for page in self._by_expendability(whom):
            if page in needed:
                continue
            place = self.residency.place(page)
            if place.device is None:
                continue
            if place.moving:
                # on its way down, it can be dropped once it is there
                coming += page not in self.inbound
            elif self.residency.can_drop(page):
                droppable.append(page)
            else:
                copyable.append(page)
        lacking = count - len(droppable)
        below = self.residency.free("host") + self._reclaimable_host()
        if lacking > coming + min(len(copyable), below):
            raise self._out_of_pages(count, len(droppable))
        for page in droppable[:count]:
            self.drop(page)
        if lacking <= 0:
            return True
        if lacking > coming:
            self._push_down(copyable[: lacking - coming], whom, "room for another session")
        return False

    def _out_of_pages(self, count: int, droppable: int) -> OutOfPages:
        have = self.residency.slots
        return OutOfPages(
            f"needs {count} more pages on the device, and {droppable} of"
            f" {have['device'].capacity} can leave it (host: {have['host'].num_free} of"
            f" {have['host'].capacity} free, disk: {have['disk'].num_free} of"
            f" {have['disk'].capacity}): terminate a session, or start the server with more"
            " --kv-memory or --host-memory",
            needed=count,
            free=droppable,
            total=have["device"].capacity,
        )

    def _by_expendability(self, whom: Session | None) -> Iterable[int]:
        """Pages of sessions that do not run, those that are missed least first, each once."""
        in_engine = self.slot.session.id if self.slot is not None else None
        resting = [
            Resting(
                session_id=s.id,
                runs=s.status == "running",
                finished=s.status == "finished",
                pinned=s.pinned,
                num_pages=sum(map(len, s.tables)),
                idle_s=max(self.now - s.touched, 0.0),
                resumes_in_s=None if s.resumes_at is None else s.resumes_at - self.now,
            )
            for s in self.sessions.values()
            if s.id != in_engine and s is not whom
        ]
        shared: list[int] = []
        seen: set[int] = set()
        for entry in eviction_order(resting):
            session = self.sessions[entry.session_id]
            for group in self._least_needed_first(session):
                for page in session.tables[group]:
                    if page in seen:
                        continue
                    seen.add(page)
                    if self.pool.owners(page) > 1:
                        shared.append(page)
                    else:
                        yield page
        in_use = {p for s in self._kept(whom, in_engine) for t in s.tables for p in t}
        if self.slot is not None:
            in_use.update(self.slot.sources)
        yield from (page for page in shared if page not in in_use)

    def _kept(self, whom: Session | None, in_engine: str | None) -> list[Session]:
        return [s for s in self.sessions.values() if s is whom or s.pinned or s.id == in_engine]

    def _least_needed_first(self, session: Session) -> list[int]:
        """Groups in the reverse of the order in which going on needs them."""
        layer = layers_executed(session.point, self.shape.num_layers)
        if layer >= self.shape.num_layers:
            layer = 0  # the next layer it needs is the first of the next forward
        first, count = layer // self.shape.layers_per_group, self.shape.num_groups
        return [(first + i) % count for i in range(count)][::-1]

    def _push_down(self, pages: list[int], session: Session | None, reason: str) -> int:
        """Copy pages to the host, as many as there is room for; returns how many."""
        room = self.residency.free("host")
        if room < len(pages):
            room += self._free_host(len(pages) - room)
        going = pages[:room]
        self._copy(session, going, "device", "host", reason)
        return len(going)

    # -- host and disk ------------------------------------------------------------------------

    def _reclaimable_host(self) -> int:
        """Slots of the host that could be had by moving pages on to the disk."""
        return min(self.residency.free("disk"), self.residency.slots["host"].used)

    def _free_host(self, count: int) -> int:
        """Free slots of the host at once, where the disk has a copy; have others copied there."""
        freed, pushed = 0, list[int]()
        for page in self._by_expendability(None):
            place = self.residency.place(page)
            if place.host is None or place.moving:
                continue
            if place.disk is not None and freed < count:
                self.residency.drop(page, "host")
                freed += 1
            elif place.disk is None and place.device is None and len(pushed) < count - freed:
                pushed.append(page)
        pushed = pushed[: self.residency.free("disk")]
        self._copy(None, pushed, "host", "disk", "room on the host")
        return freed

    def _fetch_from_disk(self, session: Session, room: Room) -> bool:
        """Have pages that are only on the disk read to the host; True while some are missing."""
        missing = [
            p
            for pages in room.absent.values()
            for p in pages
            if self.residency.place(p).host is None
        ]
        waiting = [
            p
            for pages in room.absent.values()
            for p in pages
            if self.residency.place(p).moving and p not in self.inbound
        ]
        if not missing:
            return bool(waiting)
        still = [p for p in missing if not self.residency.place(p).moving]
        free = self.residency.free("host")
        if len(still) > free:
            free += self._free_host(len(still) - free)
        self._copy(session, still[:free], "disk", "host", "needed")
        return True

    # -- copies ---------------------------------------------------------------------------------

    def _copy(
        self, session: Session | None, pages: list[int], source: Tier, target: Tier, reason: str
    ) -> None:
        """Begin copies in runs of a few pages."""
        for start in range(0, len(pages), _RUN):
            run = pages[start : start + _RUN]
            moves = tuple(self.residency.begin(page, source, target) for page in run)
            self._tickets_made += 1
            ticket = self._tickets_made
            owner = None if session is None or reason == "write-behind" else session.id
            self.copying[ticket] = Copying(moves, owner, reason)
            if target == "device":
                for page in run:
                    self.inbound[page] = ticket
            self.emit(
                CopyPages(
                    ticket=ticket,
                    way=f"{source}-{target}",
                    moves=tuple((move.source_slot, move.target_slot) for move in moves),
                )
            )

    def copies_done(self, event: CopiesDone) -> None:
        """Count what arrived, and let those that waited for it go on."""
        copying = self.copying.pop(event.ticket)
        for move in copying.moves:
            self.inbound.pop(move.page, None)
            if event.error is None:
                self.residency.done(move)
                continue
            self.residency.failed(move)
            if move.source == "disk" and event.error.code == "TornPage":
                self.lost[move.page] = event.error.message
        self._tell(copying, event)
        for session_id in list(self.arriving):
            del self.arriving[session_id]
            session = self.sessions[session_id]
            self.queue(session)
        self._settle()

    def _tell(self, copying: Copying, event: CopiesDone) -> None:
        session = self.sessions.get(copying.session_id or "")
        if session is None or session.scratch:
            return
        self.note(session, "swapped", (copying.reason, event.ticket, event.nbytes))
        rate = event.nbytes / event.seconds / 1e9 if event.seconds > 0 else 0.0
        move = copying.moves[0]
        what = f"{len(copying.moves)} pages {move.source} to {move.target}"
        if event.error is not None:
            what += f" failed: {event.error.message}"
        self.publish(
            session,
            "swapped",
            done=event.nbytes,
            text=f"{what}, {rate:.1f} GB/s: {copying.reason}",
        )

    # -- at rest --------------------------------------------------------------------------------

    def write_behind(self) -> None:
        """Copy pages of sessions at rest to the host, a few at a time."""
        if not self.residency.slots["host"].capacity:
            return
        room = self.limits.copies_in_flight - len(self.copying)
        while room > 0 and self.to_clean:
            session = self.sessions.get(next(iter(self.to_clean)))
            pages = [] if session is None or session.status == "running" else self._dirty(session)
            free = self.residency.free("host")
            if not pages or not free:
                del self.to_clean[next(iter(self.to_clean))]
                continue
            self._copy(session, pages[: min(_RUN, free)], "device", "host", "write-behind")
            room -= 1

    def _dirty(self, session: Session) -> list[int]:
        found = []
        for table in session.tables:
            for page in table:
                place = self.residency.place(page)
                if place.device is not None and not place.clean and not place.moving:
                    found.append(page)
        return found

    # -- asked for ------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Answer those whose pages are where they wanted them; push on with the others."""
        for session_id in list(self.settling):
            session = self.sessions.get(session_id)
            if session is None or self._settled(session, self.settling[session_id].tier):
                settling = self.settling.pop(session_id)
                self.settled(settling.request_id, session)

    def _settled(self, session: Session, tier: Tier) -> bool:
        """Take the next step towards having all the session's pages in a tier; True: they are."""
        pages = list(dict.fromkeys(p for table in session.tables for p in table))
        places = {p: self.residency.place(p) for p in pages}
        if any(place.moving for place in places.values()):
            return False
        if tier == "device":
            absent = [p for p in pages if places[p].device is None]
            on_disk = [p for p in absent if places[p].host is None]
            if not absent:
                return True
            if on_disk:
                free = self.residency.free("host")
                self._copy(session, on_disk[:free], "disk", "host", "restore")
                return not free
            free = self.residency.free("device")
            self._copy(session, absent[:free], "host", "device", "restore")
            return not free
        mine = [p for p in pages if not self._used_by_others(p, session)]
        dirty = [p for p in mine if places[p].device is not None and not places[p].clean]
        if dirty:
            return not self._push_down(dirty, session, f"evict to {tier}")
        if tier == "disk":
            high = [p for p in mine if places[p].disk is None]
            free = self.residency.free("disk")
            if high and free:
                self._copy(session, high[:free], "host", "disk", "evict to disk")
                return False
            for page in mine:
                if places[page].disk is not None and places[page].host is not None:
                    self.residency.drop(page, "host")
        for page in mine:
            if self.residency.can_drop(page):
                self.drop(page)
        return True

    def _used_by_others(self, page: int, session: Session) -> bool:
        """Whether a session that runs needs this page on the device."""
        if self.pool.owners(page) == 1:
            return False
        if self.slot is not None and page in self.slot.sources:
            return True
        return any(
            other.status == "running" and any(page in table for table in other.tables)
            for other in self.sessions.values()
            if other is not session
        )

    def settled(self, request_id: int | None, session: Session | None) -> None:
        """Answer a request about residency; defined by who takes requests."""
        raise NotImplementedError
