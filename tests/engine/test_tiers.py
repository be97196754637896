"""Pages go down and come back as they were; what was torn on the disk is told, never used."""

from __future__ import annotations

import itertools
import os
import queue
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernel_server.engine import tiers as tiers_module
from kernel_server.engine.kv_cache import KVCache, LayerKV, PageShape
from kernel_server.engine.tiers import Copier, Copy, CopyDone, DiskPool, HostPool, neighbours
from kernel_server.protocol.errors import TornPage

SHAPE = PageShape(4, 2, (LayerKV(2, 8, 2, 8),) * 4, torch.float32)


class Tiers:
    """Small pools, and what the copier told."""

    def __init__(self, folder: Path) -> None:
        self.cache = KVCache(SHAPE, 6, "cpu")
        self.host = HostPool(8, SHAPE.page_bytes, pinned=False)
        self.disk = DiskPool(folder / "pages", 4, SHAPE.page_bytes)
        self.told: queue.SimpleQueue[CopyDone] = queue.SimpleQueue()
        self.copier = Copier(self.cache, self.host, self.disk, self.told.put)
        self.cache.pool.copy_(torch.randn(self.cache.pool.shape))
        self.tickets = 0

    def copy(self, way: str, *moves: tuple[int, int]) -> CopyDone:
        self.tickets += 1
        sources, targets = zip(*moves, strict=True)
        self.copier.begin(Copy(self.tickets, way, sources, targets))
        if way == "host-device":
            self.copier.wait(self.tickets)
        return self.told.get(timeout=60)


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[Tiers]:
    made = Tiers(tmp_path)
    yield made
    made.copier.close()
    made.disk.close()


def test_a_page_that_went_down_to_the_disk_comes_back_bit_for_bit(tiers: Tiers):
    before = tiers.cache.pool.clone()
    assert tiers.copy("device-host", (1, 7), (2, 0)).error is None
    assert tiers.copy("host-disk", (7, 3), (0, 1)).error is None
    tiers.cache.poison(range(6))
    for slot in (7, 0):
        tiers.host.slot(slot).fill_(255)
    tiers.copy("disk-host", (3, 2), (1, 5))
    done = tiers.copy("host-device", (2, 4), (5, 0))

    assert done.nbytes == 2 * SHAPE.page_bytes and done.seconds > 0
    assert torch.equal(tiers.cache.pool[4], before[1])
    assert torch.equal(tiers.cache.pool[0], before[2])
    assert tiers.cache.pool[1].isnan().all()


def test_a_torn_slot_of_the_disk_is_told_and_fills_nothing_that_counts(tiers: Tiers):
    tiers.copy("device-host", (0, 0))
    tiers.copy("host-disk", (0, 2))
    with open(tiers.disk.path, "r+b") as file:
        file.seek(2 * SHAPE.page_bytes + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    done = tiers.copy("disk-host", (2, 1))

    assert isinstance(done.error, TornPage) and done.nbytes == 0
    assert isinstance(tiers.copy("disk-host", (3, 1)).error, TornPage), "never written"


def test_a_full_disk_is_told_and_its_slot_counts_for_nothing(tiers: Tiers, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    tiers.copy("device-host", (0, 0))
    monkeypatch.setattr(os, "pwrite", full)
    assert isinstance(tiers.copy("host-disk", (0, 1)).error, OSError)
    monkeypatch.undo()
    assert isinstance(tiers.copy("disk-host", (1, 1)).error, TornPage)
    assert tiers.copy("host-disk", (0, 1)).error is None


def test_who_waits_for_pages_that_could_not_come_learns_it_after_it_was_told(tiers: Tiers):
    tiers.copier.begin(Copy(9, "host-device", (0,), (99,)))

    assert not tiers.copier.wait(9)
    assert isinstance(tiers.told.get_nowait().error, (IndexError, RuntimeError))
    assert not tiers.copier.wait(9), "the second time it counts as made"


def test_the_file_of_pages_is_private_and_goes_with_the_pool(tmp_path: Path):
    pool = DiskPool(tmp_path / "in" / "pages", 2, 4096)
    assert pool.path.stat().st_mode & 0o077 == 0
    pool.close()
    assert not pool.path.exists()


def test_slots_in_a_row_are_one_copy_within_a_pinned_piece():
    slots, host = [5, 4, 6, 9, 10, 0], [20, 19, 21, 3, 2, 7]
    assert neighbours(slots, host, per_piece=100) == [(10, 2, 1), (9, 3, 1), (0, 7, 1), (4, 19, 3)]
    assert neighbours(slots, host, per_piece=20) == [
        (10, 2, 1), (9, 3, 1), (0, 7, 1), (4, 19, 1), (5, 20, 2),
    ]  # fmt: skip
    assert neighbours(range(3, 10), range(5, 12), per_piece=4) == [
        (3, 5, 3), (6, 8, 4),
    ], "the device's slots are in one piece"  # fmt: skip
    assert neighbours([], [], per_piece=4) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_page_is_in_one_copy_and_no_two_copies_could_be_one(seed: int):
    any_ = random.Random(seed)
    per_piece = any_.randint(1, 12)
    slots, host = ([*range(k, k + 30)] for k in (any_.randint(0, 9), any_.randint(0, 9)))
    for _ in range(any_.randint(0, 6)):
        a, b = any_.randrange(30), any_.randrange(30)
        host[a], host[b] = host[b], host[a]
    order = any_.sample(range(30), 30)
    found = neighbours([slots[i] for i in order], [host[i] for i in order], per_piece)

    pairs = [(a + i, b + i) for a, b, count in found for i in range(count)]
    assert sorted(pairs) == sorted(zip(slots, host, strict=True))
    assert all(b // per_piece == (b + count - 1) // per_piece for _, b, count in found)
    for (a, b, count), (next_a, next_b, _) in itertools.pairwise(found):
        follows = (next_a, next_b) == (a + count, b + count)
        assert not follows or next_b % per_piece == 0, "one copy was enough"


@pytest.mark.parametrize("page_bytes", [1000, 4096, 6000, 6553600])
def test_no_slot_reaches_from_one_pinned_piece_into_the_next(page_bytes: int, monkeypatch):
    pieces: list[tuple[int, int]] = []
    ready: list[int] = []
    monkeypatch.setattr(tiers_module, "_PIN_STEP", 3 * 6553600 + 100)
    monkeypatch.setattr(
        tiers_module, "_register", lambda part: pieces.append((part.data_ptr(), part.nbytes))
    )
    pool = HostPool(10 if page_bytes > 6000 else 50_000, page_bytes, pinned=True)
    pool.prepare(ready.append)

    first = pool.slot(0).data_ptr()
    starts = [start - first for start, _ in pieces]
    assert len(pieces) > 2 and all(start % 4096 == 0 for start in starts)
    for slot in range(pool.num_slots):
        begin, end = slot * page_bytes, (slot + 1) * page_bytes
        assert not any(begin < start < end for start in starts), f"slot {slot}"
    assert ready == sorted(ready) and ready[-1] == pool.num_slots
    assert sum(length for _, length in pieces) >= pool.num_slots * page_bytes
