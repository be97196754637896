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
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")


@dataclass(slots=True)
class Slots:
    """The slots of one tier: free ones on a stack, lowest on top.

    capacity: those that may be used. budget: no more than so many, however many there are.
    refusal: why none can be taken now, because writing to the tier failed.
    """

    capacity: int
    budget: int | None = None
    refusal: str | None = None
    _free: list[int] = field(default_factory=list)
    _taken: set[int] = field(default_factory=set)
    _made: int = 0
    #: slots taken and given back since the beginning
    changes: int = 0

    def __post_init__(self) -> None:
        self.grow(self.capacity)

    def grow(self, capacity: int) -> None:
        """Make slots up to `capacity`; the pool behind them must have them already."""
        if capacity > self._made:
            self._free[:0] = range(capacity - 1, self._made - 1, -1)
            self._made = capacity
        self.capacity = capacity if self.budget is None else min(capacity, self.budget)

    def limit(self, budget: int) -> None:
        """Use no more than `budget` slots from now on; what is taken stays until it leaves."""
        self.budget = budget
        self.capacity = min(self._made, budget)

    @property
    def used(self) -> int:
        return self._made - len(self._free)

    @property
    def room(self) -> int:
        """Slots that may be taken; negative while more are taken than the budget allows."""
        room = self.capacity - self.used
        return room if self.refusal is None else min(room, 0)

    @property
    def num_free(self) -> int:
        """Slots that may be taken: fewer than are empty when the capacity was lowered, and none
        while the tier refuses."""
        return max(0, self.room)

    def take(self) -> int:
        return self.take_some(1)[0]

    def take_some(self, count: int) -> list[int]:
        """So many slots, the lowest first."""
        assert 0 <= count <= self.num_free, "no slot is free"
        left = len(self._free) - count
        slots = self._free[left:][::-1]
        del self._free[left:]
        self._taken.update(slots)
        self.changes += count
        return slots

    def give_back(self, slot: int, *, last: bool = False) -> None:
        """last: the slot is to be taken after all others, since it may be the one at fault."""
        if not last:
            self.give_back_some((slot,))
            return
        assert slot in self._taken, f"slot {slot} is free already"
        self._taken.remove(slot)
        self._free.insert(0, slot)
        self.changes += 1

    def give_back_some(self, slots: Sequence[int]) -> None:
        """The last of them is taken first."""
        given = set(slots)
        assert len(given) == len(slots) and given <= self._taken, f"free already, of {slots}"
        self._taken -= given
        self._free += slots
        self.changes += len(slots)


@dataclass(slots=True)
class Place:
    """Where one page is. A slot is None where the page has none in that tier."""

    device: int | None = None
    host: int | None = None
    disk: int | None = None
    #: the copies below hold what the device holds
    clean: bool = False
    #: counts the writes, so that a copy begun before one is known to be stale
    version: int = 0
    #: copies under way that read or write its slots
    moving: int = 0

    def slot(self, tier: Tier) -> int | None:
        found: int | None = getattr(self, tier)
        return found


class Move(NamedTuple):
    """One copy of one page under way."""

    page: int
    source: Tier
    target: Tier
    source_slot: int
    target_slot: int
    version: int


class Residency:
    """The places of all pages.

    device, host, disk: slots of each tier.

        residency = Residency(device=4, host=8)
        residency.create(7)
        move = residency.begin(7, "device", "host")
        residency.done(move)
        residency.drop(7, "device")
    """

    def __init__(self, device: int, host: int = 0, disk: int = 0) -> None:
        self.slots: dict[Tier, Slots] = {
            "device": Slots(device), "host": Slots(host), "disk": Slots(disk),
        }  # fmt: skip
        self._places: dict[int, Place] = {}
        #: slots of pages that were forgotten while a copy still used them
        self._dying: dict[int, Place] = {}
        self._next_dead = -1
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
        return self._places[page]

    def device_slot(self, page: int) -> int:
        """The page's slot on the device, where it must be."""
        slot = self._places[page].device
        assert slot is not None, f"page {page} is not on the device"
        return slot

    def is_resident(self, page: int) -> bool:
        return self._places[page].device is not None

    def can_drop(self, page: int) -> bool:
        """Whether it may leave the device at once: a good copy is below, and nothing reads it."""
        place = self._places[page]
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
        return len(self._places) - len(self.pages_in["device"])

    def absent(self, pages: Iterable[int]) -> list[int]:
        """Of these pages, those that are not on the device."""
        there = self.pages_in["device"]
        return [page for page in pages if page not in there]

    def pages(self) -> list[int]:
        """All pages that have a place."""
        return list(self._places)

    def is_spare(self, page: int, tier: Tier) -> bool:
        """Whether its copy in a tier below can be given up, because another tier has the page."""
        place = self._places[page]
        others = any(place.slot(t) is not None for t in TIERS if t != tier)
        return place.slot(tier) is not None and not place.moving and others

    def reclaimable_host(self, keep: Set[int] = frozenset()) -> int:
        """Slots of the host that come free when pages there, but those to keep, go to the disk."""
        both = alone = 0
        for page, place in self._places.items():
            if place.host is not None and page not in keep:
                both += place.disk is not None
                alone += place.disk is None and place.device is None and not place.moving
        return both + min(alone, self.free("disk"))

    def count(self, tables: Iterable[Sequence[int]]) -> dict[str, int]:
        """Of the pages in these tables, how many each tier holds."""
        found: dict[str, int] = dict.fromkeys(TIERS, 0)
        for table in tables:
            for tier, there in self.pages_in.items():
                # nearly always all of a table or nothing of it
                whole = there.issuperset(table)
                found[tier] += len(table) if whole else len(there.intersection(table))
        return found

    # -- changing -----------------------------------------------------------------------------

    def create(self, page: int) -> int:
        """Give a new page a slot on the device; nothing of it is copied."""
        assert page not in self._places, f"page {page} has a place already"
        slot = self.slots["device"].take()
        self._places[page] = Place(device=slot)
        self.pages_in["device"].add(page)
        self.dirty.add(page)
        return slot

    def forget(self, page: int) -> int | None:
        """The page is nobody's: its slots are free, once no copy uses them.

        Returns its device slot if that is free now.
        """
        place = self._places.pop(page)
        for pages in (self.dirty, self.moving, *self.pages_in.values()):
            pages.discard(page)
        if place.moving:
            self._dying[self._next_dead] = place
            self._next_dead -= 1
            return None
        self._release(place)
        return place.device

    def write(self, page: int) -> None:
        """The page on the device is about to be written: its copies are stale, and let go."""
        place = self._places[page]
        assert place.device is not None, f"page {page} is written and not on the device"
        place.version += 1
        place.clean = False
        self.dirty.add(page)
        if not place.moving:
            self._let_copies_go(page, place)

    def begin(self, page: int, source: Tier, target: Tier) -> Move:
        """Take a slot in `target` for a copy from `source`; tell `done` or `failed` later."""
        return self.begin_all((page,), source, target)[0]

    def begin_all(self, pages: Sequence[int], source: Tier, target: Tier) -> tuple[Move, ...]:
        """What `begin` does for each page, in one go."""
        places = [self._places[page] for page in pages]
        # read by name: a call for each page would be most of a swap's time
        there = [getattr(place, target) for place in places]
        fresh = self.slots[target].take_some(there.count(None))
        taken, moves = iter(fresh), list[Move]()
        for page, place, slot in zip(pages, places, there, strict=True):
            from_slot = getattr(place, source)
            assert from_slot is not None, f"page {page} is not in {source}"
            assert source == "device" or place.clean or place.device is None, "a stale copy is read"
            if slot is None:
                slot = next(taken)
                setattr(place, target, slot)
            else:
                # only a copy to below that has gone stale is made again in its slot
                assert source == "device" and not place.clean and not place.moving
            place.moving += 1
            moves.append(Move(page, source, target, from_slot, slot, place.version))
        self.moving.update(pages)
        self.pages_in[target].update(pages)
        if target == "device" and fresh:
            self.epoch += 1
        return tuple(moves)

    def done_all(self, moves: Sequence[Move]) -> None:
        """What `done` does for each copy, in one go for pages that nothing happened to since."""
        made, rest = list[int](), list[int]()
        for move in moves:
            page, source, target, _, slot, version = move
            place = self._places.get(page)
            if place is None or place.version != version or getattr(place, target) != slot:
                self.done(move)
                continue
            place.moving -= 1
            if source == "device" or target == "device":
                place.clean = True
            made.append(page)
            if not place.moving:
                rest.append(page)
        self.dirty.difference_update(made)
        self.moving.difference_update(rest)

    def done(self, move: Move) -> bool:
        """The copy was made; False when it is worth nothing (written or forgotten meanwhile)."""
        place = self._found(move)
        place.moving -= 1
        if self._places.get(move.page) is not place:
            self._bury(place)
            return False
        if "device" in (move.source, move.target):
            # a page may be written as soon as it is there, before anyone is told
            place.clean = place.version == move.version
        good = place.version == move.version
        if not good and not place.moving:
            self._let_copies_go(move.page, place)
        self._sort(move.page, place)
        return good

    def failed(self, move: Move) -> bool:
        """The copy was not made: its slot is free again, the page is where it was; False when the
        page was forgotten meanwhile."""
        place = self._found(move)
        place.moving -= 1
        if self._places.get(move.page) is not place:
            self._bury(place)
            return False
        setattr(place, move.target, None)
        self.pages_in[move.target].remove(move.page)
        self.slots[move.target].give_back(move.target_slot, last=True)
        if move.target == "device":
            self.epoch += 1
            # who was to write it waited for it in vain: what lies below is as good as it was
            place.clean = True
        elif place.version != move.version and not place.moving:
            self._let_copies_go(move.page, place)
        self._sort(move.page, place)
        return True

    def drop(self, page: int, tier: Tier) -> None:
        """Give up the page's slot in one tier; a good copy must remain in another."""
        place = self._places[page]
        slot = place.slot(tier)
        assert slot is not None and not place.moving, f"page {page} cannot leave {tier}"
        others = [t for t in TIERS if t != tier and place.slot(t) is not None]
        if tier == "device":
            assert place.clean and others, f"page {page} would be lost"
        elif place.device is None:
            assert others, f"page {page} would be lost"
        setattr(place, tier, None)
        self.pages_in[tier].remove(page)
        self.slots[tier].give_back(slot)
        if tier == "device":
            self.epoch += 1
        if place.device is not None and place.host is None and place.disk is None:
            place.clean = False
        self._sort(page, place)

    def leave_device(self, pages: Iterable[int]) -> list[int]:
        """Have pages leave the device that have a good copy below; the slots they leave.

        What `drop` does for each, in one go: a clean session of hundreds of pages leaves at once.
        """
        places, left = self._places, list[int]()
        gone = list(pages)
        for page in gone:
            place = places[page]
            slot = place.device
            below = place.host is not None or place.disk is not None
            assert slot is not None and not place.moving, f"page {page} cannot leave device"
            assert place.clean and below, f"page {page} would be lost"
            place.device = None
            left.append(slot)
        if left:
            self.slots["device"].give_back_some(left)
            self.epoch += 1
            self.pages_in["device"].difference_update(gone)
        return left

    # -- checking -----------------------------------------------------------------------------

    def check(self, pages: Iterable[int]) -> None:
        """Assert that exactly these pages have places, every slot one page, and none is lost."""
        wanted = set(pages)
        assert set(self._places) == wanted, "pages with a place differ from those there are"
        for tier in TIERS:
            taken = [p.slot(tier) for p in (*self._places.values(), *self._dying.values())]
            used = [slot for slot in taken if slot is not None]
            assert len(used) == len(set(used)) == self.slots[tier].used, f"slots of {tier} leak"
        for tier, counted in self.pages_in.items():
            there = {p for p, place in self._places.items() if place.slot(tier) is not None}
            assert there == counted, f"in {tier} are {there}, {counted} counted"
        moving = {page for page, place in self._places.items() if place.moving}
        assert moving == self.moving, f"{moving} are under way, {self.moving} counted"
        for page, place in self._places.items():
            below = place.host is not None or place.disk is not None
            assert place.device is not None or below, f"page {page} is nowhere"
            assert not place.clean or below, f"page {page} is clean without a copy"
            stuck = place.device is not None and not place.clean
            assert stuck == (page in self.dirty), f"page {page} is counted wrongly as dirty or not"
        assert self.dirty <= wanted, "pages that are gone count as dirty"

    # -- inside -------------------------------------------------------------------------------

    def _sort(self, page: int, place: Place) -> None:
        """Count a page among those it belongs to, after a copy or a loss of one."""
        if not place.moving:
            self.moving.discard(page)
        if place.device is not None and not place.clean:
            self.dirty.add(page)
        else:
            self.dirty.discard(page)

    def _found(self, move: Move) -> Place:
        place = self._places.get(move.page)
        if place is not None and getattr(place, move.target) == move.target_slot:
            return place
        for place in self._dying.values():
            if place.slot(move.target) == move.target_slot:
                return place
        raise AssertionError(f"no page has the slot of {move}")

    def _bury(self, place: Place) -> None:
        if not place.moving:
            key = next(key for key, dead in self._dying.items() if dead is place)
            del self._dying[key]
            self._release(place)

    def _let_copies_go(self, page: int, place: Place) -> None:
        for tier in ("host", "disk"):
            slot = place.slot(tier)
            if slot is not None:
                setattr(place, tier, None)
                self.pages_in[tier].remove(page)
                self.slots[tier].give_back(slot)

    def _release(self, place: Place) -> None:
        for tier in TIERS:
            slot = place.slot(tier)
            if slot is not None:
                self.slots[tier].give_back(slot)
