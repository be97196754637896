"""The slots of one tier: which are free, and which are taken next. Numbers only: no page, no bytes.

Pages that move together are copied in one go where their slots lie in a row on both sides. So free
slots are kept as *gaps*, each as long as it can be, and what is taken together is taken from one
gap: the shortest that holds it, of those the one with the lowest numbers. Long ones are left whole
for whoever needs them. Where none is long enough, the longest goes first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import pairwise


class Slots:
    """The slots of one tier.

    capacity: those that may be used. budget: no more than so many, however many there are.
    refusal: why none can be taken now, because writing to the tier failed.

        slots = Slots(8)
        slots.take_some(3)             # [0, 1, 2]
        slots.give_back_some([0, 2])
        slots.gaps()                   # [(0, 1), (2, 8)]
    """

    def __init__(self, capacity: int, budget: int | None = None) -> None:
        self.capacity = 0
        self.budget = budget
        self.refusal: str | None = None
        #: slots taken and given back since the beginning
        self.changes = 0
        self._made = 0
        self._num_empty = 0
        # half-open: the first slots of gaps in order, and where the gap of each ends
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}
        #: (slots, first) of each gap, in order
        self._by_length: list[tuple[int, int]] = []
        #: free slots that are to be taken after all others, the next one first
        self._aside: deque[int] = deque()
        self.grow(capacity)

    # -- how many -----------------------------------------------------------------------------

    def grow(self, capacity: int) -> None:
        """Make slots up to `capacity`; the pool behind them must have them already."""
        if capacity > self._made:
            self._free(self._made, capacity)
            self._num_empty += capacity - self._made
            self._made = capacity
        self.capacity = capacity if self.budget is None else min(capacity, self.budget)

    def limit(self, budget: int) -> None:
        """Use no more than `budget` slots from now on; what is taken stays until it leaves."""
        self.budget = budget
        self.capacity = min(self._made, budget)

    @property
    def used(self) -> int:
        return self._made - self._num_empty

    @property
    def room(self) -> int:
        """Slots that may be taken; negative while more are taken than the budget allows."""
        return self._room_of(self.capacity)

    def room_under(self, budget: int) -> int:
        """What `room` would be after `limit(budget)`."""
        return self._room_of(min(self._made, budget))

    def _room_of(self, capacity: int) -> int:
        room = capacity - self.used
        return room if self.refusal is None else min(room, 0)

    @property
    def num_free(self) -> int:
        """Slots that may be taken: fewer than are empty when the capacity was lowered, and none
        while the tier refuses."""
        return max(0, self.room)

    def gaps(self) -> list[tuple[int, int]]:
        """Free slots as (first, one past the last), in order; those set aside are in none."""
        return [(start, self._ends[start]) for start in self._starts]

    # -- taking -------------------------------------------------------------------------------

    def take(self) -> int:
        return self.take_some(1)[0]

    def take_behind(self, slot: int, count: int) -> range:
        """So many slots behind this one; none where a gap that holds them does not begin there."""
        start = slot + 1
        length = self._ends.get(start, start) - start
        if not 0 < count <= min(length, self.num_free):
            return range(0)
        self._forget_length(length, start)
        self._shorten(start, count)
        self._num_empty -= count
        self.changes += count
        return range(start, start + count)

    def take_some(self, count: int, *, of: int = 0) -> list[int]:
        """So many slots in ascending order, in as few gaps as there can be; those set aside last.

        Only the lowest slots of a gap are taken, so what is left of it is one gap. of: how many
        belong together, of which these are the first.
        """
        assert 0 <= count <= self.num_free, "no slot is free"
        self._num_empty -= count
        self.changes += count
        taken: list[int] = []
        left, together, lengths = count, max(count, of), self._by_length
        while left and lengths:
            index = bisect_left(lengths, (together, 0))
            if index == len(lengths):
                # none holds all of them: a longest one, of those the one with the lowest numbers
                index = bisect_left(lengths, (lengths[-1][0], 0))
            length, start = lengths.pop(index)
            some = min(left, length)
            self._shorten(start, some)
            taken += range(start, start + some)
            left -= some
            together -= some
        if len(taken) > 1 and taken[-1] - taken[0] != len(taken) - 1:
            taken.sort()
        for _ in range(left):
            taken.append(self._aside.popleft())
        return taken

    def _shorten(self, start: int, count: int) -> None:
        """Take the first slots out of a gap that `_by_length` has lost already."""
        end = self._ends.pop(start)
        at = bisect_left(self._starts, start)
        if start + count == end:
            del self._starts[at]
            return
        self._starts[at] = start = start + count
        self._ends[start] = end
        insort(self._by_length, (end - start, start))

    # -- giving back --------------------------------------------------------------------------

    def give_back(self, slot: int, *, last: bool = False) -> None:
        """last: the slot is to be taken after all others, since it may be the one at fault."""
        if not last:
            self.give_back_some((slot,))
            return
        self._require_taken(slot, slot + 1)
        self._aside.append(slot)
        self._num_empty += 1
        self.changes += 1

    def give_back_some(self, slots: Iterable[int]) -> None:
        """Slots in any order, each of which must be taken; else none is given back."""
        given = sorted(slots)
        rows = list(_rows_of(given))
        for start, end in rows:
            self._require_taken(start, end)
        for start, end in rows:
            self._free(start, end)
        self._num_empty += len(given)
        self.changes += len(given)

    def _require_taken(self, start: int, end: int) -> None:
        at = bisect_right(self._starts, start)
        before = self._ends[self._starts[at - 1]] if at else 0
        after = self._starts[at] if at < len(self._starts) else self._made
        free = start < 0 or before > start or after < end
        if self._aside and not free:
            free = any(start <= slot < end for slot in self._aside)
        assert not free, f"free already, of {start} to {end}"

    def _free(self, start: int, end: int) -> None:
        """Add a gap to those that are free, as one with its neighbours."""
        starts, ends = self._starts, self._ends
        at = bisect_left(starts, start)
        if at < len(starts) and starts[at] == end:
            end = ends.pop(starts[at])
            self._forget_length(end - starts[at], starts[at])
            del starts[at]
        if at and ends[starts[at - 1]] == start:
            start = starts[at - 1]
            self._forget_length(ends[start] - start, start)
        else:
            starts.insert(at, start)
        ends[start] = end
        insort(self._by_length, (end - start, start))

    def _forget_length(self, length: int, start: int) -> None:
        del self._by_length[bisect_left(self._by_length, (length, start))]

    # -- checking -----------------------------------------------------------------------------

    def check(self) -> None:
        """Assert that gaps are as long as they can be and no slot is free twice."""
        gaps = self.gaps()
        assert all(start < end for start, end in gaps), f"empty gaps among {gaps}"
        assert all(a[1] < b[0] for a, b in pairwise(gaps)), f"of {gaps} two touch"
        assert self._by_length == sorted((end - start, start) for start, end in gaps)
        assert set(self._ends) == set(self._starts), "ends of gaps that are none"
        free = [slot for start, end in gaps for slot in range(start, end)] + [*self._aside]
        assert len(set(free)) == len(free) == self._num_empty, "a slot is free twice, or lost"
        assert all(0 <= slot < self._made for slot in free), "a slot is free that was never made"


def _rows_of(slots: list[int]) -> Iterator[tuple[int, int]]:
    """Slots in ascending order as half-open rows; asserts that none is there twice."""
    if not slots:
        return
    if slots[-1] - slots[0] == len(slots) - 1 and len(set(slots)) == len(slots):
        yield slots[0], slots[-1] + 1
        return
    start = last = slots[0]
    for slot in slots[1:]:
        assert slot != last, f"slot {slot} is given back twice"
        if slot != last + 1:
            yield start, last + 1
            start = slot
        last = slot
    yield start, last + 1
