"""Free slots in gaps: none is given twice, none is lost, what moves together lies together."""

from __future__ import annotations

import random
from itertools import groupby

import pytest

from kernel_server.state.slots import Slots


def gaps_of(slots: set[int]) -> list[tuple[int, int]]:
    """The maximal gaps of a set of slots, half-open, in order."""
    found = []
    for _, group in groupby(enumerate(sorted(slots)), key=lambda item: item[1] - item[0]):
        gap = [slot for _, slot in group]
        found.append((gap[0], gap[-1] + 1))
    return found


class Model:
    """The same slots as a set of those that are free and a list of those set aside."""

    def __init__(self, seed: int, made: int) -> None:
        self.any = random.Random(seed)
        self.slots = Slots(made)
        self.made, self.budget = made, None
        self.free, self.aside = set(range(made)), list[int]()
        self.taken: list[list[int]] = []
        self.counts: dict[str, int] = {}

    def step(self) -> None:
        often = "take take take give give give some behind part last grow limit refuse"
        name = self.any.choice(often.split())
        if getattr(self, f"_{name}")():
            self.counts[name] = self.counts.get(name, 0) + 1
        self.check()

    def check(self) -> None:
        slots = self.slots
        slots.check()
        assert slots.gaps() == gaps_of(self.free)
        held = [slot for group in self.taken for slot in group]
        assert len(held) == len(set(held)) == slots.used, "a slot is taken twice, or lost"
        assert self.free.isdisjoint(held) and set(self.aside).isdisjoint(held)
        assert len(self.free) + len(self.aside) + len(held) == self.made
        assert slots.capacity == (self.made if self.budget is None else min(self.made, self.budget))

    def _take(self, count: int | None = None, of: int = 0) -> bool:
        if count is None:
            count = self.any.choice([1, 2, 3, 5, 8, 13])
        if count > self.slots.num_free:
            with pytest.raises(AssertionError, match="no slot is free"):
                self.slots.take_some(count, of=of)
            return False
        expected = self.expected(count, of)
        taken = self.slots.take_some(count, of=of)
        assert taken == expected
        self.free -= set(taken)
        self.aside = [slot for slot in self.aside if slot not in taken]
        self.taken.append(taken)
        return True

    def expected(self, count: int, of: int) -> list[int]:
        """What is to be taken, found by looking at all gaps anew."""
        free, together = set(self.free), max(count, of)
        found: list[int] = []
        while len(found) < count and free:
            lengths = [(end - start, start) for start, end in gaps_of(free)]
            fits = [one for one in lengths if one[0] >= together - len(found)]
            longest = max(length for length, _ in lengths)
            length, start = min(fits or [one for one in lengths if one[0] == longest])
            some = range(start, start + min(length, count - len(found)))
            found += some
            free -= set(some)
        return sorted(found) + self.aside[: count - len(found)]

    def _some(self) -> bool:
        """The first of several."""
        return self._take(self.any.randint(1, 4), of=self.any.randint(1, 12))

    def _behind(self) -> bool:
        if not self.taken:
            return False
        last, count = self.any.choice(self.any.choice(self.taken)), self.any.randint(1, 4)
        wanted = range(last + 1, last + 1 + count)
        there = count <= self.slots.num_free and self.free.issuperset(wanted)
        assert self.slots.take_behind(last, count) == (wanted if there else range(0))
        if there:
            self.free -= set(wanted)
            self.taken.append(list(wanted))
        return there

    def _give(self) -> bool:
        if not self.taken:
            return False
        group = self.taken.pop(self.any.randrange(len(self.taken)))
        self.any.shuffle(group)
        self.slots.give_back_some(group)
        self.free |= set(group)
        with pytest.raises(AssertionError):
            self.slots.give_back_some(group)
        return True

    def _part(self) -> bool:
        group = next((group for group in self.taken if len(group) > 1), None)
        if group is None:
            return False
        slot = group.pop(self.any.randrange(len(group)))
        self.slots.give_back(slot)
        self.free.add(slot)
        return True

    def _last(self) -> bool:
        group = next((group for group in self.taken if len(group) > 1), None)
        if group is None or self.any.random() < 0.5:
            return False
        slot = group.pop()
        self.slots.give_back(slot, last=True)
        self.aside.append(slot)
        with pytest.raises(AssertionError):
            self.slots.give_back(slot, last=True)
        return True

    def _grow(self) -> bool:
        if self.made >= 160 or self.any.random() < 0.7:
            return False
        more = self.any.randint(0, 12)
        self.slots.grow(self.made + more)
        self.free |= set(range(self.made, self.made + more))
        self.made += more
        return True

    def _limit(self) -> bool:
        if self.any.random() < 0.7:
            return False
        self.budget = self.any.randint(0, 200)
        self.slots.limit(self.budget)
        return True

    def _refuse(self) -> bool:
        self.slots.refusal = "no space" if self.any.random() < 0.3 else None
        return True


@pytest.mark.parametrize("seed", range(8))
def test_gaps_are_those_of_a_plain_set_whatever_is_done(seed: int):
    model = Model(seed, made=40)
    for _ in range(2500):
        model.step()
    model.slots.refusal = None
    for group in model.taken:
        model.slots.give_back_some(group)

    assert model.slots.used == 0
    assert model.slots.gaps() == gaps_of(set(range(model.made)) - set(model.aside))
    done = ("take", "give", "some", "behind", "part", "last", "grow", "limit")
    assert min(model.counts.get(name, 0) for name in done) > 5


def test_the_shortest_gap_that_holds_them_is_taken_and_the_lowest_of_those():
    slots = Slots(30)
    slots.take_some(30)
    for gap in (range(4), range(6, 9), range(12, 15), range(20, 29)):
        slots.give_back_some(gap)

    assert slots.take_some(3) == [6, 7, 8]
    assert slots.take_some(3) == [12, 13, 14]
    assert slots.take_some(6) == [20, 21, 22, 23, 24, 25]
    assert slots.take_some(5) == [0, 1, 2, 3, 26], "none holds five: the longest goes first"


def test_what_comes_later_finds_room_behind_what_came_first():
    slots = Slots(20)
    slots.take_some(20)
    for gap in (range(4), range(8, 18)):
        slots.give_back_some(gap)
    first = slots.take_some(3, of=9)
    slots.take_some(2)

    assert first == [8, 9, 10]
    assert slots.take_behind(10, 3) == range(11, 14)
    assert not slots.take_behind(13, 5), "only four are free there"
    assert not slots.take_behind(14, 1), "slot 14 is nobody's"
    assert slots.take_some(6) == [2, 3, 14, 15, 16, 17]


def test_a_slot_at_fault_is_taken_when_no_other_is_left():
    slots = Slots(4)
    slots.take_some(4)
    slots.give_back(1, last=True)
    slots.give_back_some([0, 2])

    assert slots.gaps() == [(0, 1), (2, 3)]
    assert slots.take_some(2) == [0, 2]
    assert slots.take() == 1
    slots.give_back_some([0, 1, 2])
    assert slots.gaps() == [(0, 3)], "taken once without a fault, it is as good as any"


@pytest.mark.parametrize("given", [[0, 0], [1], [0, 1], [-1], [4], [3, 2, 3]])
def test_what_is_not_taken_is_not_given_back_and_nothing_changes(given: list[int]):
    slots = Slots(4)
    slots.take_some(4)
    slots.give_back(1)
    before = slots.gaps(), slots.used, slots.changes

    with pytest.raises(AssertionError):
        slots.give_back_some(given)
    assert (slots.gaps(), slots.used, slots.changes) == before
    slots.check()


def test_a_budget_that_was_lowered_is_no_more_than_room():
    slots = Slots(8)
    slots.take_some(6)
    slots.limit(4)

    assert (slots.capacity, slots.room, slots.num_free) == (4, -2, 0)
    slots.give_back_some([0, 1, 2])
    assert (slots.room, slots.num_free) == (1, 1)
    slots.grow(16)
    assert slots.capacity == 4, "the budget holds, however many there are"
    slots.limit(16)
    assert slots.num_free == 13 and slots.gaps() == [(0, 3), (6, 16)]
