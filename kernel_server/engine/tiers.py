"""The pools below the device, and the copies between them. Bytes only: no page, no session.

A *host pool* is memory of the machine, pinned when the device is a GPU; a *disk pool* is one file.
Both have slots of one page. A copy is begun on the engine thread and told done from a thread of
its own; on a GPU it runs on a copy engine, ordered after the kernels that were given before it,
and whoever needs an arriving page waits for its copy alone. Which pages move is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_server.engine.kv_cache import KVCache
from kernel_server.protocol.errors import OutOfDeviceMemory, TornPage

log = logging.getLogger(__name__)

WAYS = ("device-host", "host-device", "host-disk", "disk-host")

#: Pinned about this many bytes at a time, so that the first part can be used at once.
_PIN_STEP = 1 << 30
_PAGE = mmap.PAGESIZE
#: Copies one way that are given to the device before the first of them is waited for.
_AHEAD = 4
#: Bytes that a copy engine is given before it is let come to rest. Whoever else needs it, if only
#: for 8 bytes, waits until it does: an engine does not turn to another stream before that.
_BURST = 2 << 30


class HostPool:
    """Slots of `page_bytes` in the machine's memory; registered with CUDA when `pinned`.

    The memory is reserved at once and pinned piece by piece by `prepare`, on whatever thread calls
    it: pinning runs at about 1 GB/s through torch, which also rounds sizes up to powers of two.
    """

    def __init__(self, num_slots: int, page_bytes: int, *, pinned: bool) -> None:
        self.num_slots = num_slots
        self.page_bytes = page_bytes
        self.pinned = pinned
        size = max(-(-num_slots * page_bytes // _PAGE) * _PAGE, _PAGE)
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._registered: list[tuple[int, int]] = []
        #: slots that are ready to be used
        self.ready = 0 if pinned else num_slots

    def prepare(self, on_ready: Callable[[int], None]) -> None:
        """Pin the pool piece by piece; `on_ready` is told how many slots are ready so far."""
        if not self.pinned:
            on_ready(self.num_slots)
            return
        end = self._bytes.numel()
        step = pin_step(self.page_bytes)
        start = 0
        while start < end:
            length = min(step, end - start)
            part = self._bytes[start : start + length]
            _touch(part)
            _register(part)
            self._registered.append((start, length))
            start += length
            self.ready = min(self.num_slots, start // self.page_bytes)
            on_ready(self.ready)

    def slot(self, number: int) -> Tensor:
        """The bytes of one slot, uint8 `[page_bytes]`."""
        return self.slots(number, 1)

    def slots(self, first: int, count: int) -> Tensor:
        """The bytes of slots in a row, uint8 `[count * page_bytes]`."""
        if not 0 <= first <= first + count <= self.num_slots:
            raise IndexError(f"slots {first} to {first + count} of {self.num_slots}")
        return self._bytes[first * self.page_bytes : (first + count) * self.page_bytes]

    @property
    def slots_per_piece(self) -> int:
        """Slots in a pinned piece; no copy reaches from one piece into the next."""
        return pin_step(self.page_bytes) // self.page_bytes if self.pinned else self.num_slots

    @property
    def where(self) -> tuple[int, int]:
        """Address and bytes of the pool."""
        return self._bytes.data_ptr(), self._bytes.nbytes

    def close(self) -> None:
        """Let the pinned pieces go."""
        for start, length in self._registered:
            _unregister(self._bytes[start : start + length])
        self._registered = []


class DiskPool:
    """Slots of `page_bytes` in one file, each with the checksum of what was written last."""

    def __init__(self, path: Path, num_slots: int, page_bytes: int) -> None:
        self.path = path
        self.num_slots = num_slots
        self.page_bytes = page_bytes
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._sums: dict[int, int] = {}

    def write(self, slot: int, content: memoryview) -> None:
        """Write a whole slot. Raises OSError when the disk is full: nothing counts then."""
        self._sums.pop(slot, None)
        offset, done = slot * self.page_bytes, 0
        while done < len(content):
            done += os.pwrite(self._file, content[done:], offset + done)
        self._sums[slot] = zlib.crc32(content)

    def read(self, slot: int, into: memoryview) -> None:
        """Read a whole slot; raises TornPage when it is not what was written."""
        offset, done = slot * self.page_bytes, 0
        while done < len(into):
            got = os.preadv(self._file, [into[done:]], offset + done)
            if got == 0:
                break
            done += got
        if done < len(into) or zlib.crc32(into) != self._sums.get(slot):
            raise TornPage(
                f"slot {slot} of {self.path.name} is not what was written ({done} of"
                f" {len(into)} bytes read): the session is replayed from its tokens"
            )

    def close(self) -> None:
        """Close and remove the file: what outlives the server is in checkpoints."""
        os.close(self._file)
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Copy:
    """Pages to be copied, from each of these slots to the one at its place in the other list."""

    ticket: int
    #: one of `WAYS`
    way: str
    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CopyDone:
    """A copy was made, or `error` says why not; `seconds` from its first byte to its last.

    host_s: time of the copier's thread to give it to the device, seconds.
    """

    ticket: int
    nbytes: int
    seconds: float
    error: Exception | None = None
    host_s: float = 0.0


class Copier:
    """Carries out copies beside the engine.

    told: called with each CopyDone, from the copier's threads.
    """

    def __init__(
        self,
        cache: KVCache,
        host: HostPool | None,
        disk: DiskPool | None,
        told: Callable[[CopyDone], None],
    ) -> None:
        self._device = cache.pool.view(cache.num_pages, -1).view(torch.uint8)
        self._host = host
        self._disk = disk
        self._told = told
        self._cuda = cache.device.type == "cuda"
        #: what must have happened before an arriving page is read, by ticket
        self._arrivals: dict[int, Any] = {}
        self._queues: dict[str, queue.SimpleQueue[Any]] = {way: queue.SimpleQueue() for way in WAYS}
        if self._cuda:
            self._streams = {way: torch.cuda.Stream(cache.device) for way in self._queues}
        self._threads = [
            threading.Thread(target=self._serve, args=(way,), name=f"copies {way}", daemon=True)
            for way in self._queues
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, copy: Copy) -> None:
        """Begin a copy, ordered after all that was computed before; on the engine's thread."""
        after = None
        if self._cuda:
            after = torch.cuda.Event()
            after.record(torch.cuda.current_stream())
        arrival = None
        if copy.way == "host-device":
            arrival = self._arrivals[copy.ticket] = _Arrival()
        self._queues[copy.way].put((copy, after, arrival))

    def wait(self, ticket: int) -> bool:
        """Let what is computed next find the pages of this copy; False if it was not made, and
        then that has been told.

        On a GPU the device waits, not the thread, once the copy has been given to it.
        """
        arrival = self._arrivals.get(ticket)
        if arrival is None:
            return True  # made long ago
        arrival.given.wait()
        if arrival.failed:
            return False
        if arrival.event is not None:
            torch.cuda.current_stream().wait_event(arrival.event)
        return True

    def close(self) -> None:
        """End the threads once what was begun is done."""
        for way in self._queues.values():
            way.put(None)
        for thread in self._threads:
            thread.join(timeout=30.0)

    # -- on the copier's threads --------------------------------------------------------------

    def _serve(self, way: str) -> None:
        """Begin copies as they come; tell of each when it is done.

        The next ones are begun before the first is waited for: a bus that waits for whoever is told
        of a copy ran at half its speed. But not without end (`_BURST`).
        """
        jobs, begun = self._queues[way], deque[_Begun]()
        given = self._cuda and "disk" not in way  # others are done once begun
        most = _AHEAD if given else 1
        burst, ended = 0, False
        while begun or not ended:
            job: Any = None
            if not ended and len(begun) < most:
                with contextlib.suppress(queue.Empty):
                    job = jobs.get(block=not begun)
                    ended = job is None
            if job is not None:
                more = self._nbytes(job[0])
                burst = self._rested(begun[-1], burst, more) if given and begun else 0
                begun.append(self._begin(*job))
                burst += more
            elif begun:
                self._finish(begun.popleft())

    def _rested(self, last: _Begun, burst: int, more: int) -> int:
        """Let the engine of this way rest if `more` bytes are too many after those it has been
        given; what is left of those.

        last: what it was given last. Nothing is told meanwhile: the next copy follows at once.
        """
        if burst + more <= _BURST:
            return burst
        with contextlib.suppress(Exception):  # told of the copy that it befell
            if last.end is not None:
                last.end.synchronize()
        return 0

    def _nbytes(self, copy: Copy) -> int:
        return len(copy.sources) * self._device.shape[1]

    def _begin(self, copy: Copy, after: Any, arrival: _Arrival | None) -> _Begun:
        """Give a copy to the device; on a CPU, and to the disk, carry it out."""
        made = _Begun(copy, arrival, time.perf_counter())
        began = time.thread_time()
        try:
            self._carry_out(made, after)
            if made.end is not None:
                # otherwise the bytes were copied here, which does not take the interpreter
                made.host_s = time.thread_time() - began
        except Exception as found:
            made.error = found
            if self._cuda:
                # what was given to the device before that still uses its slots
                with contextlib.suppress(Exception):
                    _wait_for(self._streams[copy.way])
        if arrival is not None:
            if made.error is not None:
                # told first: whoever goes on without the pages must find that they are not there
                self._tell(made)
                arrival.failed = True
            arrival.event = made.end
            arrival.given.set()
        return made

    def _finish(self, made: _Begun) -> None:
        """Wait for a copy that was begun, and tell of it unless that was done."""
        if made.arrival is not None and made.arrival.failed:
            return
        if made.error is None and made.end is not None:
            try:
                made.end.synchronize()
                made.seconds = made.begin.elapsed_time(made.end) / 1e3
            except Exception as found:
                made.error = found
        if made.error is None and made.arrival is not None:
            self._arrivals.pop(made.copy.ticket, None)
        self._tell(made)

    def _tell(self, made: _Begun) -> None:
        nbytes = 0 if made.error else self._nbytes(made.copy)
        self._told(CopyDone(made.copy.ticket, nbytes, made.seconds, made.error, made.host_s))

    def _carry_out(self, made: _Begun, after: Any) -> None:
        copy = made.copy
        if copy.way in ("host-disk", "disk-host"):
            self._disk_copy(copy)
            made.seconds = time.perf_counter() - made.began
            return
        host = self._host
        assert host is not None, "a copy to the host, and there is no host pool"
        down = copy.way == "device-host"
        on_device, below = (copy.sources, copy.targets)[:: 1 if down else -1]
        pairs = []
        for slot, there, count in neighbours(on_device, below, host.slots_per_piece):
            part = self._device.narrow(0, slot, count).view(-1), host.slots(there, count)
            pairs.append(part if down else part[::-1])
        if not self._cuda:
            for source, target in pairs:
                target.copy_(source)
            made.seconds = time.perf_counter() - made.began
            return
        stream = self._streams[copy.way]
        with torch.cuda.stream(stream):
            stream.wait_event(after)
            made.begin = torch.cuda.Event(enable_timing=True)
            made.end = torch.cuda.Event(enable_timing=True, blocking=True)
            made.begin.record(stream)
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            made.end.record(stream)

    def _disk_copy(self, copy: Copy) -> None:
        host, disk = self._host, self._disk
        assert host is not None and disk is not None, "a copy to the disk, and there is none"
        for source, target in zip(copy.sources, copy.targets, strict=True):
            if copy.way == "host-disk":
                disk.write(target, host.slot(source).numpy().data)
            else:
                disk.read(source, host.slot(target).numpy().data)


@dataclass(slots=True)
class _Begun:
    """A copy on its way, or done where nothing is on its way by itself."""

    copy: Copy
    arrival: _Arrival | None
    began: float
    #: of the device, around the copy
    begin: Any = None
    end: Any = None
    seconds: float = 0.0
    error: Exception | None = None
    host_s: float = 0.0


def _wait_for(stream: Any) -> None:
    """Wait for all that a stream was given. By an event made for it: waiting for the stream itself
    takes a core as long as it lasts, which the interpreter's other threads need."""
    end = torch.cuda.Event(blocking=True)
    end.record(stream)
    end.synchronize()


class _Arrival:
    """What whoever needs arriving pages waits for."""

    __slots__ = ("event", "failed", "given")

    def __init__(self) -> None:
        self.given = threading.Event()
        self.event: Any = None
        self.failed = False


def _touch(part: Tensor, threads: int = 4) -> None:
    """Have the pages of this memory made by several threads: one alone takes most of the time."""
    step = -(-part.numel() // threads // _PAGE) * _PAGE
    pieces = [part[i : i + step] for i in range(0, part.numel(), step)]
    workers = [threading.Thread(target=lambda p=p: p[::_PAGE].zero_()) for p in pieces]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def neighbours(
    slots: Sequence[int], host: Sequence[int], per_piece: int
) -> list[tuple[int, int, int]]:
    """Pairs of a slot and a slot of the host as (first, first of the host, count): slots in a row
    that go with slots in a row are one copy.

    per_piece: slots of the host's pool that are pinned together, of which none goes with a slot of
    the next piece.

    >>> neighbours([4, 3, 7], [9, 8, 1], 100)
    [(7, 1, 1), (3, 8, 2)]
    """
    found: list[tuple[int, int, int]] = []
    first = below = count = room = 0
    for there, slot in sorted(zip(host, slots, strict=True)):
        if count < room and there == below + count and slot == first + count:
            count += 1
            continue
        if count:
            found.append((first, below, count))
        first, below, count, room = slot, there, 1, per_piece - there % per_piece
    if count:
        found.append((first, below, count))
    return found


def pin_step(page_bytes: int) -> int:
    """Bytes of a pinned piece: whole slots and whole pages of the system, at least one of each.

    CUDA refuses a copy that reaches from one registered piece into the next ("invalid argument").
    """
    whole = math.lcm(page_bytes, _PAGE)
    return max(1, _PIN_STEP // whole) * whole


def _register(part: Tensor) -> None:
    code = torch.cuda.cudart().cudaHostRegister(part.data_ptr(), part.numel(), 0)
    if int(code) != 0:
        raise OutOfDeviceMemory(
            f"{part.numel():,} bytes of host memory could not be pinned (CUDA error {int(code)}):"
            " start the server with less --host-memory"
        )


def _unregister(part: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(part.data_ptr())
