"""Pages that change places, where there is no room below to make room on the device with.

Where the tiers below are full of the very pages that are to come, nothing can leave before some of
those have arrived. Then they come in turns: through whatever slot is spare one page goes down, the
slot it leaves takes one that is needed, and the copy of that one below, which is given up, makes
the next slot. Nothing is ever without a good copy. An exchange is for one session at a time; while
it goes on others that lack room wait for it, and nothing is copied beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from kernel_server.state.leaving import Leavers, Leaving
from kernel_server.state.sessions import Session


class Exchanging(Leaving):
    """Lets pages that are needed change places with pages that are not."""

    def _exchange(
        self, session: Session, absent: Sequence[int], fresh: int, needed: Set[int]
    ) -> bool:
        """Take the next turns of an exchange; False, and nothing is changed, where none would fit.

        absent: pages that are to come. fresh: slots of the device wanted besides. needed: pages
        that must stay, the absent ones too.
        """
        found = self._leavers(needed, session)
        self._add_own(found, session, needed)
        lacking = len(absent) + fresh - self.residency.slots["device"].room
        going = max(0, lacking - len(found.droppable) - found.coming)
        if self.refuses("host") and (going or self._deep(absent)):
            return False
        leaving = {page for page, _ in (*found.droppable, *found.copyable)}
        staying = {p for p in self.residency.pages() if p in needed or p not in leaving}
        if not (self._fits_below(found, going, staying) and self._can_begin(found, staying)):
            return False
        self.exchanging = session.id
        reason = f"room for session {session.id}"
        self._drop_all(found.droppable[: max(0, lacking)], reason)
        self._let_come(session, absent, staying)
        if going:
            self._give_up_copies(staying, going)
            self._push_down(found.copyable[:going], reason, needed)
        return True

    def _add_own(self, found: Leavers, session: Session, needed: Set[int]) -> None:
        """Pages of the session itself that this stretch does not need leave after all others."""
        if session.pinned:
            return
        for group in self._least_needed_first(session):
            for page in session.tables[group]:
                place = self.residency.place(page)
                if page in needed or place.device is None or place.moving:
                    continue
                if self.pool.owners(page) == 1:
                    can_drop = self.residency.can_drop(page)
                    (found.droppable if can_drop else found.copyable).append((page, session))

    def _let_come(
        self,
        session: Session,
        absent: Sequence[int],
        staying: Set[int],
        reason: str = "needed",
        run: int | None = None,
    ) -> bool:
        """Begin to bring as many pages as there is room for, through the host; True while some
        have not begun their way to the device.

        staying: pages that the device will hold, so that their copies below may be given up.
        """
        place, free = self.residency.place, self.residency.free
        still = [page for page in absent if not place(page).moving]
        above = [page for page in still if place(page).host is not None]
        self._copy(session, above[: free("device")], "host", "device", reason, run=run)
        deep = self._deep(still)[: free("device")]
        if deep and not self.refuses("host"):
            self._give_up_copies(staying, len(deep))
            if (lacking := len(deep) - self.residency.slots["host"].room) > 0:
                self._free_host(lacking, staying)
                if not free("host") and not self.copying:
                    # all of it copies of pages that the device has, and the disk is full
                    self._let_copies_go("host", lacking)
            self._copy(session, deep[: free("host")], "disk", "host", reason)
        return any(page not in self.inbound for page in absent)

    def _deep(self, pages: Sequence[int]) -> list[int]:
        """Those that the disk alone has: they come through the host."""
        if not self.residency.slots["disk"].used:
            return []
        places = {page: self.residency.place(page) for page in pages}
        return [p for p, place in places.items() if place.host is None and place.device is None]

    def _give_up_copies(self, staying: Set[int], count: int) -> None:
        """Free slots of the host, and of the disk, that hold what stays on the device."""
        residency = self.residency
        for page in sorted(staying):
            if self.host_room() >= count:
                return
            place = residency.place(page)
            if place.device is None or place.moving:
                continue
            for tier in ("host", "disk"):
                if place.slot(tier) is not None:
                    residency.drop(page, tier)

    def _fits_below(self, found: Leavers, going: int, staying: Set[int]) -> bool:
        """Whether so many pages find slots below once copies of those that stay have left them."""
        slots = self.host_room() + self.residency.free("disk")
        for page in self.residency.pages():
            place = self.residency.place(page)
            copies = (place.host is not None) + (place.disk is not None)
            slots += copies if page in staying else copies == 2
        return going <= min(slots, len(found.copyable))

    def _can_begin(self, found: Leavers, staying: Set[int]) -> bool:
        """Whether there is a slot to begin with, or there soon will be."""
        residency = self.residency
        if self.copying or found.droppable or residency.free("host"):
            return True
        if residency.slots["device"].room > 0 or residency.reclaimable_host(staying):
            return True
        return any(residency.is_spare(p, "host") and residency.is_resident(p) for p in staying)
