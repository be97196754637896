"""The tiers below the device, as a server is told to have them: pools, their copier, the clock.

Sizes come from the configuration; what moves is decided in the state, how in `engine.tiers`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from kernel_server.config import ServerConfig
from kernel_server.engine.kv_cache import KVCache
from kernel_server.engine.tiers import Copier, CopyDone, DiskPool, HostPool
from kernel_server.protocol.errors import BadArgument, DjinnError
from kernel_server.protocol.messages import ErrorInfo, error_info
from kernel_server.state.events import CopiesDone, PoolGrown, StateEvent, Ticked
from kernel_server.state.shape import ModelShape
from kernel_server.state.slots import Slots
from kernel_server.telemetry import Row, untouched_bytes

#: How often idle sessions are looked for, and running ones recorded, seconds.
TICK_S = 0.5
#: What the state notes of a page that nobody has (`PagePool`): a number, and entries of 3 lists.
_BOOKS_BYTES = 56

Dispatch = Callable[[StateEvent], None]


class Tiers:
    """Host and disk pools of one kernel.

    Raises BadArgument for a disk without a host, a pool smaller than a page, and one that cannot be
    made or kept account of.
    """

    def __init__(self, config: ServerConfig, cache: KVCache) -> None:
        page = cache.page_bytes
        self._cache = cache
        self._pages = (
            _pages("--host-memory", config.host_memory_bytes, page),
            _pages("--disk-memory", config.disk_memory_bytes, page),
        )
        if self._pages[1] and not self._pages[0]:
            raise BadArgument("--disk-memory needs --host-memory: pages reach the disk through it")
        self._require_books()
        self._pinned = cache.device.type == "cuda"
        self._folder, self._named = _folder(config), config.disk_path is not None
        self._host: HostPool | None = None
        self._disk: DiskPool | None = None
        self._copier: Copier | None = None
        self._ended = threading.Event()

    def _require_books(self) -> None:
        """Refuse pages of which the books alone would take all memory there is."""
        host, disk = self._pages
        books, there = (host + disk) * _BOOKS_BYTES, _memory_bytes()
        if books > there:
            page = self._cache.page_bytes
            raise BadArgument(
                f"--host-memory and --disk-memory hold {host + disk:,} pages of {page:,} bytes, and"
                f" to keep account of them takes {books:,} bytes, of {there:,} that this machine"
                f" has: give less than {there // _BOOKS_BYTES * page:,} bytes for both"
            )

    @property
    def host_ready(self) -> int:
        """Slots of the host that may be used at once: pinning takes its time."""
        return 0 if self._pinned else self._pages[0]

    def widen(self, shape: ModelShape) -> ModelShape:
        """The shape with the pages that fit below the device."""
        host, disk = self._pages
        return dataclasses.replace(
            shape,
            num_pages=shape.num_pages + host + disk,
            num_host_pages=host,
            num_disk_pages=disk,
        )

    def open(
        self, dispatch: Dispatch, begun: Callable[[int, float], None] | None = None
    ) -> Copier | None:
        """Make the pools; None where the device is the only tier.

        begun: told, before a copy is told done, its ticket and the time the host took to begin it.
        Raises BadArgument where a pool cannot be made.
        """
        host, disk = self._pages
        if not host:
            return None
        page = self._cache.page_bytes
        try:
            self._host = HostPool(host, page, pinned=self._pinned)
        except OSError as error:
            free = psutil.virtual_memory().available
            raise BadArgument(
                f"--host-memory of {host * page:,} bytes cannot be reserved"
                f" ({error.strerror or error}; {free:,} bytes are available): give less"
            ) from error
        if disk:
            try:
                self._disk = DiskPool(self._folder / f"djinn-pages-{os.getpid()}", disk, page)
            except OSError as error:
                flag = "--disk-path" if self._named else "the system's folder for temporary files,"
                raise BadArgument(
                    f"{flag} {self._folder} takes no file for the {disk * page:,} bytes of"
                    f" --disk-memory ({error.strerror or error}): give"
                    f" {'another' if self._named else 'a'} --disk-path that can be written, or"
                    " leave --disk-memory out"
                ) from error

        def told(done: CopyDone) -> None:
            if begun is not None and done.host_s:
                begun(done.ticket, done.host_s)
            dispatch(
                CopiesDone(
                    ticket=done.ticket,
                    nbytes=done.nbytes,
                    seconds=done.seconds,
                    error=None if done.error is None else _why(done.error),
                )
            )

        self._copier = Copier(self._cache, self._host, self._disk, told)
        return self._copier

    def start(self, dispatch: Dispatch, *, always: bool = False) -> None:
        """Ready the host's pool beside everything else, and let time pass. always: also where there
        is no such pool."""
        host = self._host
        if host is None and not always:
            return

        def prepare() -> None:
            assert host is not None
            host.prepare(lambda ready: dispatch(PoolGrown(num_slots=ready)))

        def tick() -> None:
            while not self._ended.wait(TICK_S):
                dispatch(Ticked(now=time.monotonic()))

        if self._pinned and host is not None:
            threading.Thread(target=prepare, name="host pool", daemon=True).start()
        threading.Thread(target=tick, name="clock", daemon=True).start()

    def host_rows(self, slots: Slots, absent: int) -> list[Row]:
        """What the host's pool holds, as (kind, bytes, note). absent: pages not on the device."""
        count, page = self._pages[0], self._cache.page_bytes
        if not count:
            return []
        used, free = slots.used, count - slots.used
        return [
            ("KV pages in use (host)", used * page,
             f"{used} of {count} pages; {absent} pages of sessions are not on the device"),
            ("KV pages free (host)", free * page, free_note(slots)),
        ]  # fmt: skip

    def disk_rows(self, slots: Slots) -> list[Row]:
        """What the file of pages holds; no part of the process's memory."""
        count, page = self._pages[1], self._cache.page_bytes
        if not count:
            return []
        note = f"{slots.used} of {count} pages, in a file"
        free = (count - slots.used) * page
        return [
            ("KV pages in use (disk)", slots.used * page, note),
            ("KV pages free (disk)", free, free_note(slots)),
        ]

    def untouched_bytes(self) -> int:
        """Bytes of the host's pool that were never written, and take no memory yet."""
        return 0 if self._host is None else untouched_bytes(*self._host.where)

    def close(self) -> None:
        """End the copies; the file of pages is removed."""
        self._ended.set()
        if self._copier is not None:
            self._copier.close()
        if self._disk is not None:
            self._disk.close()
        if self._host is not None:
            self._host.close()


def require_space(config: ServerConfig) -> None:
    """Raise BadArgument for a disk tier that its file system cannot hold in any case.

    More than is free may do: the file grows as it is written, and a tier that is full by then
    refuses pages. Of the host's memory nothing is known before it is asked for: some machines are
    given more as they use it, and report less than that.
    """
    wanted, folder = config.disk_memory_bytes, _folder(config)
    space = _space_bytes(folder)
    if space is not None and wanted > space:
        raise BadArgument(
            f"--disk-memory of {wanted:,} bytes is more than the file system of {folder} has,"
            f" {space:,} bytes: give less, or another --disk-path"
        )


def _memory_bytes() -> int:
    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def _folder(config: ServerConfig) -> Path:
    """Where the file of pages is."""
    return config.disk_path or Path(tempfile.gettempdir())


def _space_bytes(folder: Path) -> int | None:
    """Size of the file system that a folder is on, or will be on; None where it does not say."""
    for there in (folder.absolute(), *folder.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(there).total or None
    return None


def free_note(slots: Slots) -> str:
    """How much of a tier may be used, and whether it takes pages."""
    refusal = "" if slots.refusal is None else f"; refuses pages for now: {slots.refusal}"
    return f"budget {slots.capacity} pages{refusal}"


def _why(error: Exception) -> ErrorInfo:
    """Why a copy was not made, in words that end up in a message to a person."""
    info = error_info(error)
    if isinstance(error, DjinnError):
        return info
    text = error.strerror if isinstance(error, OSError) and error.strerror else None
    first = (str(error).splitlines() or [""])[0]
    message = text or f"{type(error).__name__}: {first}".rstrip(": ")
    return dataclasses.replace(info, message=message)


def _pages(flag: str, nbytes: int, page: int) -> int:
    if nbytes and nbytes < page:
        raise BadArgument(f"{flag} of {nbytes:,} bytes holds no page of {page:,}: give more")
    return nbytes // page
