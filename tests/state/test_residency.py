"""Pages move between tiers as they like, and every one that is read holds what was written last."""

from __future__ import annotations

import random

import pytest

from kernel_server.state.residency import TIERS, Move, Residency, Tier


class Shadow:
    """The tiers as dictionaries: what each slot holds, and what each page should hold."""

    def __init__(self, seed: int, device: int = 6, host: int = 5, disk: int = 7) -> None:
        self.any = random.Random(seed)
        self.residency = Residency(device, host, disk)
        self.slots: dict[Tier, dict[int, tuple[int, int]]] = {tier: {} for tier in TIERS}
        self.wanted: dict[int, int] = {}
        self.under_way: list[tuple[Move, tuple[int, int]]] = []
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
        if any(m.page == page and m.target == "device" for m, _ in self.under_way):
            return False
        self.residency.write(page)
        self.wanted[page] += 1
        self.slots["device"][self.residency.device_slot(page)] = (page, self.wanted[page])
        return True

    def _begin(self) -> bool:
        r, page = self.residency, None
        pages = self.pages("still")
        if not pages:
            return False
        page = self.any.choice(pages)
        place = r.place(page)
        ways: list[tuple[Tier, Tier]] = []
        if place.device is not None and not place.clean:
            ways = [("device", "host"), ("device", "disk")]
        elif place.host is not None:
            ways = [("host", "disk")] if place.disk is None else []
            ways += [("host", "device")] if place.device is None else []
        elif place.disk is not None:
            ways = [("disk", "host")]
            ways += [("disk", "device")] if place.device is None else []
        ways = [(a, b) for a, b in ways if place.slot(b) is None and r.free(b)]
        if not ways:
            return False
        source, target = self.any.choice(ways)
        move = r.begin(page, source, target)
        self.under_way.append((move, self.slots[source][move.source_slot]))
        return True

    def _settle(self) -> bool:
        if not self.under_way:
            return False
        several = self.any.sample(self.under_way, self.any.randint(1, len(self.under_way)))
        for move, content in several:
            self.under_way.remove((move, content))
            # what was read when the copy began or a later write: stale once it was written
            self.slots[move.target][move.target_slot] = content
        if len(several) > 1:
            self.residency.done_all([move for move, _ in several])
        else:
            self.residency.done(several[0][0])
        return True

    def _fail(self) -> bool:
        if not self.under_way or self.any.random() < 0.7:
            return False
        move, _ = self.under_way.pop(self.any.randrange(len(self.under_way)))
        self.residency.failed(move)
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
            busy = {m.target for m, _ in self.under_way if m.page == page}
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
        shadow.residency.done(move)
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

    assert not residency.done(move)
    assert not residency.can_drop(1)
    assert residency.free("host") == 2


def test_a_slot_that_a_copy_uses_is_given_to_nobody():
    residency = Residency(device=1, host=1)
    residency.create(1)
    move = residency.begin(1, "device", "host")
    residency.forget(1)

    assert (residency.free("device"), residency.free("host")) == (0, 0)
    residency.done(move)
    assert (residency.free("device"), residency.free("host")) == (1, 1)


def test_a_page_without_a_good_copy_cannot_leave_the_device():
    residency = Residency(device=1, host=1)
    residency.create(1)
    with pytest.raises(AssertionError, match="would be lost"):
        residency.drop(1, "device")
    residency.done(residency.begin(1, "device", "host"))
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
