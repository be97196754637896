"""Pages that leave: room on the device and on the host, and copying down beforehand.

Room is made by dropping pages that have a good copy below, and by copying others down. Pages of
sessions at rest are copied down beforehand (*write-behind*), so that most drops cost nothing: a
page stays on the device until somebody needs its room. How much of the device cannot leave at once
is kept between two marks; above the higher one the host gives pages to the disk to take more. Who
goes first is decided in `eviction`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field

from kernel_server.protocol.errors import OutOfPages
from kernel_server.protocol.location import layers_executed
from kernel_server.state.copies import LONG_RUN, RUN, WRITE_BEHIND, by_session
from kernel_server.state.eviction import Resting, eviction_order
from kernel_server.state.refusing import Refusing
from kernel_server.state.residency import TIERS, Tier
from kernel_server.state.sessions import Session

#: A copy is made beforehand beside one of so many decodes. Beside one of four the bus alone costs a
#: decode 2 % (18 GB/s, H200), all of it 5 %; beside one of eight a session of 1.7 GB is copied
#: within half a second, long before anyone wants its room.
DECODES_BETWEEN = 8
#: Why a page goes to the disk that nobody asked to go there.
_HOST_ROOM = "room on the host"
_BUDGET = "the budget was lowered"
#: What a server is started with, by tier.
FLAGS: dict[Tier, str] = {
    "device": "--kv-memory", "host": "--host-memory", "disk": "--disk-memory",
}  # fmt: skip


@dataclass(slots=True)
class Leavers:
    """Pages that may leave the device, with whose they are, those missed least first."""

    #: at once
    droppable: list[tuple[int, Session]] = field(default_factory=list)
    #: after a copy
    copyable: list[tuple[int, Session]] = field(default_factory=list)
    #: on their way down already
    coming: int = 0


class Leaving(Refusing):
    """Decides what leaves the device, the host and the disk."""

    @property
    def exchange(self) -> str | None:
        """The session for which pages change places now."""
        session = self.sessions.get(self.exchanging or "")
        if session is None or session.status != "running":
            self.exchanging = None
        return self.exchanging

    # -- the device ---------------------------------------------------------------------------

    def _leavers(
        self, needed: Iterable[int] = (), whom: Session | None = None, enough: int | None = None
    ) -> Leavers:
        """What may leave the device so that `whom` can run, without the pages `needed`.

        enough: nothing else is looked for once so many can leave at once.
        """
        found, residency = Leavers(), self.residency
        there, dirty, moving = residency.pages_in["device"], residency.dirty, residency.moving
        there = there.difference(needed)
        for page, session in self._by_expendability(whom):
            if page not in there:
                continue
            if page in moving:
                # on its way down, it can be dropped once it is there
                found.coming += page not in self.inbound
            elif page in dirty:
                found.copyable.append((page, session))
            else:
                found.droppable.append((page, session))
                if len(found.droppable) == enough:
                    break
        return found

    def _make_room(self, count: int, whom: Session, needed: Set[int]) -> bool:
        """Free so many slots of the device; False when they come free a little later.

        Raises OutOfPages when they cannot.
        """
        found = self._leavers(needed, whom, enough=count)
        lacking = count - len(found.droppable)
        below = self.room_below(needed)
        if lacking > found.coming + min(len(found.copyable), below):
            raise self._out_of_pages(count, len(found.droppable))
        self._drop_all(found.droppable[:count], f"room for session {whom.id}")
        if lacking <= 0:
            return True
        if lacking > found.coming:
            going = found.copyable[: lacking - found.coming]
            self._push_down(going, f"room for session {whom.id}", needed)
        return False

    def make_room_at_rest(self, session: Session) -> bool:
        """Have pages of others at rest leave, at once or once they are copied, so that all of a
        session's can come; False, and nothing is changed, if those are too few.

        They go where the host has free slots: nothing goes deeper for them.
        """
        residency, device = self.residency, self.residency.slots["device"]
        if not any(map(residency.absent, session.tables)):
            return True
        coming = self._coming_beside(session)
        # of two that come at the same time neither sends the other away, nor has its room
        absent = {p for one in coming for table in one.tables for p in residency.absent(table)}
        if len(absent) <= device.room:
            return True
        found = self._leavers(self.staying(session), session)
        lacking = len(absent) - device.room - len(found.droppable)
        deep = len(absent - residency.pages_in["host"])  # these pass through the host
        below = 0 if self.refuses("host") else max(0, self.host_room() - deep)
        if lacking > found.coming + min(len(found.copyable), below):
            return False
        reason = f"room for session {session.id}"
        self._drop_all(found.droppable[: len(absent) - device.room], reason)
        if lacking > found.coming:
            self._push_down(found.copyable[: lacking - found.coming], reason)
        return True

    def _coming_beside(self, session: Session) -> list[Session]:
        """The session and all others whose pages are to come to the device."""
        coming = {other for other, one in self.settling.items() if one.tier == "device"}
        return [self.sessions[one] for one in {session.id, *coming} & self.sessions.keys()]

    def staying(self, session: Session) -> set[int]:
        """Pages that are not to leave for a session that does not run: of those that run, and of
        those that come as it does, whoever shares them."""
        running = (one for one in self.sessions.values() if one.status == "running")
        stay = itertools.chain(running, self._coming_beside(session))
        return {page for one in stay for table in one.tables for page in table}

    def _out_of_pages(self, count: int, droppable: int) -> OutOfPages:
        have = self.residency.slots
        return OutOfPages(
            f"needs {count} more pages on the device, and {droppable} of"
            f" {have['device'].capacity} can leave it (host: {have['host'].num_free} of"
            f" {have['host'].capacity} free, disk: {have['disk'].num_free} of"
            f" {have['disk'].capacity})"
            + self._what_next(f"terminate a session, or {self.more_room('device', 'host')}"),
            needed=count,
            free=droppable,
            total=have["device"].capacity,
            **self._why_refused(),
        )

    def _by_expendability(self, whom: Session | None) -> Iterator[tuple[int, Session]]:
        """Pages of sessions that are not in the engine, those missed least first, each once."""
        in_engine = self.slot.session.id if self.slot is not None else None
        shared: list[tuple[int, Session]] = []
        seen: set[int] = set()
        for entry in eviction_order(self._resting(whom, in_engine)):
            session = self.sessions[entry.session_id]
            for group in self._least_needed_first(session):
                for page in session.tables[group]:
                    if page in seen:
                        continue
                    seen.add(page)
                    if self.pool.owners(page) > 1:
                        shared.append((page, session))
                    else:
                        yield page, session
        in_use = {p for s in self._kept(whom, in_engine) for t in s.tables for p in t}
        if self.slot is not None:
            in_use.update(self.slot.sources)
        yield from (item for item in shared if item[0] not in in_use)

    def _resting(self, whom: Session | None, in_engine: str | None) -> list[Resting]:
        return [
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

    def _kept(self, whom: Session | None, in_engine: str | None) -> list[Session]:
        return [s for s in self.sessions.values() if s is whom or s.pinned or s.id == in_engine]

    def _least_needed_first(self, session: Session) -> list[int]:
        """Groups in the reverse of the order in which going on needs them."""
        layer = layers_executed(session.point, self.shape.num_layers)
        if layer >= self.shape.num_layers:
            layer = 0  # the next layer it needs is the first of the next forward
        first, count = layer // self.shape.layers_per_group, self.shape.num_groups
        return [(first + i) % count for i in range(count)][::-1]

    def _push_down(
        self,
        pages: list[tuple[int, Session]],
        reason: str,
        needed: Set[int] = frozenset(),
        *,
        run: int | None = None,
        asked: bool | None = None,
    ) -> int:
        """Copy pages to the host, as many as there is room for; returns how many.

        needed: pages that are not to go deeper for it. run: pages in one copy. asked: `needed`
        alone are to leave the device, so that the host's copies of what stays may go to the disk;
        where that is full they may be given up, if somebody asked.
        """
        if self.refuses("host"):
            return 0  # to free slots of it would be in vain
        lacking = len(pages) - self.residency.slots["host"].room + self._passage
        if lacking > 0:
            self._free_host(lacking, needed, spare=asked is not None)
            if asked and not self.host_room() and not self.copying:
                # all of it copies of pages that the device has, and the disk is full
                self._let_copies_go("host", lacking, keep=needed)
        going = pages[: self.host_room()]
        for session, some in by_session(going):
            self._copy(session, some, "device", "host", reason, run=run)
        return len(going)

    # -- the host -----------------------------------------------------------------------------

    @property
    def _passage(self) -> int:
        """Slots of the host that pages on their way from the disk pass through, always free."""
        slots = self.residency.slots
        return 1 if slots["disk"].capacity and slots["host"].capacity > 1 else 0

    def host_room(self) -> int:
        """Slots of the host that pages going down may take."""
        return max(0, self.residency.slots["host"].room - self._passage)

    def room_below(self, keep: Set[int] = frozenset()) -> int:
        """The same, with the slots that come free once others have gone to the disk.

        keep: pages that are not to go there.
        """
        if self.refuses("host"):
            return 0
        return self.host_room() + self.residency.reclaimable_host(keep)

    def room_to_leave(self, mine: Set[int], *, asked: bool) -> int:
        """Slots of the host that `mine`, pages on the device, may take: those with which room can
        be made, and those of copies that others have of pages on the device.

        asked: whether such copies may be given up; else they may only go to the disk.
        """
        residency = self.residency
        device, host, disk = (residency.pages_in[tier] for tier in TIERS)
        below = self.room_below(mine)
        if self.refuses("host"):
            return below
        spare = len((host & device) - disk - residency.moving - mine)
        if not asked:
            alone = len(host - device - disk - residency.moving - mine)
            spare = min(spare, max(0, residency.free("disk") - alone))
        return below + spare

    def clear_host(self, count: int, keep: Set[int]) -> bool:
        """Make room on the host for `count` pages, of copies that are spare or can go to the disk;
        False while it is being made, True when there is no more to be had."""
        if self.refuses("host") or count <= self.host_room():
            return True
        if not self._is_clearing_host():
            self._free_host(count - self.host_room(), keep, spare=True)
        return count <= self.host_room() or not self._is_clearing_host()

    def _is_clearing_host(self) -> bool:
        return any(copying.reason == _HOST_ROOM for copying in self.copying.values())

    def _free_host(
        self, count: int, needed: Set[int] = frozenset(), *, spare: bool = False
    ) -> None:
        """Free slots of the host at once, where the disk has a copy; have others copied there.

        spare: also copies of pages on the device.
        """
        freed, pushed = 0, dict[int, None]()
        device, host, disk = (self.residency.pages_in[tier] for tier in TIERS)
        going: Iterable[int] = (page for page, _ in self._by_expendability(None))
        if spare:  # of pinned sessions, and of those that run: their pages stay where they are
            going = itertools.chain(going, sorted(host & device))
        for page in going:
            if page not in host or page in self.residency.moving or page in needed:
                continue
            if page in disk and freed < count:
                self.residency.drop(page, "host")
                freed += 1
            elif page not in disk and (spare or page not in device) and len(pushed) < count:
                pushed[page] = None
            if freed >= count:
                break
        free = min(self.residency.free("disk"), max(count - freed, 0))
        self._copy(None, list(pushed)[:free], "host", "disk", _HOST_ROOM)

    # -- beforehand ---------------------------------------------------------------------------

    def write_behind(self) -> None:
        """Copy pages of sessions at rest to the host, a few at a time.

        Where the host is full that ends, unless so much of the device could not leave at once that
        it is above the higher mark: then the host gives to the disk until it is below the lower.
        """
        host = self.residency.slots["host"]
        if not host.capacity or self.exchange is not None:
            return
        self._watch_marks()
        if self.pressing:
            self.clean_rested()
        room = self._copies_beforehand() - len(self.copying)
        if "host" in self.refusals:
            room = min(room, 1 - len(self.copying))
        while room > 0 and self.to_clean:
            if not self.host_room() and not (self.pressing and self._press()):
                return
            session = self._next_to_clean()
            dirty = [] if session is None else self._dirty(session)
            if session is None or not dirty:
                continue
            # the same one next, so that its pages lie together
            self.to_clean = {session.id: None} | self.to_clean
            run = LONG_RUN if self._beside_decodes() else RUN
            pages = dirty[: min(run, self.host_room())]
            more = len(dirty) - len(pages)
            self._copy(session, pages, "device", "host", WRITE_BEHIND, run=run, more=more)
            room -= 1
            if self.slot is not None:
                self.wrote_behind_in = self.slot.number

    def clean_rested(self) -> None:
        """Have what came to rest of late copied too; what runs again by then is left out."""
        if self.rested:
            self.to_clean.update(self.rested)
            self.rested.clear()

    def _beside_decodes(self) -> bool:
        """Whether a copy takes the host's time from a decode, which waits for it at every layer: a
        few large ones take less of it than many. Not when room is short."""
        return self.slot is not None and not self.slot.long and not self.pressing

    def _copies_beforehand(self) -> int:
        """How many copies may be under way for some of them to be made beforehand."""
        if not self._beside_decodes():
            return self.limits.copies_in_flight
        assert self.slot is not None
        return int(self.slot.number - self.wrote_behind_in >= DECODES_BETWEEN)

    def _watch_marks(self) -> None:
        capacity, stuck = self.residency.slots["device"].capacity, len(self.residency.dirty)
        if stuck > self.limits.high_mark * capacity:
            self.pressing = True
        elif stuck <= self.limits.low_mark * capacity:
            self.pressing = False

    def _press(self) -> bool:
        """Have the host give to the disk; True when it has room at once."""
        if self.refuses("host"):
            return False
        if not self._is_clearing_host():
            self._free_host(RUN)
        return self.host_room() > 0

    def _next_to_clean(self) -> Session | None:
        """Take the next session whose pages are to be copied; None if that one needs none."""
        session_id = next(iter(self.to_clean))
        if self.pressing:
            waiting = [r for r in self._resting(None, None) if r.session_id in self.to_clean]
            session_id = next((r.session_id for r in eviction_order(waiting)), session_id)
        del self.to_clean[session_id]
        session = self.sessions.get(session_id)
        return None if session is None or session.status == "running" else session

    def _dirty(self, session: Session) -> list[int]:
        """Its pages on the device that have no good copy below, and none under way."""
        dirty, moving = self.residency.dirty, self.residency.moving
        if all(map(dirty.isdisjoint, session.tables)):
            return []
        return [p for table in session.tables for p in table if p in dirty and p not in moving]

    # -- budgets ------------------------------------------------------------------------------

    def allocated(self, tier: Tier) -> int:
        """Pages that a tier was given at the start."""
        return {
            "device": self.shape.num_device_pages,
            "host": self.shape.num_host_pages,
            "disk": self.shape.num_disk_pages,
        }[tier]

    def more_room(self, *tiers: Tier) -> str:
        """How these tiers get more room: by their budgets where they were lowered, else by another
        start."""
        slots = self.residency.slots
        lowered = [
            tier
            for tier in tiers
            if (budget := slots[tier].budget) is not None and budget < self.allocated(tier)
        ]
        if lowered:
            named = ", ".join(f"{tier}=..." for tier in lowered)
            return f"raise the budget with server.set_budget({named})"
        return f"start the server with more {' or '.join(FLAGS[tier] for tier in tiers)}"

    def keep_to_budgets(self) -> None:
        """Have pages leave a tier that holds more than its budget, which was lowered."""
        slots = self.residency.slots
        if (over := -slots["device"].room) > 0:
            found = self._leavers()
            self._drop_all(found.droppable[:over], _BUDGET)
            if (over := over - len(found.droppable) - found.coming) > 0:
                self._push_down(found.copyable[:over], _BUDGET)
        for tier in ("host", "disk"):
            if (over := -slots[tier].room) > 0:
                self._let_copies_go(tier, over)
        if (over := -slots["host"].room) > 0 and not self.copying:
            self._free_host(over)

    def _let_copies_go(self, tier: Tier, count: int, keep: Set[int] = frozenset()) -> None:
        """Give up copies in a tier whose pages another tier has, which is free at once."""
        residency = self.residency
        spare = [p for p in residency.pages() if p not in keep and residency.is_spare(p, tier)]
        for page in spare[:count]:
            self.residency.drop(page, tier)
            if page in self.residency.dirty:
                # nothing else would have it copied again once there is room
                self.to_clean.update(dict.fromkeys(self._owners(page)))
