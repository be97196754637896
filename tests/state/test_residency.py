"""Pages move between tiers as they like, and every one that is read holds what was written last."""

from __future__ import annotations

import random

import pytest

from kernel_server.state.residency import TIERS, Moves, Residency, Tier


class Shadow:
    """The tiers as dictionaries: what each slot holds, and what each page should hold."""

    def __init__(self, seed: int, device: int = 6, host: int = 5, disk: int = 7) -> None:
        self.any = random.Random(seed)
        self.residency = Residency(device, host, disk)
        self.slots: dict[Tier, dict[int, tuple[int, int]]] = {tier: {} for tier in TIERS}
        self.wanted: dict[int, int] = {}
        self.under_way: list[tuple[Moves, list[tuple[int, int]]]] = []
        self.next_page = 0
        self.counts: dict[str, int] = {}

    def pages(self, condition: str = "") -> list[int]:
        r = self.residency
        found = list(self.wanted)
        if condition == "resident":
            return [p for p in found if r.is_resident(p)]
        if condition == "still":
            return [p for p in found if not r.place(p).moving]
        return found

    def step(self) -> None:
        often = "create create write write begin begin begin settle settle drop drop forget fail"
        name = self.any.choice([*often.split(), "read"])
        if getattr(self, f"_{name}")():
            self.counts[name] = self.counts.get(name, 0) + 1
        self.residency.check(self.wanted)

    def _create(self) -> bool:
        if not self.residency.free("device"):
            return False
        page, self.next_page = self.next_page, self.next_page + 1
        slot = self.residency.create(page)
        self.wanted[page] = 0
        self.slots["device"][slot] = (page, 0)
        return True

    def _write(self) -> bool:
        pages = self.pages("resident")
        if not pages:
            return False
        page = self.any.choice(pages)
        # a page that is on its way to the device is not there yet
        if any(page in m.pages and m.target == "device" for m, _ in self.under_way):
            return False
        self.residency.write(page)
        self.wanted[page] += 1
        self.slots["device"][self.residency.device_slot(page)] = (page, self.wanted[page])
        return True

    def _ways(self, page: int) -> list[tuple[Tier, Tier]]:
        """The copies that may be begun of a page of which none is under way."""
        r, place = self.residency, self.residency.place(page)
        ways: list[tuple[Tier, Tier]] = []
        if place.device is not None and not place.clean:
            ways = [("device", "host"), ("device", "disk")]
        elif place.host is not None:
            ways = [("host", "disk")] if place.disk is None else []
            ways += [("host", "device")] if place.device is None else []
        elif place.disk is not None:
            ways = [("disk", "host")]
            ways += [("disk", "device")] if place.device is None else []
        return [(a, b) for a, b in ways if place.slot(b) is None and r.free(b)]

    def _begin(self) -> bool:
        r, still = self.residency, self.pages("still")
        ways = self._ways(self.any.choice(still)) if still else []
        if not ways:
            return False
        source, target = self.any.choice(ways)
        pages = [page for page in still if (source, target) in self._ways(page)]
        self.any.shuffle(pages)
        pages = pages[: self.any.randint(1, r.free(target))]
        before = self.any.choice([None, *self.wanted])
        at = self.any.randint(0, len(pages))
        rows = [(None, sorted(pages[:at])), (before, sorted(pages[at:]))]
        moves = r.begin_all(pages, source, target, rows=rows, more=self.any.randint(0, 3))
        assert moves.pages == tuple(pages)
        assert moves.source_slots == r.slots_in(source, pages)
        assert moves.target_slots == r.slots_in(target, pages)
        content = {page: self.slots[source][r.slots_in(source, (page,))[0]] for page in pages}
        for part in moves.cut(self.any.choice([1, 2, 9])):
            self.under_way.append((part, [content[page] for page in part.pages]))
        return True

    def _settle(self) -> bool:
        if not self.under_way:
            return False
        moves, contents = self.under_way.pop(self.any.randrange(len(self.under_way)))
        for slot, content in zip(moves.target_slots, contents, strict=True):
            # what was read when the copy began or a later write: stale once it was written
            self.slots[moves.target][slot] = content
        stale = [content for content in contents if self.wanted.get(content[0]) != content[1]]
        assert self.residency.done_all(moves) == [page for page, _ in stale]
        return True

    def _fail(self) -> bool:
        if not self.under_way or self.any.random() < 0.7:
            return False
        moves, _ = self.under_way.pop(self.any.randrange(len(self.under_way)))
        there = [page for page in moves.pages if page in self.wanted]
        assert self.residency.failed_all(moves) == there
        return True

    def _drop(self) -> bool:
        r = self.residency
        for page in self.any.sample(self.pages("still"), len(self.pages("still"))):
            place = r.place(page)
            held = [t for t in TIERS if place.slot(t) is not None]
            if r.can_drop(page):
                r.drop(page, "device")
                return True
            if len(held) > 1 and (place.device is None or place.clean):
                r.drop(page, self.any.choice([t for t in held if t != "device"]))
                return True
        return False

    def _forget(self) -> bool:
        pages = self.pages()
        if not pages or self.any.random() < 0.5:
            return False
        page = self.any.choice(pages)
        del self.wanted[page]
        self.residency.forget(page)
        return True

    def _read(self) -> bool:
        """Every copy that counts as good holds the last write."""
        for page, version in self.wanted.items():
            place = self.residency.place(page)
            busy = {m.target for m, _ in self.under_way if page in m.pages}
            good: list[Tier] = [t for t in TIERS if place.slot(t) is not None and t not in busy]
            if place.device is not None and not place.clean:
                good = [t for t in good if t == "device"]
            for tier in good:
                slot = place.slot(tier)
                assert slot is not None
                assert self.slots[tier][slot] == (page, version), f"{page} in {tier} is stale"
        return True


@pytest.mark.parametrize("seed", range(6))
def test_random_moves_lose_and_leak_nothing(seed: int):
    shadow = Shadow(seed)
    for _ in range(3000):
        shadow.step()
    for move, _ in shadow.under_way:
        shadow.residency.done_all(move)
    for page in list(shadow.wanted):
        shadow.residency.forget(page)

    shadow.residency.check(())
    assert all(slots.used == 0 for slots in shadow.residency.slots.values())
    assert min(shadow.counts.get(k, 0) for k in ("create", "write", "begin", "settle", "drop")) > 50


def test_a_copy_made_while_its_page_was_written_is_worth_nothing():
    residency = Residency(device=2, host=2)
    residency.create(1)
    move = residency.begin(1, "device", "host")
    residency.write(1)

    assert residency.done_all(move) == [1]
    assert not residency.can_drop(1)
    assert residency.free("host") == 2


def test_a_slot_that_a_copy_uses_is_given_to_nobody():
    residency = Residency(device=1, host=1)
    residency.create(1)
    move = residency.begin(1, "device", "host")
    residency.forget(1)

    assert (residency.free("device"), residency.free("host")) == (0, 0)
    assert residency.done_all(move) == [1]
    assert (residency.free("device"), residency.free("host")) == (1, 1)


def test_a_page_without_a_good_copy_cannot_leave_the_device():
    residency = Residency(device=1, host=1)
    residency.create(1)
    with pytest.raises(AssertionError, match="would be lost"):
        residency.drop(1, "device")
    residency.done_all(residency.begin(1, "device", "host"))
    residency.drop(1, "device")
    with pytest.raises(AssertionError, match="would be lost"):
        residency.drop(1, "host")


def test_capacity_that_was_lowered_is_not_given_out_again():
    residency = Residency(device=3)
    for page in range(3):
        residency.create(page)
    residency.slots["device"].capacity = 2
    residency.forget(0)

    assert residency.free("device") == 0
    residency.forget(1)
    assert residency.free("device") == 1


def test_what_lies_in_a_row_is_put_in_a_row():
    residency = Residency(device=8, host=8)
    residency.create_all(range(6))
    moves = residency.begin_all((3, 4, 5, 0, 1, 2), "device", "host", rows=[(None, range(6))])

    assert moves.source_slots == moves.target_slots == (3, 4, 5, 0, 1, 2)
    residency.done_all(moves)
    residency.write(2)
    again = residency.begin_all((2,), "device", "host", rows=[(1, (2,))])
    assert again.target_slots == (2,), "where it lay, behind the page before it"


def test_copies_of_one_page_that_go_two_ways_end_one_by_one():
    residency = Residency(device=1, host=1, disk=1)
    residency.create(1)
    residency.done_all(residency.begin(1, "device", "host"))
    residency.drop(1, "device")
    down, up = residency.begin(1, "host", "disk"), residency.begin(1, "host", "device")
    assert residency.place(1).moving == 2
    residency.done_all(down)

    assert residency.moving == {1} and residency.place(1).moving == 1
    residency.write(1)
    assert residency.done_all(up) == [1]
    assert (residency.moving, residency.dirty) == (set(), {1})
    assert (residency.free("host"), residency.free("disk")) == (1, 1)
    residency.check((1,))
