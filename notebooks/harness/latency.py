"""Times resumptions: by the caller's clock, by the kernel's, and copies by the device's own events.

The caller's time is that of a client's call in this process: messages, gateway, state, engine and
events, without a socket. Every timed call waits until the device has done the work. Of repeated
calls the first is watched by hooks on the layers and not timed, the others are timed without hooks;
the logits of all are compared.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from djinn_nb import Session
from kernel_server.protocol import messages as m
from kernel_server.protocol.location import layers_executed
from kernel_server.state.events import Requested, StretchDone
from notebooks.harness.exactness import Prompt, Trace, Watch, different, layer_calls
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import Local
from notebooks.harness.pressure import evict
from notebooks.harness.tier_watch import Moves, wait_until_settled, watching_moves


@dataclass(slots=True)
class Clock:
    """When the kernel was last asked to run and last had run, and how long it took to decide."""

    asked_s: float = 0.0
    done_s: float = 0.0
    handled_s: float = 0.0

    @property
    def server_ms(self) -> float:
        """From the request's arrival to the end of the work, milliseconds."""
        return (self.done_s - self.asked_s) * 1e3


@contextlib.contextmanager
def timing(local: Local) -> Iterator[Clock]:
    """Note the time of requests and of finished stretches, once the device has done them."""
    clock, state = Clock(), local.kernel.state
    handle = state.handle

    def note(event: Any) -> Any:
        if isinstance(event, StretchDone):
            synchronize(local)
            clock.done_s = time.perf_counter()
        began = time.perf_counter()
        instructions = handle(event)
        # a client that has had no news for long asks how its session is
        if isinstance(event, Requested) and not isinstance(event.message, m.Describe):
            clock.asked_s, clock.handled_s = began, time.perf_counter() - began
        return instructions

    with instead(state, "handle", note):
        yield clock


def synchronize(local: Local) -> None:
    """Wait until the device has done what it was given."""
    if local.cache.device.type == "cuda":
        torch.cuda.synchronize()


def timed_ms(local: Local, work: Callable[..., Any], *given: Any) -> float:
    """Milliseconds of the wall clock until the device has done it."""
    synchronize(local)
    began = time.perf_counter()
    work(*given)
    synchronize(local)
    return (time.perf_counter() - began) * 1e3


@dataclass(slots=True)
class Resumption:
    """One way to resume, repeated. Lists have an entry per repetition.

    before_ms: of the way to the stop. unlike: logits that differ from the reference run's.
    misplaced: layer calls missing or too many. surplus_pages: brought beyond those needed.
    """

    client_ms: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)
    before_ms: list[float] = field(default_factory=list)
    unlike: int = 0
    misplaced: int = 0
    surplus_pages: int = 0


@dataclass(frozen=True, slots=True)
class Bench:
    """A kernel, its watch, a prompt of a given length and its reference run."""

    local: Local
    watch: Watch
    prompt: Prompt
    reference: Trace

    def in_decode(self, layer: int, place: str, repetitions: int) -> Resumption:
        """Stop after `layer` of one decode after the other and resume to the logits.

        place: where the pages lie meanwhile, `device`, `host` or `disk`.
        """
        found = Resumption()
        session = self.prompt.launch(self.local)
        session.run_to("logits")
        with watching_moves(self.local) as moves, timing(self.local) as clock:
            for forward in range(1, repetitions + 2):
                with self._watched(forward == 1):
                    before = timed_ms(self.local, session.run_to, f"layers.{layer}.output")
                    self._resume(session, forward, layer, place, found, moves, clock)
                found.before_ms.append(before)
        session.terminate()
        return _warm(found)

    def in_prefill(self, layer: int, place: str, repetitions: int) -> Resumption:
        """Stop after `layer` of the prefill and resume to its logits; a session each."""
        found = Resumption()
        with watching_moves(self.local) as moves, timing(self.local) as clock:
            for number in range(repetitions + 1):
                made: list[Session] = []

                def begin(made: list[Session] = made) -> None:
                    made.append(self.prompt.launch(self.local))
                    made[0].run_to(f"layers.{layer}.output")

                with self._watched(number == 0):
                    before = timed_ms(self.local, begin)
                    self._resume(made[0], 0, layer, place, found, moves, clock)
                found.before_ms.append(before)
                made[0].terminate()
        return _warm(found)

    def _watched(self, yes: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if yes else self.watch.away()

    def _resume(
        self, session: Session, forward: int, layer: int, place: str, found: Resumption,
        moves: Moves, clock: Clock,
    ) -> None:  # fmt: skip
        local, watch = self.local, self.watch
        if place == "device":
            wait_until_settled(local)
        else:
            evict(session, place)
        needed = self.pages_needed(session)
        moves.copies.clear()
        watch.layers.clear()
        watch.logits.clear()
        watched, ends = not found.client_ms, list[Any]()
        found.client_ms.append(timed_ms(local, lambda: ends.append(session.step_out())))
        found.server_ms.append(clock.server_ms)
        wanted = self.reference.logits[forward : forward + 1]
        found.unlike += different(ends[0].value.numpy(), wanted)
        if watched:
            found.unlike += different(watch.logits[-1], wanted)
            found.misplaced += abs(len(watch.layers) - self.calls_left(layer, forward))
        wait_until_settled(local)  # a copy is told of after its pages may be used
        brought = sum(one.pages for one in moves.copies if one.way == "host-device")
        found.surplus_pages += abs(brought - needed)

    def calls_left(self, layer: int, forward: int) -> int:
        """Layer calls from a stop after `layer` to the end of the forward."""
        calls = layer_calls(self.local, len(self.prompt.ids))(forward)
        return sum(index > layer for index in calls)

    def pages_needed(self, session: Session) -> int:
        """Pages off the device that the layers after the stop read."""
        state = self.local.kernel.state
        inside = state.sessions[session.id]
        done = layers_executed(inside.point, self.local.num_layers)
        if done == self.local.num_layers:
            return 0
        groups = inside.tables[done // self.local.cache.shape.group_layers :]
        return sum(not state.residency.is_resident(p) for table in groups for p in table)

    def uninterrupted_decode(self, repetitions: int) -> list[float]:
        """Milliseconds of whole decodes, from logits to logits."""
        session = self.prompt.launch(self.local)
        session.run_to("logits")
        with self.watch.away():
            times = [timed_ms(self.local, session.run_to, "logits") for _ in range(repetitions + 1)]
        session.terminate()
        return times[1:]

    def uninterrupted_prefill(self, repetitions: int) -> list[float]:
        """Milliseconds of whole prefills, from launch to logits."""
        with self.watch.away():
            return [self._from_token_0(0)[0] for _ in range(repetitions + 1)][1:]

    def rerun(self, repetitions: int) -> tuple[list[float], int]:
        """Milliseconds from token 0 to the logits of the first decode, and its layer calls."""
        calls = self._from_token_0(1)[1]
        with self.watch.away():
            return [self._from_token_0(1)[0] for _ in range(repetitions)], calls

    def _from_token_0(self, forward: int) -> tuple[float, int]:
        made: list[Session] = []

        def work() -> None:
            made.append(self.prompt.launch(self.local))
            for _ in range(forward + 1):
                made[0].run_to("logits")

        self.watch.layers.clear()
        took = timed_ms(self.local, work)
        made[0].terminate()
        return took, len(self.watch.layers)

    def by_hand(self, layer: int, repetitions: int) -> list[float]:
        """Milliseconds of a manual offload that does the same work: one copy back, then the rest.

        The bytes that the layers after the stop read lie in one piece of host memory (pinned on a
        GPU), are copied to the device in one go and waited for; then the session, which is there,
        runs on.
        """
        local = self.local
        shape, cuda = local.cache.shape, local.cache.device.type == "cuda"
        session = self.prompt.launch(local)
        session.run_to("logits")
        times: list[float] = []
        for _ in range(repetitions + 1):
            session.run_to(f"layers.{layer}.output")
            wait_until_settled(local)
            tables = local.kernel.state.sessions[session.id].tables
            pages = sum(len(t) for t in tables[(layer + 1) // shape.group_layers :])
            away = torch.zeros(pages * shape.page_bytes, dtype=torch.uint8, pin_memory=cuda)
            here = torch.empty(away.shape, dtype=torch.uint8, device=local.cache.device)

            def work(away: Any = away, here: Any = here) -> None:
                here.copy_(away, non_blocking=cuda)
                synchronize(local)
                session.step_out()

            with self.watch.away():
                times.append(timed_ms(local, work))
        session.terminate()
        return times[1:]


def _warm(found: Resumption) -> Resumption:
    for times in (found.client_ms, found.server_ms, found.before_ms):
        del times[0]
    return found


# -- copies ---------------------------------------------------------------------------------------


#: The ways of copies between device and host.
WAYS = ("device-host", "host-device")


@dataclass(slots=True)
class Spans:
    """Copies between tiers by the device's own events; by the wall clock on a CPU."""

    #: way, bytes, begin and end: CUDA events, or seconds
    copies: list[tuple[str, int, Any, Any]] = field(default_factory=list)
    #: a CUDA event before all of them: what is on two streams is put on one clock by it
    origin: Any = None

    def nbytes(self, way: str) -> int:
        """Bytes of all copies one way."""
        return sum(size for found, size, _, _ in self.copies if found == way)

    def milliseconds(self, way: str) -> float:
        """From the first copy's begin one way to the last one's end."""
        return self._seconds(way) * 1e3

    def _seconds(self, way: str) -> float:
        ours = [one for one in self.copies if one[0] == way]
        first, last = ours[0][2], ours[-1][3]
        if isinstance(first, torch.cuda.Event):
            return float(first.elapsed_time(last)) / 1e3
        return float(last - first)

    def rate(self, way: str) -> float:
        """Bytes of all copies one way ÷ the time from the first's begin to the last's end, GB/s."""
        return self.nbytes(way) / self._seconds(way) / 1e9

    def rate_of_all(self) -> float:
        """Bytes of all copies ÷ the time from the first's begin to the last's end, GB/s, whichever
        way they went."""
        first, last = self._span(*WAYS)
        return sum(self.nbytes(way) for way in WAYS) / (last - first) / 1e9

    def overlap(self) -> float:
        """Of the time of all copies, the share between the first's begin and the last's end of both
        ways at once; 0 when one way ended before the other began."""
        first, last = self._span(*WAYS)
        spans = [self._span(way) for way in WAYS]
        both = min(end for _, end in spans) - max(begin for begin, _ in spans)
        return max(0.0, both) / (last - first)

    def _span(self, *ways: str) -> tuple[float, float]:
        """Begin of the first and end of the last copy these ways, seconds of one clock."""
        ours = [one for one in self.copies if one[0] in ways]
        begins, ends = ([self._clock(one[i]) for one in ours] for i in (2, 3))
        return min(begins), max(ends)

    def _clock(self, moment: Any) -> float:
        if isinstance(moment, torch.cuda.Event):
            return float(self.origin.elapsed_time(moment)) / 1e3
        return float(moment)


@contextlib.contextmanager
def copy_spans(local: Local) -> Iterator[Spans]:
    """Note when copies between device and host begin and end."""
    copier = local.kernel.engine._copier
    assert copier is not None, "this kernel has one tier"
    begin, spans = copier._begin, Spans()
    page = local.cache.page_bytes
    if local.cache.device.type == "cuda":
        spans.origin = torch.cuda.Event(enable_timing=True)
        spans.origin.record()
        spans.origin.synchronize()

    def note(copy: Any, *given: Any) -> Any:
        made = begin(copy, *given)
        on_device = made.end is not None
        first, last = (made.begin, made.end) if on_device else (made.began, time.perf_counter())
        spans.copies.append((copy.way, len(copy.sources) * page, first, last))
        return made

    with instead(copier, "_begin", note):
        yield spans


def host_memory(device: str, nbytes: int, *, pinned: bool = True) -> torch.Tensor:
    """Memory of the machine, pinned where the device is a GPU, which takes a second for each GB."""
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.startswith("cuda") and pinned)


def plain_copies(
    device: str, nbytes: int, repetitions: int, *, memory: torch.Tensor | None = None
) -> dict[str, list[float]]:
    """GB/s of one copy of `nbytes` each way; on a CPU, within its memory.

    memory: of the host, as large at least; without it, pinned memory of its own.
    """
    cuda = device.startswith("cuda")
    host = host_memory(device, nbytes) if memory is None else memory[:nbytes]
    there = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    rates: dict[str, list[float]] = {}
    for way, source, target in (("device-host", there, host), ("host-device", host, there)):
        rates[way] = []
        for _ in range(repetitions + 1):
            if cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                target.copy_(source, non_blocking=True)
                end.record()
                end.synchronize()
                seconds = begin.elapsed_time(end) / 1e3
            else:
                began = time.perf_counter()
                target.copy_(source)
                seconds = time.perf_counter() - began
            rates[way].append(nbytes / seconds / 1e9)
        del rates[way][0]
    return rates
