"""Watches pages move between the tiers of a kernel, and where the bytes are meanwhile.

It listens where the state is told of copies and lets pages leave, and samples on a thread; it
changes nothing, but for the copies of pages that it is told to give up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from djinn_nb import Session
from kernel_server.protocol import messages as m
from kernel_server.state.events import Ticked
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import Local
from notebooks.harness.records import Source


@dataclass(frozen=True, slots=True)
class Copied:
    """One copy of a few pages. way: such as `device-host`. session_id: None for write-behind."""

    way: str
    pages: int
    nbytes: int
    seconds: float
    session_id: str | None
    reason: str


@dataclass(slots=True)
class Moves:
    """Copies that were made, pages that left the device, and what the owner was told of it."""

    copies: list[Copied] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: int = 0
    told: list[tuple[str, int]] = field(default_factory=list)

    def nbytes(self, way: str) -> int:
        return sum(one.nbytes for one in self.copies if one.way == way)

    def untold(self, timeout_s: float = 60.0) -> int:
        """Bytes that sessions waited for and no event told of; events may be on their way still."""
        swapped = sum(one.nbytes for one in self.copies if one.session_id is not None)
        end = time.monotonic() + timeout_s
        while True:
            told = sum(nbytes for _, nbytes in self.told)
            if told == swapped or time.monotonic() > end:
                return swapped - told
            time.sleep(0.01)

    def swaps(self, way: str) -> list[Copied]:
        """Copies that some session waited for."""
        return [one for one in self.copies if one.way == way and one.session_id is not None]


@contextlib.contextmanager
def watching_moves(local: Local) -> Iterator[Moves]:
    """Note every copy between tiers and every page that leaves the device."""
    moves = Moves()
    state, mirror = local.kernel.state, local.server._client.mirror
    done, leave, take = state.copies_done, state.residency.leave_device, mirror.take

    def note_copy(event: Any) -> None:
        copying = state.copying[event.ticket]
        if event.error is not None:
            moves.failed.append(event.error.message)
        moves.copies.append(
            Copied(
                copying.moves.way,
                len(copying.moves),
                event.nbytes,
                event.seconds,
                copying.session_id,
                copying.reason,
            )
        )
        done(event)

    def note_leave(pages: Iterable[int]) -> list[int]:
        slots = leave(pages)
        moves.left += len(slots)
        return slots

    def note_event(event: m.Event) -> None:
        if event.kind == "swapped":
            moves.told.append((event.session_id, event.done))
        take(event)

    with (
        instead(state, "copies_done", note_copy),
        instead(state.residency, "leave_device", note_leave),
        instead(mirror, "take", note_event),
    ):
        yield moves


@contextlib.contextmanager
def counting_copies(local: Local) -> Iterator[Counter[str]]:
    """Bytes of all copies between tiers by way, and nothing else of them: next to nothing is done
    beside what is timed."""
    state, found = local.kernel.state, Counter[str]()
    done = state.copies_done

    def note(event: Any) -> None:
        found[state.copying[event.ticket].moves.way] += event.nbytes
        done(event)

    with instead(state, "copies_done", note):
        yield found


@dataclass(slots=True)
class Samples:
    """What was seen every few milliseconds: seconds since the first, bytes, pages by tier."""

    source: Source
    seconds: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    pages: dict[str, list[int]] = field(default_factory=dict)

    def another(self, timeout_s: float = 60.0) -> None:
        """Wait for a sample that is begun from now on: what is there at this moment is seen."""
        seen = len(self.seconds)
        # the next one may have begun before
        _until(lambda: len(self.seconds) > seen + 1, timeout_s, "no sample is taken")


@contextlib.contextmanager
def sampling(local: Local, every_s: float = 0.05) -> Iterator[Samples]:
    """Sample device memory and the pages in each tier's slots, on a thread.

    On a GPU the memory is NVML's figure for the whole card, contexts and other processes included:
    no less than this process has. On the CPU nothing can be measured that is the pool's alone, and
    the kernel's own table is summed: weights, pages in use, activations, kept stops.
    """
    cuda = local.cache.device.type == "cuda"
    measure = card_bytes if cuda else lambda: _table_bytes(local)
    samples = Samples("NVML" if cuda else "count")
    slots = local.kernel.state.residency.slots
    ended = threading.Event()
    began = time.perf_counter()

    def look() -> None:
        samples.memory_bytes.append(measure())
        samples.seconds.append(time.perf_counter() - began)
        for tier in ("device", "host", "disk"):
            samples.pages.setdefault(tier, []).append(slots[tier].used)

    def sample() -> None:
        while not ended.wait(every_s):
            look()

    look()
    thread = threading.Thread(target=sample, name="samples", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
        look()


def card_bytes() -> int:
    """Bytes in use on the card, by NVML."""
    import pynvml

    pynvml.nvmlInit()
    properties = torch.cuda.get_device_properties(0)
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def _table_bytes(local: Local) -> int:
    rows = {kind: nbytes for kind, nbytes, _ in local.kernel.memory()}
    kinds = ("weights", "KV pages in use", "activations", "kept stops")
    return sum(rows[kind] for kind in kinds)


def wait_until_ready(local: Local, timeout_s: float = 300.0) -> None:
    """Wait until the host's pool is pinned as far as it goes."""
    state = local.kernel.state
    _until(
        lambda: state.residency.slots["host"].capacity >= state.shape.num_host_pages,
        timeout_s,
        "the host's pool is not ready",
    )


def wait_until_settled(local: Local, timeout_s: float = 120.0) -> None:
    """Wait until no copy between tiers is under way."""

    def none_is() -> bool:
        with local.kernel.loop._lock:  # not in the middle of counting the last one
            return not local.kernel.state.copying

    _until(none_is, timeout_s, "copies do not end")


def held_bytes(local: Local) -> int:
    """Bytes of the tensors that all sessions hold beside their pages, as the engine has them."""
    return sum(local.kernel.engine.nbytes())


def wait_until_nothing_is_held(local: Local, timeout_s: float = 120.0) -> None:
    """Wait until the engine has let go of the tensors of the sessions that ended."""
    _until(lambda: held_bytes(local) == 0, timeout_s, "tensors of sessions that ended are held")


def tick(local: Local) -> None:
    """Let the kernel's clock tick now: what has come to rest is copied down from here on."""
    local.kernel.loop.dispatch(Ticked(now=time.monotonic()))


def wait_until_copied(local: Local, timeout_s: float = 300.0) -> None:
    """Wait until every page on the device has a copy below and no copy is under way: sessions that
    stand still have nothing left to be done for them.

    The host must have room for all of them.
    """

    tick(local)

    def all_are() -> bool:
        with local.kernel.loop._lock:  # not in the middle of counting the last one
            state = local.kernel.state
            return not (state.copying or state.residency.dirty)

    _until(all_are, timeout_s, "pages wait to be copied down beforehand")


def away_within(local: Local, sessions: Sequence[Session], seconds: float) -> int:
    """How many of these sessions have no page on the device, as soon as none has one, or after so
    many seconds. Nobody is asked: that would be a use of them."""
    end = time.monotonic() + seconds
    while True:
        away = sum(_on_device(local, one) == 0 for one in sessions)
        if away == len(sessions) or time.monotonic() > end:
            return away
        time.sleep(0.02)


def left_because(local: Local, sessions: Sequence[Session], words: str, seconds: float) -> int:
    """How many of these sessions left the device for a reason with these words, by the events of
    it, as soon as all did, or after so many seconds: events may be on their way still."""
    end = time.monotonic() + seconds
    ids = {one.id for one in sessions}
    while True:
        swaps = local.server.swaps()
        told = ids.intersection(swaps[swaps["text"].str.contains(words, regex=False)]["session"])
        if told == ids or time.monotonic() > end:
            return len(told)
        time.sleep(0.02)


def there_within(local: Local, session: Session, seconds: float) -> bool:
    """Whether all pages of a session are on the device, at the latest after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        inside = local.kernel.state.sessions[session.id]
        if _on_device(local, session) == sum(map(len, inside.tables)):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.02)


def _on_device(local: Local, session: Session) -> int:
    state = local.kernel.state
    with local.kernel.loop._lock:
        return state.residency.count(state.sessions[session.id].tables)["device"]


@contextlib.contextmanager
def nobody_idles(local: Local) -> Iterator[None]:
    """However slow whoever looks at a session is, it is not sent away as idle meanwhile."""
    with instead(local.kernel.state, "_leave_idle", lambda session: None):
        yield


def give_up_copies(local: Local, session: Session) -> set[int]:
    """Give up the copies that the host has of pages on the device, which is what writing them would
    do; returns all pages of the session."""
    state = local.kernel.state
    with local.kernel.loop._lock:
        pages = {p for table in state.sessions[session.id].tables for p in table}
        for page in pages:
            place = state.residency.place(page)
            if place.device is not None and place.host is not None and not place.moving:
                state.residency.drop(page, "host")
    return pages


def _until(holds: Callable[[], bool], timeout_s: float, complaint: str) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"{complaint} after {timeout_s:.0f} s")
        time.sleep(0.002)
