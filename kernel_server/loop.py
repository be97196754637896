"""The only place where state and engine meet: take an event, handle it, carry out what follows.

Whoever has an event calls `dispatch`; the state is decided under one lock in the caller's own
thread, so a control call is answered without waiting for the engine. It is also the place that
knows whose session runs, and for whom others work: it tells the pacer.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from kernel_server.event_log import EventLog
from kernel_server.pacing import Pacer
from kernel_server.protocol.errors import ServerFault
from kernel_server.protocol.location import NOT_STARTED
from kernel_server.protocol.messages import ErrorReply, error_info
from kernel_server.state.events import (
    CopiesDone,
    EditsApplied,
    EditsFailed,
    Recorded,
    Requested,
    StateEvent,
    StretchDone,
    StretchFailed,
)
from kernel_server.state.instructions import (
    CopyPages,
    Instruction,
    Interrupt,
    Publish,
    ReadTensors,
    Reply,
    WriteJournal,
)
from kernel_server.state.server_state import ServerState

log = logging.getLogger(__name__)

#: A reply that takes longer than this is a fault of ours, not patience of theirs.
REPLY_DEADLINE_S = 120.0


class Worker(Protocol):
    """What the loop asks of the engine."""

    def submit(self, instruction: Instruction) -> None: ...

    def interrupt(self, session_id: str) -> None: ...


class Durable(Protocol):
    """What the loop asks of a journal."""

    def write(
        self, instruction: WriteJournal, told: Callable[[str], None] | None = None
    ) -> None: ...

    def after(self, action: Callable[[], None]) -> None: ...


class _Answer:
    """An answer that one thread waits for; a lock, since a `Future` takes several and is made for
    every request."""

    __slots__ = ("_given", "message")

    def __init__(self) -> None:
        self.message: Any = None
        self._given = threading.Lock()
        self._given.acquire()

    def give(self, message: Any) -> None:
        self.message = message
        self._given.release()

    def wait(self, timeout_s: float) -> bool:
        """Whether it was given in time."""
        return self._given.acquire(timeout=timeout_s)


class Loop:
    """Feeds events to the state and instructions to the engine, one event at a time.

    pacer: told whose session runs, and what others than its own thread do for a call.
    """

    def __init__(
        self,
        state: ServerState,
        events: EventLog,
        *,
        debug: bool = False,
        journal: Durable | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        self.state = state
        self._pacer = pacer or Pacer()
        self._runner: str | None = None
        #: who wants the copies that the engine has not begun yet, by ticket; None: nobody
        self._to_begin: dict[int, str | None] = {}
        self._journal = journal
        self.events = events
        self.debug = debug
        self._engine: Worker | None = None
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Answer] = {}

    def attach(self, engine: Worker) -> None:
        """Name the engine that carries out instructions."""
        self._engine = engine

    def request(self, owner: str, message: Any) -> Any:
        """Hand a request to the state and return its response message."""
        request_id = next(self._ids)
        answer = self._waiting[request_id] = _Answer()
        self.dispatch(
            Requested(request_id=request_id, owner=owner, message=message, now=time.monotonic())
        )
        if answer.wait(REPLY_DEADLINE_S):
            return answer.message
        self._waiting.pop(request_id, None)
        fault = ServerFault(
            f"no answer to {type(message).__name__} within {REPLY_DEADLINE_S:.0f} s;"
            " the engine may be stuck in one layer"
        )
        return ErrorReply(error=error_info(fault))

    def reply(self, request_id: int, message: Any) -> None:
        """Answer a request; an answer nobody waits for any more is dropped."""
        answer = self._waiting.pop(request_id, None)
        if answer is not None:
            answer.give(message)

    def dispatch(self, event: StateEvent) -> None:
        """Handle one event and carry out its instructions, in order with all others."""
        with self._lock:
            if isinstance(event, CopiesDone):
                owner, began = self._owner_of_copy(event.ticket), time.thread_time()
                self._handle(event)
                self._copied_for(owner, time.thread_time() - began)
            else:
                self._handle(event)
            slot = self.state.slot
            runner = None if slot is None else slot.session.owner
            if runner != self._runner:
                self._runner = runner
                self._pacer.runs(runner)

    def _handle(self, event: StateEvent) -> None:
        try:
            instructions = self.state.handle(event)
        except Exception as error:
            self._report_fault(event, error)
            return
        for instruction in instructions:
            self._carry_out(instruction)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Reply():
                request_id, message = instruction.request_id, instruction.message
                self._tell(lambda: self.reply(request_id, message))
            case Publish():
                owner, event = instruction.owner, instruction.event
                self._tell(lambda: self.events.append(owner, event))
            case WriteJournal():
                self._write(instruction)
            case Interrupt():
                self.engine.interrupt(instruction.session_id)
            case CopyPages():
                # told of it may be before the engine has told that it was begun
                self._to_begin[instruction.ticket] = self._owner_of_copy(instruction.ticket)
                self.engine.submit(instruction)
            case _:
                self.engine.submit(instruction)

    def _write(self, instruction: WriteJournal) -> None:
        session_id, ticket = instruction.session_id, instruction.ticket
        if self._journal is None:
            return
        if ticket is None:
            self._journal.write(instruction)
            return

        def told(lacks: str) -> None:
            self.dispatch(Recorded(session_id=session_id, ticket=ticket, lacks=lacks))

        self._journal.write(instruction, told)

    def _tell(self, action: Callable[[], None]) -> None:
        """Tell something when what it rests on is on disk; nothing waits for that here."""
        if self._journal is None:
            action()
        else:
            self._journal.after(action)

    # -- whose time it is -----------------------------------------------------------------------

    def errand_done(self, errand: Instruction, seconds: float) -> None:
        """The engine's thread, and so whoever runs on it, was kept by an errand for so long."""
        if isinstance(errand, CopyPages):
            self._copied_for(self._to_begin.pop(errand.ticket, None), seconds)
        elif isinstance(errand, ReadTensors):
            # the gateway counts, for those who ask, how long its request keeps the engine
            self._pacer.take(errand.owner, seconds)
        else:
            self.taken_for(getattr(errand, "session_id", ""), seconds)

    def copy_begun(self, ticket: int, seconds: float) -> None:
        """A copy took the host so long to give to the device; it is not told done yet."""
        self._copied_for(self._owner_of_copy(ticket), seconds)

    def taken_for(self, session_id: str, seconds: float) -> None:
        """Something was done for a session that holds others up, for so long."""
        session = self.state.sessions.get(session_id)
        if session is not None:
            self._pacer.take(session.owner, seconds)

    def _copied_for(self, owner: str | None, seconds: float) -> None:
        """Copies were begun, or told of, for an owner; None: of the server's own accord."""
        if owner is not None:
            self._pacer.spend(owner, seconds)
            self._pacer.take(owner, seconds)

    def _owner_of_copy(self, ticket: int) -> str | None:
        copying = self.state.copying.get(ticket)
        session = self.state.sessions.get((copying and copying.session_id) or "")
        return None if session is None else session.owner

    def _end_run(self, session_id: str, fault: ServerFault) -> None:
        failed = StretchFailed(
            session_id=session_id, point=NOT_STARTED, error=error_info(fault), fatal=True
        )
        try:
            for instruction in self.state.handle(failed):
                self._carry_out(instruction)
        except Exception:
            log.exception("could not mark session %s as failed", session_id)

    @property
    def engine(self) -> Worker:
        if self._engine is None:
            raise RuntimeError("no engine is attached to the loop")
        return self._engine

    def _report_fault(self, event: StateEvent, error: Exception) -> None:
        """A bug in the state: the caller is told, with the session's story; the server goes on."""
        log.exception("state machine failed on %s", type(event).__name__)
        session_id = getattr(event, "session_id", None) or getattr(
            getattr(event, "message", None), "session_id", None
        )
        story = self.state.story(session_id)[-40:] if session_id else []
        fault = ServerFault(
            f"internal error in {type(event).__name__}: {type(error).__name__}: {error};"
            " please report it with details['story']",
            story=story,
        )
        request_id = getattr(event, "request_id", None)
        if isinstance(event, StretchDone | EditsApplied | EditsFailed):
            # nobody else will move this session on: end its run rather than leave it hanging
            self._end_run(event.session_id, fault)
        if request_id is not None:
            trace = "".join(traceback.format_exception(error)) if self.debug else None
            self.reply(request_id, ErrorReply(error=error_info(fault, trace)))
