"""A server without tensors: clients that ask, the state machine, and an engine that keeps count.

The engine does what the real one must do with numbers in place of keys and values: it remembers
what every page holds, by layer and position, and refuses what the real one could not carry out
(reading a page that holds something else, writing one that is shared, losing its place).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.codec import decode, encode, rebuild_error
from kernel_server.protocol.location import NOT_STARTED, Point, layers_begun, layers_executed
from kernel_server.state.breakpoints import Breakpoints
from kernel_server.state.edits import Edits
from kernel_server.state.events import (
    CopiesDone,
    EditResult,
    EditsApplied,
    EditsFailed,
    JournalRead,
    LogResult,
    Recorded,
    Requested,
    StretchDone,
    StretchFailed,
)
from kernel_server.state.instructions import (
    ApplyEdits,
    Check,
    CopyPages,
    DropNodes,
    DropTensors,
    EditPlan,
    ForkTensors,
    Interrupt,
    KeepTensors,
    PoisonPages,
    Publish,
    ReadTensors,
    Reply,
    RestoreTensors,
    RunStretch,
    WriteJournal,
)
from kernel_server.state.pages import PagePool
from kernel_server.state.residency import Residency
from kernel_server.state.scheduler import Scheduler
from kernel_server.state.selectors import TokenSelector
from kernel_server.state.server_state import Limits, ModelShape, ServerState
from kernel_server.state.slots import Slots

_LAYER = (
    m.SiteLayout(site="attention.q", heads=2, width=4),
    m.SiteLayout(site="attention.pattern", heads=2, width=0),
    m.SiteLayout(site="attention.heads", heads=2, width=4),
    m.SiteLayout(site="attention.output", heads=None, width=8),
    m.SiteLayout(site="middle", heads=None, width=8),
    m.SiteLayout(site="mlp.neurons", heads=None, width=16),
    m.SiteLayout(site="mlp.output", heads=None, width=8),
)
#: Small enough to think through: 3 groups (2, 2 and 1 layers), pages of 4 tokens.
SHAPE = ModelShape(
    num_layers=5,
    hidden_size=8,
    norm_size=8,
    vocab_size=50,
    layers_per_group=2,
    page_tokens=4,
    num_pages=60,
    page_bytes=1000,
    max_context=64,
    eos_token_ids=(49,),
    prefill_chunk=4,
    #: the last layer is a mixture of experts, which shows no neurons
    sites=(_LAYER,) * 4 + (tuple(s for s in _LAYER if s.site != "mlp.neurons"),),
    sites_off={"mlp.neurons": "a mixture of experts"},
)
LAYERS = SHAPE.num_layers
FINAL_NORM, LOGITS, SAMPLED = LAYERS + 1, SHAPE.logits, SHAPE.sampled
PROMPT = (3, 1, 4, 1, 5, 9)


@dataclass
class Held:
    """What the engine keeps of one session: the tokens fed, and where it stands."""

    fed: list[int] = field(default_factory=list)
    forward: int = -1
    point: int = SAMPLED
    first: int = 0
    #: what was held at stops that the session has left
    stops: dict[int, Held] = field(default_factory=dict)

    def copy(self) -> Held:
        return Held(list(self.fed), self.forward, self.point, self.first)


class Engine:
    """Carries out stretches and errands on pages that remember what was written."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.sessions: dict[str, Held] = {}
        #: what each slot of each tier holds
        self.tiers: dict[str, list[dict[tuple[int, int], Any]]] = {
            "device": [{} for _ in range(shape.num_device_pages)],
            "host": [{} for _ in range(shape.num_host_pages)],
            "disk": [{} for _ in range(shape.num_disk_pages)],
        }
        self.pages = self.tiers["device"]
        #: copies that were begun and not told done, and those whose bytes have arrived
        self.copies: dict[int, CopyPages] = {}
        self.arrived: set[int] = set()
        #: copies to the device that were not made
        self.failed: set[int] = set()
        self.stretch: RunStretch | None = None
        self.interrupted = False

    def begin(self, stretch: RunStretch) -> None:
        assert self.stretch is None, "two stretches in the engine"
        held = self.sessions.setdefault(stretch.session_id, Held())
        if stretch.point == NOT_STARTED:
            over = held.point in (SAMPLED, NOT_STARTED) or "~" in stretch.session_id
            assert over, "the last forward was not finished"
            assert stretch.forward in (held.forward, held.forward + 1)
            held.forward, held.first = stretch.forward, stretch.first_token
        assert (held.forward, held.first) == (stretch.forward, stretch.first_token)
        assert stretch.point == NOT_STARTED or stretch.point == held.point, "lost its place"
        assert stretch.point < stretch.until
        for item in (*stretch.checks, *stretch.edits):
            assert stretch.point < item.point <= stretch.until, "lies outside the stretch"
        for plan in stretch.edits:
            assert all(0 <= row < len(stretch.token_ids) for row in plan.rows or ())
        held.point = stretch.point
        held.fed[stretch.first_token :] = stretch.token_ids
        self.stretch, self.interrupted = stretch, False

    def move(self, copy: CopyPages) -> None:
        """Let the bytes of a copy arrive; nobody is told yet."""
        if copy.ticket in self.arrived:
            return
        self.arrived.add(copy.ticket)
        source, target = (self.tiers[tier] for tier in copy.way.split("-"))
        for a, b in zip(copy.sources, copy.targets, strict=True):
            target[b] = dict(source[a])

    def reach(self, stretch: RunStretch) -> Point:
        """How far it comes: up to the first layer whose pages do not come."""
        groups = [group for group, ticket in stretch.arrivals if ticket in self.failed]
        if not groups:
            return stretch.until
        layer = min(groups) * self.shape.layers_per_group
        return max(stretch.point, layer) if layer else stretch.point

    def answer(self, point: int) -> None:
        """Run the layers up to `point`."""
        assert self.stretch is not None
        held = self.sessions[self.stretch.session_id]
        num_layers = self.shape.num_layers
        reached = layers_begun(point, num_layers)
        for group, ticket in sorted(self.stretch.arrivals):
            if group * self.shape.layers_per_group < reached:
                # nothing is computed before they are there
                assert ticket not in self.failed, "computed on pages that did not come"
                if ticket in self.copies:
                    self.move(self.copies[ticket])
        for source, target in self.stretch.copies:
            self.pages[target] = dict(self.pages[source])
        begun = layers_executed(held.point, num_layers)
        for layer in range(begun, layers_begun(point, num_layers)):
            self._run_layer(self.stretch, held, layer)
        held.point = point
        self.stretch = None

    def _run_layer(self, stretch: RunStretch, held: Held, layer: int) -> None:
        size = self.shape.page_tokens
        table = stretch.tables[layer // self.shape.layers_per_group]
        for position in range(len(held.fed)):
            page = self.pages[table[position // size]]
            value = hash(tuple(held.fed[: position + 1]))
            if position >= stretch.first_token:
                page[layer, position] = value
            else:
                found = page.get((layer, position))
                assert found == value, (
                    f"{stretch.session_id}: layer {layer} reads another's position {position}"
                )

    def errand(self, errand: Any) -> None:
        match errand:
            case ForkTensors():
                parent = self.sessions.get(errand.parent_id)
                if parent is not None:
                    child = self.sessions[errand.child_id] = parent.copy()
                    child.stops = {node: parent.stops[node] for node in errand.nodes}
            case KeepTensors():
                held = self.sessions.setdefault(errand.session_id, Held())
                held.stops[errand.node] = held.copy()
            case RestoreTensors():
                held = self.sessions[errand.session_id]
                if errand.node is not None:
                    found = held.stops[errand.node].copy()
                else:
                    found = Held(list(self.sessions[errand.source_id].fed), errand.forward)
                    found.point = NOT_STARTED
                found.stops = held.stops
                self.sessions[errand.session_id] = found
            case DropNodes():
                for node in errand.nodes:
                    del self.sessions[errand.session_id].stops[node]
            case DropTensors():  # records of logpoints are not kept here at all
                self.sessions.pop(errand.session_id, None)
            case PoisonPages():
                for page in errand.pages:
                    self.pages[page] = {}
            case CopyPages():
                self.copies[errand.ticket] = errand


def result_of(plan: EditPlan) -> EditResult:
    return EditResult(
        edit_id=plan.edit_id, positions=(), elements_changed=8, norm_before=1.0, norm_after=2.0
    )


#: bytes of every record
RECORD = 1000


def noted(stretch: RunStretch, point: Point) -> tuple[tuple[LogResult, ...], Point]:
    """A record at every point of a logpoint up to `point`, or to where one must stop for room."""
    sizes: dict[int, list[int]] = {}
    dropped: dict[int, int] = {}
    refused: dict[int, int] = {}
    room = stretch.log_room_bytes
    for plan in stretch.logs:
        key = plan.breakpoint_id
        kept = sizes.setdefault(key, [])
        if plan.point > point:
            continue
        if room >= RECORD and plan.room_bytes >= RECORD * (len(kept) + 1):
            kept.append(RECORD)
            room -= RECORD
            continue
        dropped[key] = dropped.get(key, 0) + 1
        if plan.stop_when_full:
            refused[key], point = RECORD, plan.point
    results = [
        LogResult(
            breakpoint_id=key,
            held=len(kept) + dropped.get(key, 0),
            sizes=tuple(kept),
            dropped=dropped.get(key, 0),
            refused_bytes=refused.get(key),
        )
        for key, kept in sizes.items()
    ]
    return tuple(results), point


class World:
    """Clients, state and engine, one event at a time."""

    def __init__(
        self, shape: ModelShape = SHAPE, limits: Limits | None = None, **options: Any
    ) -> None:
        self.shape = shape
        self.state = ServerState(shape, limits, check=True, record=True, **options)
        #: what the journal would hold: the newest record of each session, as bytes
        self.journal: dict[str, tuple[bytes, tuple[Array, ...]]] = {}
        self.number = 0
        self.engine = Engine(shape)
        #: seconds of the server's clock
        self.now = 0.0
        self.asked: list[int] = []
        self.replies: dict[int, Any] = {}
        self.events: dict[str, list[m.Event]] = {}
        self.reads: list[ReadTensors] = []
        self.errands: deque[ApplyEdits] = deque()
        #: records that are waited for; False: until `tell_recorded` is called
        self.records: deque[WriteJournal] = deque()
        self.prompt_records = True
        #: why the journal cannot be written; empty: it can
        self.disk = ""
        #: False: edits wait until `apply_edits` is called
        self.prompt_edits = True
        #: which positions a condition holds at
        self.judge: Callable[[Check], tuple[int, ...]] = lambda check: ()
        #: what copies fail with, by way
        self.broken: dict[str, m.ErrorInfo] = {}
        #: the token a forward draws, by position
        self.draw: Callable[[int], int] = lambda position: 7

    # -- clients ----------------------------------------------------------------------------

    def send(self, message: Any, owner: str = "ada") -> int:
        """Send a request; returns its id."""
        request_id = len(self.asked) + 1
        self.asked.append(request_id)
        self.handle(Requested(request_id=request_id, owner=owner, message=message, now=self.now))
        return request_id

    def ask(self, message: Any, owner: str = "ada") -> Any:
        """Send a request and return its response, or raise its error."""
        return self.answer_to(self.send(message, owner))

    def answer_to(self, request_id: int) -> Any:
        reply = self.replies[request_id]
        if isinstance(reply, m.ErrorReply):
            raise rebuild_error(reply.error)
        return reply

    def launch(self, prompt: Iterable[int] = PROMPT, owner: str = "ada", **options: Any) -> str:
        options.setdefault("max_new_tokens", 4)
        message = m.Launch(token_ids=tuple(prompt), **options)
        return self.ask(message, owner).session.id

    def session(self, session_id: str, owner: str = "ada") -> m.SessionInfo:
        return self.ask(m.Describe(session_id=session_id), owner).session

    def go(self, session_id: str, request: type = m.Continue, **options: Any) -> m.SessionInfo:
        """Continue (or step) a session from where it rests, without waiting."""
        owner = self.state.sessions[session_id].owner
        seen = self.session(session_id, owner).stop_number
        return self.ask(request(session_id=session_id, seen=seen, **options), owner).session

    def run(self, session_id: str, request: type = m.Continue, **options: Any) -> m.SessionInfo:
        """Continue (or step) a session and let the engine work until nothing can run."""
        owner = self.state.sessions[session_id].owner
        self.go(session_id, request, **options)
        self.work()
        return self.session(session_id, owner)

    def break_at(self, session_id: str, location: str, **options: Any) -> m.BreakpointInfo:
        message = m.SetBreakpoint(session_id=session_id, locations=(location,), **options)
        return self.ask(message).breakpoint

    def breakpoint(self, session_id: str, breakpoint_id: int = 1) -> m.BreakpointInfo:
        return next(b for b in self.session(session_id).breakpoints if b.id == breakpoint_id)

    def edit(self, session_id: str, **spec: Any) -> m.EditReply:
        spec.setdefault("kind", "zero")
        seen = self.session(session_id).stop_number
        return self.ask(m.AddEdit(session_id=session_id, seen=seen, edit=m.EditSpec(**spec)))

    def edit_info(self, session_id: str, edit_id: int = 1) -> m.EditInfo:
        return next(e for e in self.session(session_id).edits if e.id == edit_id)

    def kinds(self, owner: str = "ada") -> list[str]:
        """Kinds of the events published so far."""
        return [event.kind for event in self.events.get(owner, [])]

    # -- engine -----------------------------------------------------------------------------

    @property
    def stretch(self) -> RunStretch:
        assert self.engine.stretch is not None, "the engine has nothing to do"
        return self.engine.stretch

    def work(self) -> None:
        """Let the engine run whatever it is given, until it is given nothing."""
        for _ in range(10_000):
            if self.engine.stretch is not None:
                self.done()
            elif self.engine.copies:
                self.land()
            else:
                return
        raise AssertionError("the engine never comes to rest")

    def land(self, ticket: int | None = None, error: m.ErrorInfo | None = None) -> None:
        """Tell of a copy, the oldest unless it is named, that it was made or why not."""
        ticket = min(self.engine.copies) if ticket is None else ticket
        copy = self.engine.copies[ticket]
        error = error or self.broken.get(copy.way)
        if copy.way == "host-device" and ticket in self.engine.arrived:
            error = None  # a stretch has computed on what it brought
        if error is None:
            self.engine.move(copy)
        elif copy.way == "host-device":
            self.engine.failed.add(ticket)
        del self.engine.copies[ticket]
        self.engine.arrived.discard(ticket)
        nbytes = 0 if error else len(copy.sources) * self.shape.page_bytes
        self.handle(CopiesDone(ticket=ticket, nbytes=nbytes, seconds=0.01, error=error))

    def done(self, point: int | None = None) -> None:
        """Let the engine come to its end, a check that holds, or `point` when interrupted."""
        stretch = self.stretch
        for _, ticket in stretch.arrivals:
            copy = self.engine.copies.get(ticket)
            if copy is not None and copy.way in self.broken and ticket not in self.engine.arrived:
                self.land(ticket)  # what the engine waits for is told before it learns of it
        if point is None:
            point = stretch.until
        point = min(point, self.engine.reach(stretch))
        holding: list[tuple[Check, tuple[int, ...]]] = []
        for check in stretch.checks:
            if check.point <= point and (positions := self.judge(check)):
                point = check.point
                holding.append((check, positions))
        logs, point = noted(stretch, point)
        token = self.token() if point == SAMPLED else None
        self.engine.answer(point)
        self.handle(
            StretchDone(
                session_id=stretch.session_id,
                point=point,
                held={c.breakpoint_id: where for c, where in holding if c.point == point},
                edits=tuple(result_of(plan) for plan in stretch.edits if plan.point <= point),
                logs=logs,
                token=token,
            )
        )

    def token(self) -> int:
        """What the forward that ends draws: when it is run again, what it drew before."""
        session = self.state.sessions.get(self.stretch.session_id)
        if session is not None and session.replay is not None:
            return session.replay.tokens[len(session.tokens)]
        return self.draw(self.stretch.sampling.position)

    def fail(self, point: int, fatal: bool = False, code: str = "OutOfDeviceMemory") -> None:
        """Let the engine fail after `point`."""
        session_id = self.stretch.session_id
        logs, point = noted(self.stretch, point)
        self.engine.answer(point)
        error = m.ErrorInfo(code=code, message="it broke")
        self.handle(
            StretchFailed(session_id=session_id, point=point, error=error, fatal=fatal, logs=logs)
        )

    def apply_edits(self, fail: bool = False) -> None:
        """Carry out the oldest edits asked for."""
        errand = self.errands.popleft()
        if fail:
            error = m.ErrorInfo(code="BadEdit", message="too large for the dtype")
            self.handle(
                EditsFailed(request_id=errand.request_id, session_id=errand.session_id, error=error)
            )
            return
        results = tuple(result_of(plan) for plan in errand.edits)
        self.handle(
            EditsApplied(
                request_id=errand.request_id, session_id=errand.session_id, results=results
            )
        )

    # -- what the loop does -----------------------------------------------------------------

    def handle(self, event: Any) -> list[Any]:
        instructions = self.state.handle(event)
        for instruction in instructions:
            self._carry_out(instruction)
        while self.prompt_edits and self.errands:
            self.apply_edits()
        while self.prompt_records and self.records:
            self.tell_recorded()
        return instructions

    def tell_recorded(self) -> None:
        """Tell that the oldest record that is waited for is on disk, or why it is not."""
        written = self.records.popleft()
        assert written.ticket is not None
        self.handle(Recorded(session_id=written.session_id, ticket=written.ticket, lacks=self.disk))

    def _carry_out(self, instruction: Any) -> None:
        match instruction:
            case Reply():
                self._keep_reply(instruction.request_id, instruction.message)
            case WriteJournal():
                self._record(instruction)
            case Publish():
                log = self.events.setdefault(instruction.owner, [])
                assert instruction.event.seq == len(log) + 1, "a gap in the sequence of events"
                log.append(instruction.event)
            case RunStretch():
                self.engine.begin(instruction)
            case Interrupt():
                assert self.stretch.session_id == instruction.session_id
                self.engine.interrupted = True
            case ApplyEdits():
                running = self.engine.stretch and self.engine.stretch.session_id
                assert running != instruction.session_id, "edited while it runs"
                point = self.engine.sessions[instruction.session_id].point
                assert all(plan.point == point for plan in instruction.edits), "edited elsewhere"
                self.errands.append(instruction)
            case ReadTensors():
                self.reads.append(instruction)
                self._keep_reply(instruction.request_id, instruction)
            case _:
                self.engine.errand(instruction)

    def _record(self, written: WriteJournal) -> None:
        if written.ticket is not None:
            self.records.append(written)
        if self.disk:
            return
        self.number = written.number
        self.journal.pop(written.session_id, None)
        if written.record is not None:
            self.journal[written.session_id] = encode(written.record), written.arrays

    def read(self, damaged: frozenset[str] = frozenset()) -> JournalRead:
        """What a server that starts now would read."""
        sessions = tuple((decode(data), arrays) for data, arrays in self.journal.values())
        return JournalRead(number=self.number, sessions=sessions, damaged=damaged)

    def _keep_reply(self, request_id: int, message: Any) -> None:
        assert request_id not in self.replies, f"request {request_id} was answered twice"
        self.replies[request_id] = message

    def finish_checks(self) -> None:
        """What must hold at the end of every test."""
        self.state.check()
        while self.errands:
            self.apply_edits()
        unanswered = [i for i in self.asked if i not in self.replies]
        assert not unanswered, f"requests without an answer: {unanswered}"


#: Parts of the state that are no part of what was decided: logs, and caches made anew.
_APART = {
    "_story", "_out", "_told", "_requests", "recorded", "num_events", "checking", "_armed",
    "_asked", "_index", "_run", "now", "touched", "idled", "to_clean", "rested", "counted", "told",
    "stuck_at", "noted_last", "prompt_array",
}  # fmt: skip


def snapshot(value: Any) -> Any:
    """A deep, comparable copy of a state."""
    if isinstance(value, (ServerState, *_PARTS)) or is_dataclass(value):
        names = vars(value) if hasattr(value, "__dict__") else [f.name for f in fields(value)]
        return type(value).__name__, {
            name: snapshot(getattr(value, name)) for name in names if name not in _APART
        }
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [snapshot(item) for item in value]
    return frozenset(value) if isinstance(value, set) else value


_PARTS = (Breakpoints, Edits, PagePool, Residency, Scheduler, Slots, TokenSelector)
