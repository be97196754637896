"""Pages that leave and pages that come at the same time, and plain copies both ways beside them.

One session is on the device and nothing of it is copied, another is in the host's memory; two
threads have the first evicted and the second restored. Then they change places. What is timed is
the copies themselves, both ways on one clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from djinn_nb import Session
from notebooks.harness import latency
from notebooks.harness.checkpoint import no_write_behind, rest_unlike, stop_at
from notebooks.harness.exactness import Prompt, Trace, Watch
from notebooks.harness.inprocess import Local
from notebooks.harness.pressure import evict, restore
from notebooks.harness.tier_watch import give_up_copies, wait_until_settled


@dataclass(slots=True)
class BothWays:
    """Two sessions that changed places again and again; lists have an entry per repetition.

    nbytes: of the pages one time, both ways. together: rate while both move, GB/s. apart: rate
    of the same two requests, one after the other. overlap: share of the time of all copies in
    which both ways were under way. unlike: logits and tokens that differ from the reference runs'
    after going on.
    """

    nbytes: int = 0
    together: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    unlike: int = 0


def change_places(
    local: Local, watch: Watch, prompts: tuple[Prompt, Prompt], references: tuple[Trace, Trace],
    layer: int, repetitions: int,
) -> BothWays:  # fmt: skip
    """Evict one stopped session and restore another, at the same time and one after the other.

    The prompts are of one length. The first time of each is not counted: it warms up.
    """
    found = BothWays()
    with no_write_behind(local):
        away, here = (stop_at(local, prompt, layer, 1) for prompt in prompts)
        sessions = (away, here)
        evict(away)
        for number in range(2 * (repetitions + 1)):
            give_up_copies(local, here)
            with latency.copy_spans(local) as spans:
                if number % 2:
                    evict(here)
                    restore(away)
                else:
                    at_once(partial(evict, here), partial(restore, away))
                wait_until_settled(local)
            found.nbytes = _require_both(spans, local, here, away)
            if number % 2:
                found.apart.append(spans.rate_of_all())
            else:
                found.together.append(spans.rate_of_all())
                found.overlap.append(spans.overlap())
            away, here = here, away
        for session, reference in zip(sessions, references, strict=True):
            found.unlike += rest_unlike(watch, session, reference, 1)
            session.terminate()
    for values in (found.together, found.apart, found.overlap):
        del values[0]
    return found


def _require_both(spans: latency.Spans, local: Local, gone: Session, come: Session) -> int:
    """Bytes that moved; raises unless they were those of both sessions, each one way."""
    went, came = (spans.nbytes(way) for way in ("device-host", "host-device"))
    infos = gone.refresh(), come.refresh()
    wanted = tuple(info.kv_bytes for info in infos)
    if (went, came) != wanted:
        raise RuntimeError(f"{went:,} and {came:,} bytes were copied, the sessions have {wanted}")
    assert infos[0].device_pages == 0 and infos[1].device_pages == infos[1].num_pages, infos
    return went + came


def at_once(*works: Callable[[], Any]) -> None:
    """Begin each on a thread of its own at the same time; returns when all are done."""
    together = threading.Barrier(len(works))

    def go(work: Callable[[], Any]) -> None:
        together.wait(60.0)
        work()

    with ThreadPoolExecutor(len(works)) as threads:
        for done in [threads.submit(go, work) for work in works]:
            done.result()


def plain_duplex(
    device: str, nbytes: int, repetitions: int, memory: torch.Tensor | None = None
) -> list[float]:
    """GB/s of both of two copies of `nbytes`, one each way at the same time, host memory pinned.

    On a GPU they run on two streams; on a CPU two threads copy within its memory. memory: of the
    host, twice as large at least; without it, memory of its own.
    """
    cuda = device.startswith("cuda")
    both = latency.host_memory(device, 2 * nbytes) if memory is None else memory[: 2 * nbytes]
    pairs = []
    for goes_down, host in zip((True, False), both.split(nbytes), strict=True):
        there = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        pairs.append((host, there) if goes_down else (there, host))
    once = _on_streams if cuda else _on_threads
    rates = [2 * nbytes / once(pairs) / 1e9 for _ in range(repetitions + 1)]
    return rates[1:]


_Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def _on_streams(pairs: _Pairs) -> float:
    """Seconds from the first begin to the last end of copies on a stream each."""
    reference = torch.cuda.Event(enable_timing=True)
    reference.record()
    spans = []
    for target, source in pairs:
        stream = torch.cuda.Stream()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream.wait_event(reference)  # nothing given before runs beside them
        with torch.cuda.stream(stream):
            begin.record(stream)
            target.copy_(source, non_blocking=True)
            end.record(stream)
        spans.append((begin, end))
    for _, end in spans:
        end.synchronize()
    first = min(reference.elapsed_time(begin) for begin, _ in spans)
    last = max(reference.elapsed_time(end) for _, end in spans)
    return float(last - first) / 1e3


def _on_threads(pairs: _Pairs) -> float:
    """Seconds of copies within the memory of a CPU, on a thread each."""
    spans: list[tuple[float, float]] = []

    def work(target: torch.Tensor, source: torch.Tensor) -> None:
        began = time.perf_counter()
        target.copy_(source)
        spans.append((began, time.perf_counter()))

    at_once(*(partial(work, target, source) for target, source in pairs))
    return max(end for _, end in spans) - min(begin for begin, _ in spans)
