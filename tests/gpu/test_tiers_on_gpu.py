"""Pages in three tiers on one GPU: pinned host memory, a file, copies beside what is computed."""

from __future__ import annotations

import contextlib
import queue
import warnings
from collections.abc import Iterator

import pytest
import torch

from kernel_server.engine import tiers as tiers_module
from kernel_server.engine.kv_cache import KVCache, LayerKV, PageShape
from kernel_server.engine.tiers import Copier, Copy, CopyDone, HostPool
from notebooks.harness import tier_watch
from notebooks.harness.inprocess import Local, local_kernel
from notebooks.harness.tiny import make_folder
from tests.kernel import tier_cases

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def local(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Local]:
    folder = make_folder(request.param, tmp_path_factory.mktemp("models"))
    with local_kernel(
        model=folder, dtype="bfloat16", device="cuda:0", prefill_chunk=16,
        kv_memory_bytes=400 << 10, host_memory_bytes=600 << 10, disk_memory_bytes=2 << 20,
    ) as made:  # fmt: skip
        tier_watch.wait_until_ready(made)
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every page came back, in every tier."""
    if "local" not in request.fixturenames:
        yield
        return
    local: Local = request.getfixturevalue("local")
    yield
    tier_cases.nothing_is_left(local)


@contextlib.contextmanager
def waiting_is_refused() -> Iterator[None]:
    """Calls that wait for the device fail, on every thread of the process."""
    with warnings.catch_warnings():
        # torch says, once in a process, that it may not find every such call
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_host_pool_is_pinned_beside_everything_else(local: Local) -> None:
    host = local.kernel.tiers._host
    assert host is not None and host.ready == host.num_slots
    assert host.slot(0).is_pinned() and host.slot(host.num_slots - 1).is_pinned()


def test_looking_up_pages_waits_for_none_of_them() -> None:
    """What comes after pages that are on their way is begun meanwhile."""
    shape = PageShape(4, 2, (LayerKV(2, 8, 2, 8),) * 4, torch.bfloat16)
    here, there = KVCache(shape, 9, "cpu"), KVCache(shape, 9, "cuda:0")
    table = (7, 2, 5)
    there.layer_rows(table)  # makes the memory they go through
    with waiting_is_refused():
        found = [*there.layer_rows(table), *there.slot_rows(table, 3, 10)]
    with waiting_is_refused(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.tensor(table).to("cuda:0")  # the control: this is what waits
    wanted = [*here.layer_rows(table), *here.slot_rows(table, 3, 10)]
    assert len(found) == len(wanted)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


def test_a_full_disk_is_told_and_loses_nothing(local: Local) -> None:
    tier_cases.a_full_disk_is_told_and_loses_nothing(local)


@pytest.mark.parametrize("group", [0, -1])
def test_a_copy_that_brings_nothing_is_made_again(local: Local, group: int) -> None:
    tier_cases.a_copy_that_brings_nothing_is_made_again(local, group)


@pytest.mark.parametrize("to", ["host", "disk"])
def test_an_evicted_session_goes_on_bit_for_bit(local: Local, to: str) -> None:
    tier_cases.an_evicted_session_goes_on_bit_for_bit(local, to)


def test_more_sessions_than_the_device_holds(local: Local) -> None:
    tier_cases.more_sessions_than_the_device_holds(local)


@pytest.mark.parametrize("seed", range(4))
def test_random_moves_end_alike(local: Local, seed: int) -> None:
    tier_cases.random_moves_end_alike(local, seed)


def test_pages_change_places(local: Local) -> None:
    tier_cases.pages_change_places(local, spare=2)


def test_what_follows_pressure_is_as_before(local: Local) -> None:
    tier_cases.what_follows_pressure_is_as_before(local)


def test_every_slot_of_a_pool_pinned_in_pieces_takes_copies(monkeypatch) -> None:
    """CUDA refuses a copy that reaches from one pinned piece into the next."""
    monkeypatch.setattr(tiers_module, "_PIN_STEP", 1 << 20)
    shape = PageShape(16, 2, (LayerKV(3, 40, 3, 40),) * 4, torch.bfloat16)  # 15,360 bytes
    cache, host = KVCache(shape, 8, "cuda:0"), HostPool(400, shape.page_bytes, pinned=True)
    told: queue.SimpleQueue[CopyDone] = queue.SimpleQueue()
    copier = Copier(cache, host, None, told.put)
    try:
        host.prepare(lambda ready: None)
        cache.pool.copy_(torch.randn(cache.pool.shape))
        for slot in range(host.num_slots):
            copier.begin(Copy(slot, "device-host", (slot % 8,), (slot,)))
        assert [told.get(timeout=60).error for _ in range(host.num_slots)] == [None] * 400
        content = cache.pool.view(8, -1).view(torch.uint8).cpu()
        assert all(torch.equal(host.slot(n), content[n % 8]) for n in range(host.num_slots))
    finally:
        copier.close()
        host.close()


def test_copies_let_others_use_their_engine(monkeypatch) -> None:
    """Eight bytes come down while more is queued than anyone would wait for."""
    monkeypatch.setattr(tiers_module, "_BURST", 256 << 20)
    shape = PageShape(128, 4, (LayerKV(32, 128, 32, 128),) * 4, torch.bfloat16)  # 8 MiB
    cache, host = KVCache(shape, 32, "cuda:0"), HostPool(32, shape.page_bytes, pinned=True)
    told: queue.SimpleQueue[CopyDone] = queue.SimpleQueue()
    copier = Copier(cache, host, None, told.put)
    count = 120  # of 256 MiB: half a second
    value = torch.ones(1, dtype=torch.int64, device="cuda:0")
    try:
        host.prepare(lambda ready: None)
        for ticket in range(count):
            copier.begin(Copy(ticket, "device-host", (*range(32),), (*range(32),)))
        for _ in range(3):
            assert value.item() == 1
        assert told.qsize() < count // 2
        assert [told.get(timeout=60).error for _ in range(count)] == [None] * count
    finally:
        copier.close()
        host.close()
