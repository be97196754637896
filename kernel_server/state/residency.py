"""Where each page is: in which slot of the device, the host or the disk, and which copies are good.

A *page* is logical: page tables name it, whoever owns it. Its content lies in a *slot* of one tier
or of several; a page on the device may have a copy below that is as good, and then leaving the
device costs nothing. Slots are counted here and nowhere else. Which pages are to move, and when, is
decided by the callers; the bytes are moved by the engine, and a move counts only when it has told
of it::

    new page          device, no copy             write()     the copies below are good no more
    copied out        device + host (clean)       drop()      the device slot is free at once
    left the device   host, or disk               arrive()    on the device again, still clean

Rules from others' faults: a slot that a copy reads or writes is not given to anyone until the copy
is told done; a copy made while its page was written is no good; a page is never dropped where no
good copy remains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal, NamedTuple

from kernel_server.state.slots import Slots

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")

#: Pages that are to lie in a row, and the page behind which, if there is one.
Row = tuple[int | None, Sequence[int]]


class Place(NamedTuple):
    """Where one page is now. A slot is None where the page has none in that tier.

    clean: the copies below hold what the device holds. moving: copies under way that read or write
    its slots.
    """

    device: int | None
    host: int | None
    disk: int | None
    clean: bool
    moving: int

    def slot(self, tier: Tier) -> int | None:
        found: int | None = getattr(self, tier)
        return found


@dataclass(frozen=True, slots=True)
class Moves:
    """Copies of pages that go the same way, as columns: what is done for hundreds of pages is not
    done page by page.

    versions: what `source_slots` held when the copies were begun.
    """

    source: Tier
    target: Tier
    pages: tuple[int, ...]
    source_slots: tuple[int, ...]
    target_slots: tuple[int, ...]
    versions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.pages)

    @property
    def way(self) -> str:
        return f"{self.source}-{self.target}"

    @property
    def is_read(self) -> bool:
        """Whether they bring pages up."""
        return self.target == "device" or self.source == "disk"

    def cut(self, length: int) -> list[Moves]:
        """The same in parts of so many pages, in order."""
        if len(self.pages) <= length:
            return [self]
        return [self._part(at, at + length) for at in range(0, len(self.pages), length)]

    def each(self) -> list[Moves]:
        return self.cut(1)

    def _part(self, start: int, end: int) -> Moves:
        return Moves(
            self.source,
            self.target,
            self.pages[start:end],
            self.source_slots[start:end],
            self.target_slots[start:end],
            self.versions[start:end],
        )


@dataclass(slots=True)
class _Dead:
    """Slots of a page that was forgotten while copies still used them, and how many do."""

    slots: dict[Tier, int]
    moving: int


class Residency:
    """The places of all pages.

    device, host, disk: slots of each tier.

        residency = Residency(device=4, host=8)
        residency.create(7)
        moves = residency.begin(7, "device", "host")
        residency.done_all(moves)
        residency.drop(7, "device")
    """

    def __init__(self, device: int, host: int = 0, disk: int = 0) -> None:
        self.slots: dict[Tier, Slots] = {
            "device": Slots(device), "host": Slots(host), "disk": Slots(disk),
        }  # fmt: skip
        # by tier, page -> slot; whoever asks for many pages asks a set or a dictionary once
        self._slot_of: dict[Tier, dict[int, int]] = {tier: {} for tier in TIERS}
        #: page -> a number that no other content of any page has had: changed by every write, so
        #: that a copy begun before one is known to be stale
        self._versions: dict[int, int] = {}
        self._num_versions = 0
        self._dying: list[_Dead] = []
        #: pages of which several copies are under way -> how many besides the first
        self._more: dict[int, int] = {}
        #: changes whenever a page leaves the device or comes back: slots learnt before may differ
        self.epoch = 0
        # sets, so that whoever looks at all pages of a session need not look at each
        #: by tier, the pages that have a slot there
        self.pages_in: dict[Tier, set[int]] = {tier: set() for tier in TIERS}
        #: pages on the device without a good copy below: they cannot leave at once
        self.dirty: set[int] = set()
        #: pages of which a copy is under way
        self.moving: set[int] = set()

    # -- looking ------------------------------------------------------------------------------

    def place(self, page: int) -> Place:
        """Where the page is; it must have a place."""
        assert page in self._versions, f"page {page} has no place"
        device, host, disk = (self._slot_of[tier].get(page) for tier in TIERS)
        moving = (page in self.moving) + self._more.get(page, 0)
        return Place(device, host, disk, page not in self.dirty, moving)

    def device_slot(self, page: int) -> int:
        """The page's slot on the device, where it must be."""
        slot = self._slot_of["device"].get(page)
        assert slot is not None, f"page {page} is not on the device"
        return slot

    def slots_in(self, tier: Tier, pages: Sequence[int]) -> tuple[int, ...]:
        """The slots of pages that all have one in a tier, in their order."""
        return _of(self._slot_of[tier], pages)

    def is_resident(self, page: int) -> bool:
        return page in self._slot_of["device"]

    def can_drop(self, page: int) -> bool:
        """Whether it may leave the device at once: a good copy is below, and nothing reads it."""
        place = self.place(page)
        below = place.host is not None or place.disk is not None
        return place.device is not None and place.clean and below and not place.moving

    def free(self, tier: Tier) -> int:
        return self.slots[tier].num_free

    @property
    def changes(self) -> int:
        """Goes up whenever a page gets or leaves a slot: what `count` found before may differ."""
        return sum(slots.changes for slots in self.slots.values())

    @property
    def num_absent(self) -> int:
        """Pages that are not on the device."""
        return len(self._versions) - len(self.pages_in["device"])

    def absent(self, pages: Sequence[int]) -> list[int]:
        """Of these pages, those that are not on the device."""
        there = self.pages_in["device"]
        if there.issuperset(pages):
            return []
        return list(pages) if there.isdisjoint(pages) else [p for p in pages if p not in there]

    def pages(self) -> list[int]:
        """All pages that have a place."""
        return list(self._versions)

    def is_spare(self, page: int, tier: Tier) -> bool:
        """Whether its copy in a tier below can be given up, because another tier has the page."""
        if page in self.moving or page not in self.pages_in[tier]:
            return False
        return any(page in self.pages_in[other] for other in TIERS if other != tier)

    def reclaimable_host(self, keep: Set[int] = frozenset()) -> int:
        """Slots of the host that come free when pages there, but those to keep, go to the disk."""
        there, disk = self.pages_in["host"] - keep, self.pages_in["disk"]
        alone = len(there - disk - self.pages_in["device"] - self.moving)
        return len(there & disk) + min(alone, self.free("disk"))

    def count(self, tables: Iterable[Sequence[int]]) -> dict[str, int]:
        """Of the pages in these tables, how many each tier holds."""
        found: dict[str, int] = dict.fromkeys(TIERS, 0)
        for table in tables:
            for tier, there in self.pages_in.items():
                if not there:
                    continue
                # nearly always all of a table or nothing of it
                whole = there.issuperset(table)
                found[tier] += len(table) if whole else len(there.intersection(table))
        return found

    # -- changing -----------------------------------------------------------------------------

    def create(self, page: int) -> int:
        """Give a new page a slot on the device; nothing of it is copied."""
        return self.create_all((page,))[0]

    def create_all(self, pages: Sequence[int]) -> list[int]:
        """What `create` does for each page; slots go up in the order of the pages."""
        slots = self.slots["device"].take_some(len(pages))
        for page in pages:
            assert page not in self._versions, f"page {page} has a place already"
            self._touch(page)
        self._slot_of["device"].update(zip(pages, slots, strict=True))
        self.pages_in["device"].update(pages)
        self.dirty.update(pages)
        return slots

    def forget(self, page: int) -> int | None:
        """The page is nobody's: its slots are free, once no copy uses them.

        Returns its device slot if that is free now.
        """
        return next(iter(self.forget_all((page,))), None)

    def forget_all(self, pages: Sequence[int]) -> list[int]:
        """What `forget` does for each page; the device slots that are free now."""
        if not self.moving.isdisjoint(pages):
            busy = [page for page in pages if page in self.moving]
            for page in busy:
                self._dying.append(_Dead(self._taken_from(page), 1 + self._more.pop(page, 0)))
                del self._versions[page]
            self.moving.difference_update(busy)
            self.dirty.difference_update(busy)
            pages = [page for page in pages if page in self._versions]
        freed: dict[Tier, list[int]] = {}
        for tier, slot_of in self._slot_of.items():
            there = self.pages_in[tier].intersection(pages)
            freed[tier] = [slot_of.pop(page) for page in pages if page in there]
            self.slots[tier].give_back_some(freed[tier])
            self.pages_in[tier] -= there
        self.dirty.difference_update(pages)
        for page in pages:
            del self._versions[page]
        return freed["device"]

    def write(self, page: int) -> None:
        """The page on the device is about to be written: its copies are stale, and let go."""
        assert page in self._slot_of["device"], f"page {page} is written and not on the device"
        self._touch(page)
        self.dirty.add(page)
        if page not in self.moving:
            self._let_copies_go(page)

    def begin(self, page: int, source: Tier, target: Tier) -> Moves:
        """Take a slot in `target` for a copy from `source`; tell `done_all` or `failed_all`."""
        return self.begin_all((page,), source, target)

    def begin_all(
        self,
        pages: Sequence[int],
        source: Tier,
        target: Tier,
        *,
        rows: Iterable[Row] | None = None,
        more: int = 0,
    ) -> Moves:
        """What `begin` does for each page, in one go.

        rows: the same pages as they are to lie in `target`, so that slots in a row on one side meet
        slots in a row on the other. more: how many are to follow that belong behind them.
        """
        slot_of, slots = self._slot_of[target], self.slots[target]
        assert slot_of.keys().isdisjoint(pages), f"of pages {pages} some are in {target} already"
        assert source == "device" or self.dirty.isdisjoint(pages), "a stale copy is read"
        from_slots = _of(self._slot_of[source], pages)
        assert len(pages) <= slots.num_free, "no slot is free"
        left: list[int] = []
        for before, row in ((None, pages),) if rows is None else rows:
            slot = None if before is None else slot_of.get(before)
            if slot is not None and (behind := slots.take_behind(slot, len(row))):
                slot_of.update(zip(row, behind, strict=True))
            else:
                left += row
        slot_of.update(zip(left, slots.take_some(len(left), of=len(left) + more), strict=True))
        self.pages_in[target].update(pages)
        if not self.moving.isdisjoint(pages):
            for page in self.moving.intersection(pages):
                self._more[page] = self._more.get(page, 0) + 1
        self.moving.update(pages)
        if target == "device" and pages:
            self.epoch += 1
        return Moves(
            source,
            target,
            tuple(pages),
            from_slots,
            _of(slot_of, pages),
            _of(self._versions, pages),
        )

    def done_all(self, moves: Moves) -> list[int]:
        """The copies were made; the pages of those that are worth nothing (written or forgotten
        meanwhile)."""
        pages = moves.pages
        if tuple(map(self._versions.get, pages)) == moves.versions:
            # nothing happened to any of them since, or to the slots
            self._end_moves(pages)
            if "device" in (moves.source, moves.target):
                self.dirty.difference_update(pages)
            return []
        return [move.pages[0] for move in moves.each() if not self._done(move)]

    def _done(self, move: Moves) -> bool:
        (page,) = move.pages
        if not self._is_there(move):
            return False
        good = self._versions[page] == move.versions[0]
        if good:
            if "device" in (move.source, move.target):
                self.dirty.discard(page)
        elif page not in self.moving:
            # a page may be written as soon as it is there, before anyone is told
            self._let_copies_go(page)
        return good

    def failed_all(self, moves: Moves) -> list[int]:
        """The copies were not made: their slots are free again, the pages are where they were;
        returns those that were not forgotten meanwhile."""
        return [move.pages[0] for move in moves.each() if self._failed(move)]

    def _failed(self, move: Moves) -> bool:
        (page,), (slot,), target = move.pages, move.target_slots, move.target
        if not self._is_there(move):
            return False
        del self._slot_of[target][page]
        self.pages_in[target].remove(page)
        self.slots[target].give_back(slot, last=True)
        if target == "device":
            self.epoch += 1
            # who was to write it waited for it in vain: what lies below is as good as it was
            self.dirty.discard(page)
        elif self._versions[page] != move.versions[0] and page not in self.moving:
            self._let_copies_go(page)
        return True

    def drop(self, page: int, tier: Tier) -> None:
        """Give up the page's slot in one tier; a good copy must remain in another."""
        place = self.place(page)
        assert place.slot(tier) is not None and not place.moving, f"page {page} cannot leave {tier}"
        others = [t for t in TIERS if t != tier and place.slot(t) is not None]
        if tier == "device":
            assert place.clean and others, f"page {page} would be lost"
        elif place.device is None:
            assert others, f"page {page} would be lost"
        self.slots[tier].give_back(self._slot_of[tier].pop(page))
        self.pages_in[tier].remove(page)
        if tier == "device":
            self.epoch += 1
        elif others == ["device"]:
            self.dirty.add(page)

    def leave_device(self, pages: Iterable[int]) -> list[int]:
        """Have pages leave the device that have a good copy below; the slots they leave.

        What `drop` does for each, in one go: a clean session of hundreds of pages leaves at once.
        """
        gone = list(pages)
        if not gone:
            return []
        there = set(gone)
        stay = there & self.moving or there - self.pages_in["device"]
        assert not stay and len(there) == len(gone), f"pages {stay or gone} cannot leave device"
        lost = there & self.dirty or there - self.pages_in["host"] - self.pages_in["disk"]
        assert not lost, f"pages {lost} would be lost"
        left = list(map(self._slot_of["device"].pop, gone))
        self.slots["device"].give_back_some(left)
        self.epoch += 1
        self.pages_in["device"] -= there
        return left

    # -- checking -----------------------------------------------------------------------------

    def check(self, pages: Iterable[int]) -> None:
        """Assert that exactly these pages have places, every slot one page, and none is lost."""
        wanted = set(pages)
        assert set(self._versions) == wanted, "pages with a place differ from those there are"
        for tier, slot_of in self._slot_of.items():
            dead = [one.slots[tier] for one in self._dying if tier in one.slots]
            used = [*slot_of.values(), *dead]
            assert len(used) == len(set(used)) == self.slots[tier].used, f"slots of {tier} leak"
            self.slots[tier].check()
            counted = self.pages_in[tier]
            assert slot_of.keys() == counted, f"in {tier} are {set(slot_of)}, {counted} counted"
        assert all(one.moving > 0 for one in self._dying), "slots of nobody are not given back"
        device, host, disk = (self.pages_in[tier] for tier in TIERS)
        nowhere = wanted - device - host - disk
        assert not nowhere, f"pages {nowhere} are nowhere"
        assert self.dirty <= device, f"{self.dirty - device} are not there, and counted as dirty"
        alone = (wanted - self.dirty) - host - disk
        assert not alone, f"pages {alone} are clean without a copy"
        assert self.moving <= wanted and self._more.keys() <= self.moving
        still = self.dirty - self.moving
        assert still.isdisjoint(host | disk), "stale copies of written pages are kept"
        assert len(set(self._versions.values())) == len(wanted), "two pages of one version"

    # -- inside -------------------------------------------------------------------------------

    def _touch(self, page: int) -> None:
        """Count what the page holds as something new."""
        self._num_versions += 1
        self._versions[page] = self._num_versions

    def _end_moves(self, pages: Sequence[int]) -> None:
        if not self._more:
            self.moving.difference_update(pages)
            return
        for page in pages:
            if left := self._more.pop(page, 0):
                if left > 1:
                    self._more[page] = left - 1
            else:
                self.moving.discard(page)

    def _is_there(self, move: Moves) -> bool:
        """End the move of one page; False when the page was forgotten meanwhile."""
        (page,), (slot,) = move.pages, move.target_slots
        if self._slot_of[move.target].get(page) == slot:
            self._end_moves((page,))
            return True
        dead = next((one for one in self._dying if one.slots.get(move.target) == slot), None)
        assert dead is not None, f"no page has the slot of {move}"
        dead.moving -= 1
        if not dead.moving:
            self._dying.remove(dead)
            for tier, left in dead.slots.items():
                self.slots[tier].give_back(left)
        return False

    def _taken_from(self, page: int, tiers: Iterable[Tier] = TIERS) -> dict[Tier, int]:
        """The slots of a page, which the page has no more; nobody else has them yet."""
        found: dict[Tier, int] = {}
        for tier in tiers:
            slot = self._slot_of[tier].pop(page, None)
            if slot is not None:
                found[tier] = slot
                self.pages_in[tier].remove(page)
        return found

    def _let_copies_go(self, page: int) -> None:
        for tier, slot in self._taken_from(page, ("host", "disk")).items():
            self.slots[tier].give_back(slot)


def _of(column: dict[int, int], pages: Sequence[int]) -> tuple[int, ...]:
    """What a column holds for these pages, in their order."""
    if len(pages) > 1:
        found: tuple[int, ...] = itemgetter(*pages)(column)
        return found
    return tuple(column[page] for page in pages)
