"""A tier that this machine cannot hold is refused by one line, before anything is taken for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernel_server import tiers as tiers_module
from kernel_server.config import ServerConfig
from kernel_server.engine.kv_cache import KVCache, LayerKV, PageShape
from kernel_server.protocol.errors import BadArgument
from kernel_server.tiers import Tiers, require_space

TIB = 1 << 40
SHAPE = PageShape(4, 2, (LayerKV(2, 8, 2, 8),) * 4, torch.float32)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 8 GiB, whose file systems have 64 GiB."""
    monkeypatch.setattr(tiers_module, "_memory_bytes", lambda: 8 << 30)
    monkeypatch.setattr(tiers_module, "_space_bytes", lambda folder: 64 << 30)


def refused(error: pytest.ExceptionInfo[BadArgument], *words: str) -> bool:
    text = str(error.value)
    return "\n" not in text and all(word in text for word in words)


def opened(**options: Any) -> BadArgument:
    """What making these tiers raises."""
    tiers = Tiers(ServerConfig(**options), KVCache(SHAPE, 6, "cpu"))
    with pytest.raises(BadArgument) as caught:
        tiers.open(lambda event: None)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("size", [65 << 30, 900 * TIB])
def test_a_disk_tier_beyond_its_file_system_is_refused(
    small_machine: None, tmp_path: Path, size: int
) -> None:
    with pytest.raises(BadArgument) as caught:
        require_space(
            ServerConfig(host_memory_bytes=1 << 30, disk_memory_bytes=size, disk_path=tmp_path)
        )

    assert refused(
        caught, f"--disk-memory of {size:,} bytes", str(tmp_path), f"{64 << 30:,} bytes",
        "another --disk-path",
    )  # fmt: skip


def test_tiers_that_may_be_more_than_is_free_are_not_refused(small_machine: None) -> None:
    """The host's memory neither, beyond what the machine says that it has: it may get more."""
    require_space(ServerConfig(host_memory_bytes=90 << 30, disk_memory_bytes=64 << 30))


def test_this_machine_says_what_it_has(tmp_path: Path) -> None:
    space = tiers_module._space_bytes(tmp_path)

    assert space is not None and space > 0
    assert tiers_module._space_bytes(tmp_path / "not" / "made") == space
    assert not (tmp_path / "not").exists()
    with pytest.raises(BadArgument, match="more than the file system"):
        require_space(ServerConfig(disk_memory_bytes=space + 1, disk_path=tmp_path))


def test_a_file_system_that_does_not_say_its_size_refuses_nothing() -> None:
    """As /proc says 0, and some network file systems."""
    assert tiers_module._space_bytes(Path("/proc/nothing")) is None
    require_space(ServerConfig(disk_memory_bytes=900 * TIB, disk_path=Path("/proc/nothing")))


def test_more_pages_than_can_be_kept_account_of_are_refused(small_machine: None) -> None:
    cache = KVCache(SHAPE, 6, "cpu")
    most = (8 << 30) // 56 * cache.page_bytes
    with pytest.raises(BadArgument) as caught:
        Tiers(ServerConfig(host_memory_bytes=1 << 30, disk_memory_bytes=900 * TIB), cache)

    assert refused(caught, "--disk-memory", "to keep account", f"less than {most:,} bytes")


def test_what_is_kept_of_a_page_is_counted() -> None:
    """So much does a page take that nobody has."""
    import tracemalloc

    from kernel_server.state.pages import PagePool

    count = 100_000
    tracemalloc.start()
    pool = PagePool(count)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert pool.num_free == count
    assert 0.9 * tiers_module._BOOKS_BYTES <= taken / count <= 1.1 * tiers_module._BOOKS_BYTES


def test_host_memory_that_the_system_does_not_give_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("kernel_server.engine.tiers.mmap.mmap", fails)
    error = str(opened(host_memory_bytes=1 << 20))

    assert error.startswith("--host-memory of 1,048,576 bytes cannot be reserved (Cannot allocate")
    assert error.endswith("bytes are available): give less")


def test_a_folder_that_takes_no_file_is_told_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (Path("/proc/foo"), tmp_path / "file", tmp_path / "file" / "below"):
        error = opened(host_memory_bytes=1 << 20, disk_memory_bytes=1 << 20, disk_path=folder)

        text = str(error)
        assert text.startswith(f"--disk-path {folder} takes no file for the 1,048,576 bytes"), text
        assert "give another --disk-path that can be written" in text
