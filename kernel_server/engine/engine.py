"""Carries out instructions on one thread: runs stretches, and between two layers does errands.

Which session runs, how far and why it stops is decided in `state`; what a layer computes is decided
in `models`. This file holds each session's tensors: the forward it stands in, the value at its stop
before and after edits, what was captured on the way, and the last logits.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernel_server.engine import reads
from kernel_server.engine.checks import evaluate_checks
from kernel_server.engine.comparing import Stream
from kernel_server.engine.held import SessionTensors
from kernel_server.engine.kv_cache import KVCache
from kernel_server.engine.lens_values import Lens
from kernel_server.engine.logs import StretchLogs
from kernel_server.engine.sampler import sample
from kernel_server.engine.segments import ForwardState, Segments
from kernel_server.engine.tensor_edits import apply_edits
from kernel_server.engine.tiers import Copier, Copy
from kernel_server.engine.variables import summarize
from kernel_server.models.recording import storages
from kernel_server.protocol.errors import (
    DjinnError,
    OutOfDeviceMemory,
    SessionFailed,
)
from kernel_server.protocol.location import (
    EMBEDDING,
    NOT_STARTED,
    Point,
    is_inner,
    layer_of,
    location_at,
    logits_point,
    sampled_point,
)
from kernel_server.protocol.messages import ErrorInfo, ErrorReply, error_info
from kernel_server.state.events import (
    EditResult,
    EditsApplied,
    EditsFailed,
    LogResult,
    StateEvent,
    StretchAdvanced,
    StretchDone,
    StretchFailed,
)
from kernel_server.state.instructions import (
    ApplyEdits,
    Captures,
    Check,
    CopyPages,
    DropLog,
    DropNodes,
    DropTensors,
    EditPlan,
    ForkTensors,
    Instruction,
    KeepTensors,
    PoisonPages,
    ReadTensors,
    RestoreTensors,
    RunStretch,
)

log = logging.getLogger(__name__)

#: A forward that takes longer than this tells how far it is, seconds.
PROGRESS_S = 0.5


class Engine:
    """Owns the tensors of all sessions; everything but `submit`, `interrupt` and `close` happens
    on the thread that calls `run`."""

    def __init__(
        self,
        segments: Segments,
        cache: KVCache,
        *,
        post: Callable[[StateEvent], None],
        reply: Callable[[int, Any], None],
        offer: reads.Offer,
        texts: Callable[[int], str] | None = None,
        copier: Copier | None = None,
        debug: bool = False,
        errand_done: Callable[[Instruction, float], None] | None = None,
    ) -> None:
        self.segments = segments
        self.cache = cache
        self.num_layers = segments.num_layers
        self._post = post
        self._reply = reply
        self._texts = texts or (lambda token_id: "")
        self._reader = reads.Reader(segments, offer, texts)
        self._copier = copier
        self._debug = debug
        self._errand_done = errand_done or (lambda errand, seconds: None)
        self._sessions: dict[str, SessionTensors] = {}
        self._wake = threading.Condition()
        self._errands: deque[Instruction] = deque()
        self._work: deque[RunStretch] = deque()
        self._interrupted: str | None = None
        self._closing = False

    # -- called from other threads ----------------------------------------------------------

    def submit(self, instruction: Instruction) -> None:
        """Queue an instruction; errands overtake stretches."""
        with self._wake:
            if isinstance(instruction, RunStretch):
                self._interrupted = None
                self._work.append(instruction)
            else:
                self._errands.append(instruction)
            self._wake.notify()

    def interrupt(self, session_id: str) -> None:
        """Let the running stretch of this session stop at its next layer boundary."""
        self._interrupted = session_id

    def close(self) -> None:
        """Let `run` return; a running stretch is left at its next boundary."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the tensors that sessions stand or run with, and of those that are kept besides
        of stops they have left; what several share counts once."""
        sessions = list(self._sessions.values())
        stops = {id(stop): stop for held in sessions for stop in list(held.stops.values())}
        # a recorded call may hand a layer one of the model's own tensors
        weights = self.segments.model.weights
        found = storages(itertools.chain(*(held.tensors() for held in sessions)), weights)
        there = itertools.chain(*(held.tensors() for held in stops.values()))
        kept = storages(there, {*weights, *found})
        return sum(found.values()), sum(kept.values())

    # -- the engine thread --------------------------------------------------------------------

    def run(self) -> None:
        """Carry out instructions until closed."""
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._errands or self._work or self._closing):
                        self._wake.wait()
                    if self._closing:
                        return
                self._do_errands()
                if self._work:
                    stretch = self._work.popleft()
                    # those given before this stretch may have come since: a fork, say, of which
                    # the stretch is the child's
                    self._do_errands()
                    self._run_stretch(stretch)

    def _do_errands(self) -> None:
        while self._errands:
            errand = self._errands.popleft()
            # by the clock: whoever runs waits as long, whether this thread computes or the device
            began = time.perf_counter()
            try:
                self._do_errand(errand)
            except Exception:
                log.exception("errand %s failed", type(errand).__name__)
            self._errand_done(errand, time.perf_counter() - began)

    def _do_errand(self, errand: Instruction) -> None:
        match errand:
            case ReadTensors():
                self._read(errand)
            case ApplyEdits():
                self._apply_edits(errand)
            case ForkTensors():
                self._fork(errand)
            case KeepTensors():
                held = self._sessions.setdefault(errand.session_id, SessionTensors())
                held.keep(errand.node)
            case RestoreTensors():
                self._restore(errand)
            case DropNodes():
                if errand.session_id in self._sessions:
                    for node in errand.nodes:
                        self._sessions[errand.session_id].stops.pop(node, None)
            case DropTensors():
                gone = self._sessions.pop(errand.session_id, None)
                if errand.but_logs and gone is not None and gone.logs:
                    self._sessions[errand.session_id] = SessionTensors(logs=gone.logs)
            case DropLog():
                if errand.session_id in self._sessions:
                    self._sessions[errand.session_id].logs.pop(errand.breakpoint_id, None)
            case PoisonPages():
                self.cache.poison(errand.pages)
            case CopyPages():
                assert self._copier is not None, "a copy between tiers, and there is one only"
                self._copier.begin(Copy(errand.ticket, errand.way, errand.sources, errand.targets))
            case _:
                raise TypeError(f"{type(errand).__name__} is not an errand")

    def _fork(self, errand: ForkTensors) -> None:
        parent = self._sessions.get(errand.parent_id)
        if parent is None:
            return
        if errand.history_only:
            child = SessionTensors(history=parent.history)
        else:
            child = parent.fork()
            child.stops = {node: parent.stops[node] for node in errand.nodes}
        before = self._sessions.get(errand.child_id)
        if before is not None:
            child.logs = before.logs  # all that was left of it while it was dormant
        self._sessions[errand.child_id] = child

    def _restore(self, errand: RestoreTensors) -> None:
        held = self._sessions.setdefault(errand.session_id, SessionTensors())
        source = self._sessions.get(errand.source_id, held)
        if errand.node is not None:
            found = held.at_stop(errand.node, source)
        else:
            found = held.at_start(errand.forward, source)
        self._sessions[errand.session_id] = found

    def await_copy(self, ticket: int) -> bool:
        """Order what is computed next after a copy to the device; False if it was not made."""
        assert self._copier is not None
        return self._copier.wait(ticket)

    # -- stretches ----------------------------------------------------------------------------

    def _run_stretch(self, stretch: RunStretch) -> None:
        held = self._sessions.setdefault(stretch.session_id, SessionTensors())
        run = _Stretch(self, stretch, held)
        try:
            done = run.go()
        except Exception as error:
            self._post(self._failure(stretch, held, error, run.logs.finish()))
            return
        self._post(done)

    def _failure(
        self,
        stretch: RunStretch,
        held: SessionTensors,
        error: Exception,
        logs: tuple[LogResult, ...],
    ) -> StretchFailed:
        point = held.forward.point if held.forward is not None else NOT_STARTED
        fatal = False
        if isinstance(error, torch.OutOfMemoryError):
            error = OutOfDeviceMemory(
                f"the device ran out of memory after point {point} of forward {stretch.forward}:"
                " terminate a session, or start the server with less --kv-memory"
            )
        elif not isinstance(error, DjinnError):
            log.exception("session %s failed", stretch.session_id)
            lines = str(error).splitlines()
            error = SessionFailed(
                f"the model raised {type(error).__name__} in forward {stretch.forward} after"
                f" point {point}: {lines[0] if lines else 'no message'}"
            )
            fatal = True
        trace = traceback.format_exc() if self._debug else None
        return StretchFailed(
            session_id=stretch.session_id,
            point=point,
            error=error_info(error, trace),
            fatal=fatal,
            logs=logs,
        )

    # -- errands --------------------------------------------------------------------------------

    def _read(self, errand: ReadTensors) -> None:
        try:
            held = self._sessions.get(errand.session_id, SessionTensors())
            beside = [self._sessions[session_id] for session_id in errand.beside]
            answer = self._reader.read(errand, held, beside)
        except Exception as error:
            answer = ErrorReply(error=self._told(error, "a read"))
        self._reply(errand.request_id, answer)

    def _apply_edits(self, errand: ApplyEdits) -> None:
        """Compute the stop's value from its unedited tensor; on failure nothing has changed."""
        try:
            held = self._sessions[errand.session_id]
            forward = held.standing()
            unedited = held.unedited(self.segments.value(forward))
            value, results = edited(forward, unedited, errand.edits)
            self.segments.set_value(forward, value)
            held.edited(forward.point, value)
            held.note_value(forward, self.num_layers)
        except Exception as error:
            self._post(
                EditsFailed(
                    request_id=errand.request_id,
                    session_id=errand.session_id,
                    error=self._told(error, "an edit"),
                )
            )
            return
        self._post(
            EditsApplied(
                request_id=errand.request_id,
                session_id=errand.session_id,
                results=tuple(results),
            )
        )

    def _told(self, error: Exception, doing: str) -> ErrorInfo:
        """What a client is told of an errand that failed."""
        trace = traceback.format_exc() if self._debug else None
        if isinstance(error, torch.OutOfMemoryError):
            error = OutOfDeviceMemory(
                f"the device has no room for {doing} of this size: choose fewer tokens, terminate a"
                " session, or start the server with less --kv-memory"
            )
        elif not isinstance(error, DjinnError):
            log.exception("%s failed", doing)
        return error_info(error, trace)


class _Stretch:
    """One stretch while it runs: what to do at each point, and what came of it."""

    def __init__(self, engine: Engine, stretch: RunStretch, held: SessionTensors) -> None:
        self.engine = engine
        self.stretch = stretch
        self.held = held
        # a logpoint's condition is judged with the others there
        conditions = [plan.check for plan in stretch.logs if plan.check is not None]
        self.checks = _by_point([*stretch.checks, *conditions])
        self.lens = Lens(engine.segments, held.lens_before)
        self.logs = StretchLogs(
            held.logs,
            stretch.logs,
            stretch.log_room_bytes,
            forward=stretch.forward,
            num_layers=engine.num_layers,
        )
        self.edits = _by_point(stretch.edits)
        size = engine.cache.shape.group_layers
        #: copies to wait for, by the first layer that needs them
        self.arrivals = sorted((group * size, ticket) for group, ticket in stretch.arrivals)
        self.captures = stretch.captures
        caught = stretch.captures.points if stretch.captures is not None else ()
        #: breakpoints that keep what the lens reads, by point
        self.reads: dict[Point, list[int]] = {}
        for breakpoint_id, point in stretch.reads:
            self.reads.setdefault(point, []).append(breakpoint_id)
        #: the points inside layers that have to be shown on the way
        shown = (*self.checks, *self.logs.points, *self.edits, *caught, *self.reads)
        self.visits = sorted({point for point in shown if is_inner(point)})
        #: the points at which there is anything to do
        self.marked = frozenset(shown)
        self.results: list[EditResult] = []
        self.told_at = time.monotonic()
        self.hits: dict[int, tuple[int, ...]] = {}
        self.halted = False

    def go(self) -> StretchDone:
        stretch, held, engine = self.stretch, self.held, self.engine
        if not self.await_pages(layer_of(max(stretch.point, EMBEDDING))):
            return self.done(stretch.point, layers_run=0)
        for source, target in stretch.copies:
            engine.cache.copy_page(source, target)
        if stretch.point == NOT_STARTED:
            held.begin(engine.segments.begin(stretch.token_ids, stretch.first_token))
            self.lens = Lens(engine.segments, held.lens_before)
        forward = held.standing()
        if forward.point != stretch.point:
            raise RuntimeError(
                f"the state places session {stretch.session_id} at point {stretch.point},"
                f" the engine at {forward.point}"
            )
        runs = forward.layer_runs
        if forward.point < min(stretch.until, logits_point(engine.num_layers)):
            until = min(stretch.until, logits_point(engine.num_layers))
            if self.captures is not None and self.captures.what == "router":
                self._catch_router(forward, self.captures)
            if not self.halted:
                engine.segments.advance(forward, until, stretch.tables, self.on_point, self.visits)
        point, token = forward.point, None
        if stretch.until == sampled_point(engine.num_layers) and not self.halted:
            logits = engine.segments.logits(forward)
            token = sample(logits, stretch.sampling)
            held.finish(logits)
            point = stretch.until
        return self.done(point, token=token, layers_run=forward.layer_runs - runs)

    def done(self, point: Point, *, layers_run: int, token: int | None = None) -> StretchDone:
        """What is answered where the stretch ends, at its end or before it."""
        return StretchDone(
            session_id=self.stretch.session_id,
            point=point,
            held=self.hits,
            edits=tuple(self.results),
            logs=self.logs.finish(),
            token=token,
            layers_run=layers_run,
        )

    def await_pages(self, layer: int) -> bool:
        """Let the layers up to this one find their pages, which may still be under way; False if
        some do not come: then the stretch ends here, as if it had been interrupted."""
        while self.arrivals and self.arrivals[0][0] <= layer:
            if not self.engine.await_copy(self.arrivals.pop(0)[1]):
                return False
        return True

    def on_point(self, point: Point, forward: ForwardState) -> bool:
        """Called at each point reached; True stops there."""
        engine, held = self.engine, self.held
        if engine._errands:
            engine._do_errands()
        if time.monotonic() - self.told_at > PROGRESS_S:
            self._tell(point)
        held.arrive()
        marked, full = point in self.marked, False
        if marked and (edits := self.edits.get(point)):
            self._edit(forward, edits)
        held.note_value(forward, engine.num_layers)
        if marked:
            full = self._look(point, forward)
        # an interrupt sent for an earlier stretch of this session was cleared when this one came
        interrupted = engine._interrupted == self.stretch.session_id or engine._closing
        self.halted = full or interrupted or bool(self.hits)
        if self.arrivals and not self.halted:
            self.halted = not self.await_pages(layer_of(point))
        return self.halted

    def _look(self, point: Point, forward: ForwardState) -> bool:
        """Catch, judge and note what is asked for here; True when a log has no room."""
        engine = self.engine
        captures = self.captures
        if captures is not None and captures.what != "router" and point in captures.points:
            self._catch(point, forward, captures)
        found: dict[int, tuple[int, ...]] = {}
        if checks := self.checks.get(point):
            found = self._judge(forward, checks)
        for breakpoint_id in self.reads.get(point, ()):
            self.lens.stand(forward)
            self.lens.remember(breakpoint_id)
        full = False
        if plans := self.logs.plans(point):
            full = self.logs.note(forward, engine.segments.value(forward), found)
            for plan in plans:
                found.pop(plan.breakpoint_id, None)
        self.hits = found
        return full

    def _tell(self, point: Point) -> None:
        self.told_at = time.monotonic()
        self.engine._post(StretchAdvanced(session_id=self.stretch.session_id, point=point))

    def _edit(self, forward: ForwardState, plans: Sequence[EditPlan]) -> None:
        segments = self.engine.segments
        before = segments.value(forward)
        after, results = edited(forward, before, plans)
        self.held.unedited(before)
        segments.set_value(forward, after)
        self.results += results

    def _catch(self, point: Point, forward: ForwardState, captures: Captures) -> None:
        """Keep the value here for the question that this scratch fork is run for."""
        rows = [chunk[0] for chunk in self.engine.segments.value(forward)]
        if captures.what == "stream":
            caught = Stream.catch(rows, forward.start, captures.rows)
            self.held.streams[self.stretch.forward, point] = caught
            return
        if point != logits_point(self.engine.num_layers):
            rows = reads.select(rows, captures.rows, captures.elements)
        if captures.what == "summary":
            name = str(location_at(point, self.engine.num_layers))
            self.held.caught[point] = summarize(rows, name)
        else:
            # copies: a view would keep the whole tensor of every location alive
            self.held.caught[point] = [row.clone() for row in rows]

    def _catch_router(self, forward: ForwardState, captures: Captures) -> None:
        """Run to the layer, and into it as far as its last edit; keep what its router chooses.

        Between two stretches of the forward, since a layer cannot be visited while it runs.
        """
        (point,) = captures.points
        layer, held = int(point), self.held
        if point in held.caught:
            return  # by the stretch before, which was interrupted behind it
        last = max([point, *(at for at in self.edits if point < at < point + 1)])
        if forward.point < last:
            advance = self.engine.segments.advance
            advance(forward, last, self.stretch.tables, self.on_point, self.visits)
        if not self.halted:
            reading = self.engine.segments.router(forward, layer, self.stretch.tables)
            held.caught[point] = reading

    def _judge(self, forward: ForwardState, checks: Sequence[Check]) -> dict[int, tuple[int, ...]]:
        self.lens.stand(forward)
        held = evaluate_checks(
            checks,
            self.engine.segments.value(forward),
            self.stretch.token_ids,
            self.engine._texts,
            forward.start,
            self.stretch.forward,
            self.lens,
        )
        for check in checks:
            if "top_token_changed" in check.names:
                self.lens.remember(check.breakpoint_id)
        return held


def edited(
    forward: ForwardState, value: list[Tensor], plans: Sequence[EditPlan]
) -> tuple[list[Tensor], list[EditResult]]:
    """The value at the forward's point with edits applied; logits hold the last row only."""
    missing = len(forward.token_ids) - sum(chunk.shape[1] for chunk in value)
    return apply_edits(value, plans, forward.start, first_row=missing)


def _by_point(items: Sequence[Any]) -> dict[Point, list[Any]]:
    found: dict[Point, list[Any]] = {}
    for item in items:
        found.setdefault(item.point, []).append(item)
    return found
