"""Times resumptions: by the caller's clock, by the kernel's, and copies by the device's own events.

The caller's time is that of a client's call in this process: messages, gateway, state, engine and
events, without a socket. Every timed call waits until the device has done the work. Of repeated
calls the first is watched by hooks on the layers and not timed, the others are timed without hooks;
the logits of all are compared.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from djinn_nb import Session
from kernel_server.protocol import messages as m
from kernel_server.protocol.location import layers_executed
from kernel_server.state.events import Requested, StretchDone
from notebooks.harness.exactness import Prompt, Trace, Watch, different, layer_calls
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import Local
from notebooks.harness.pressure import evict, restore
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

    @property
    def work_ms(self) -> list[float]:
        """To the stop and on from it, together."""
        return [a + b for a, b in zip(self.before_ms, self.client_ms, strict=True)]

    @property
    def times(self) -> tuple[list[float], ...]:
        return self.client_ms, self.server_ms, self.before_ms


@dataclass(slots=True)
class Turns:
    """Ways through a forward, taken by turns. The entries of one repetition are neighbours in time,
    in one order and then in the reverse of it: what a machine that becomes slower does to one way
    it does to the other.

    whole_ms: without a stop. at_once_ms: to a stop and on from it, without waiting in between until
    the device has done its part. rerun_ms: from token 0 to the logits of the first decode.
    by_hand_ms: of a manual offload. device, host: resumed from a stop, by where the pages lay.
    unlike: logits of whole and manual forwards, and of those gone on at once, that differ from the
    reference run's.
    """

    whole_ms: list[float] = field(default_factory=list)
    at_once_ms: list[float] = field(default_factory=list)
    rerun_ms: list[float] = field(default_factory=list)
    by_hand_ms: list[float] = field(default_factory=list)
    device: Resumption = field(default_factory=Resumption)
    host: Resumption = field(default_factory=Resumption)
    unlike: int = 0


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each repetition, ours by theirs: two things measured one after the other."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


@dataclass(frozen=True, slots=True)
class Offload:
    """Where a manual offload keeps bytes: a piece of the host's memory (pinned on a GPU) and one as
    long on the device. Made once, since pinning takes a second for each GiB."""

    away: Tensor
    here: Tensor

    @classmethod
    def of(cls, local: Local, tokens: int) -> Offload:
        """Room for the pages of a session of so many tokens."""
        shape, device = local.cache.shape, local.cache.device
        nbytes = shape.num_groups * shape.pages_for(tokens) * shape.page_bytes
        return cls(
            torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda"),
            torch.empty(nbytes, dtype=torch.uint8, device=device),
        )

    def bring(self, nbytes: int) -> None:
        """Begin one copy to the device."""
        on_gpu = self.here.device.type == "cuda"
        self.here[:nbytes].copy_(self.away[:nbytes], non_blocking=on_gpu)


@dataclass(frozen=True, slots=True)
class Bench:
    """A kernel, its watch, a prompt of a given length, its reference run, and room for an offload
    by hand, which `in_decode` needs."""

    local: Local
    watch: Watch
    prompt: Prompt
    reference: Trace
    offload: Offload | None = None

    #: forwards of a reference run that `in_decode` needs for each repetition
    FORWARDS: ClassVar[int] = 5

    def in_decode(self, layer: int, repetitions: int) -> Turns:
        """One session, decode by decode: without a stop; stopped after `layer` and gone on at once;
        stopped and resumed, from the device and from the host; and with its pages brought by
        hand."""
        local, found = self.local, Turns()
        session = self.prompt.launch(local)
        session.run_to("logits")

        def whole(forward: int) -> None:
            found.whole_ms.append(self._timed(session.run_to, "logits"))
            found.unlike += self._unlike(session, forward)

        def at_once(forward: int) -> None:
            found.at_once_ms.append(self._timed(_through, session, layer))
            found.unlike += self._unlike(session, forward)

        def stopped(forward: int, place: str, of: Resumption) -> None:
            of.before_ms.append(self._timed(session.run_to, f"layers.{layer}.output"))
            self._resume(session, forward, layer, place, of, moves)
            if place != "device":  # the layers before the stop were left where they were
                restore(session)

        def by_hand(forward: int) -> None:
            session.run_to(f"layers.{layer}.output")
            found.by_hand_ms.append(self._timed(self._by_hand, session, layer))
            found.unlike += self._unlike(session, forward)

        ways: list[Callable[[int], None]] = [
            whole,
            at_once,
            lambda forward: stopped(forward, "device", found.device),
            lambda forward: stopped(forward, "host", found.host),
            by_hand,
        ]
        with watching_moves(local) as moves:
            forwards = itertools.count(1)
            for number in range(repetitions + 1):
                with self._watched(number == 0):
                    for way in _in_turn(ways, layer + number):
                        way(next(forwards))
        session.terminate()
        _without_first(
            found.whole_ms, found.at_once_ms, found.by_hand_ms, *found.device.times,
            *found.host.times,
        )  # fmt: skip
        return found

    def in_prefill(self, layer: int, repetitions: int) -> Turns:
        """A session each: its prefill without a stop, and on to the logits of a decode; stopped
        after `layer` of the prefill and gone on at once; stopped and resumed, from the device and
        from the host."""
        local, found = self.local, Turns()

        def whole() -> None:
            made: list[Session] = []
            found.whole_ms.append(self._timed(self._launch, "logits", made))
            found.unlike += self._unlike(made[0], 0)
            found.rerun_ms.append(found.whole_ms[-1] + timed_ms(local, made[0].run_to, "logits"))
            found.unlike += self._unlike(made[0], 1)
            made[0].terminate()

        def at_once() -> None:
            made: list[Session] = []

            def launched() -> None:
                made.append(self.prompt.launch(local))
                _through(made[0], layer)

            found.at_once_ms.append(self._timed(launched))
            found.unlike += self._unlike(made[0], 0)
            made[0].terminate()

        def stopped(place: str, of: Resumption) -> None:
            made: list[Session] = []
            of.before_ms.append(self._timed(self._launch, f"layers.{layer}.output", made))
            self._resume(made[0], 0, layer, place, of, moves)
            made[0].terminate()

        ways: list[Callable[[], None]] = [
            whole,
            at_once,
            lambda: stopped("device", found.device),
            lambda: stopped("host", found.host),
        ]
        with watching_moves(local) as moves:
            for way in ways[2:]:  # watched and not timed
                way()
            with self.watch.away():
                for number in range(repetitions):
                    for way in _in_turn(ways, layer + number):
                        way()
        _without_first(*found.device.times, *found.host.times)
        return found

    def prefills(self, repetitions: int) -> list[float]:
        """Milliseconds of whole prefills, from launch to logits; the first warms up."""
        times = []
        with self.watch.away():
            for _ in range(repetitions + 1):
                made: list[Session] = []
                times.append(self._timed(self._launch, "logits", made))
                made[0].terminate()
        return times[1:]

    def rerun_calls(self) -> int:
        """Layer calls from token 0 to the logits of the first decode."""
        made: list[Session] = []
        self.watch.layers.clear()
        self._launch("logits", made)
        made[0].run_to("logits")
        made[0].terminate()
        return len(self.watch.layers)

    def _launch(self, location: str, made: list[Session]) -> None:
        made.append(self.prompt.launch(self.local))
        made[0].run_to(location)

    def _timed(self, work: Callable[..., Any], *given: Any) -> float:
        """Milliseconds of this, begun when nothing moves between the tiers any more."""
        wait_until_settled(self.local)
        return timed_ms(self.local, work, *given)

    def _watched(self, yes: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if yes else self.watch.away()

    def _unlike(self, session: Session, forward: int) -> int:
        stop = session.stop
        assert stop is not None and stop.location == "logits", stop
        return different(stop.value.numpy(), self.reference.logits[forward : forward + 1])

    def _by_hand(self, session: Session, layer: int) -> None:
        """Bring the bytes that the layers after the stop read in one copy, wait, and run them."""
        shape = self.local.cache.shape
        tables = self.local.kernel.state.sessions[session.id].tables
        pages = sum(len(table) for table in tables[(layer + 1) // shape.group_layers :])
        assert self.offload is not None, "no room for an offload by hand"
        self.offload.bring(pages * shape.page_bytes)
        synchronize(self.local)
        session.step_out()

    def _resume(
        self, session: Session, forward: int, layer: int, place: str, found: Resumption,
        moves: Moves,
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
        watched = not found.client_ms
        wanted = self.reference.logits[forward : forward + 1]
        # only here: it waits for the device where the engine does not
        with timing(local) as clock:
            found.client_ms.append(timed_ms(local, session.step_out))
        found.server_ms.append(clock.server_ms)
        found.unlike += self._unlike(session, forward)
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


def _through(session: Session, layer: int) -> None:
    """To a stop after `layer`, and on to the logits."""
    session.run_to(f"layers.{layer}.output")
    session.run_to("logits")


def _in_turn(ways: list[Any], number: int) -> list[Any]:
    return ways if number % 2 == 0 else ways[::-1]


def _without_first(*lists: list[float]) -> None:
    """Take away what was watched."""
    for times in lists:
        del times[0]


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
    host = host_memory(device, nbytes) if memory is None else memory[:nbytes]
    there = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    return copies_between(host, there, repetitions)


def copies_between(host: Tensor, there: Tensor, repetitions: int) -> dict[str, list[float]]:
    """GB/s of one copy each way between bytes of the host and as many on the device."""
    cuda, nbytes = there.device.type == "cuda", there.nbytes
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
