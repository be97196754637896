"""What every part of the state machine stands on: the sessions, the page pool, the engine's slot,
and the few ways anything leaves it. Which requests and results do what is decided in `control`,
`editing` and `running`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import is_not
from typing import Any, Literal

from kernel_server.protocol.errors import NotStopped, StaleStop, UnknownSession
from kernel_server.protocol.location import Point, layers_begun, layers_executed, location_at
from kernel_server.protocol.messages import (
    ErrorInfo,
    Event,
    Reason,
    SessionInfo,
    StopInfo,
)
from kernel_server.state.breakpoints import Place
from kernel_server.state.edits import Edit
from kernel_server.state.instructions import (
    DropTensors,
    Instruction,
    Interrupt,
    PoisonPages,
    Publish,
    Reply,
)
from kernel_server.state.pages import PagePool
from kernel_server.state.residency import Residency, Tier
from kernel_server.state.scheduler import Scheduler
from kernel_server.state.sessions import Session
from kernel_server.state.shape import Limits, ModelShape
from kernel_server.state.story import Story

EventKind = Literal[
    "launched", "continued", "progress", "stopped", "finished", "failed", "terminated", "changed",
    "swapped", "durability", "lease",
]  # fmt: skip


@dataclass(slots=True)
class Slot:
    """The stretch the engine was given, and what it was told then."""

    session: Session
    #: the forward it runs, where it started, and how far it may go
    forward: int
    start: Point
    until: Point
    armed: tuple[Place, ...]
    #: edits ahead, with the positions each changes
    edits: list[tuple[Edit, tuple[int, ...]]]
    #: pages that are copied first: owned until the engine has answered, so that nobody frees them
    sources: tuple[int, ...]
    #: many tokens: worth interrupting
    long: bool
    interrupted: bool = False
    #: the session was terminated: free it when the engine answers
    ended: bool = False
    #: how many there were before it
    number: int = 0


class Core:
    """The remembered part of the state machine, and its ways out."""

    def __init__(
        self,
        shape: ModelShape,
        limits: Limits | None = None,
        *,
        check: bool = False,
        host_ready: int | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        journal: bool = False,
    ) -> None:
        #: under which sessions run here
        self.fingerprint: Mapping[str, Any] = fingerprint or {}
        #: whether sessions are made durable
        self.journal = journal
        #: sessions that have changed and are to be recorded now; those that only ran, at times
        self.changed: dict[str, None] = {}
        self.advanced: dict[str, None] = {}
        self.shape = shape
        self.limits = limits or Limits()
        self.checking = check
        self.sessions: dict[str, Session] = {}
        most = self.limits.kv_bytes_per_owner
        self.pool = PagePool(shape.num_pages, None if most is None else most // shape.page_bytes)
        self.residency = Residency(
            shape.num_device_pages,
            shape.num_host_pages if host_ready is None else host_ready,
            shape.num_disk_pages,
        )
        self.scheduler = Scheduler()
        self.slot: Slot | None = None
        #: how many sessions were ever made; names them, and is the default seed
        self.num_made = 0
        #: how many events were handled
        self.num_events = 0
        #: owner -> sequence number of the last event published
        self.event_seq: dict[str, int] = {}
        #: seconds, from the events that carry a time
        self.now = 0.0
        #: sessions that are to run and wait for copies, in the order they came
        self.arriving: dict[str, None] = {}
        #: copies under way by ticket, and the last that brings each page to the device
        self.copying: dict[int, Any] = {}
        self.inbound: dict[int, int] = {}
        #: the session for which pages change places, while there is no room below for others
        self.exchanging: str | None = None
        self._tickets_made = 0
        #: tiers that refuse, or did and have not taken a page since
        self.refusals: dict[Tier, Any] = {}
        #: how often each page could not be read back, and those that are given up, with why
        self.failed_reads: dict[int, int] = {}
        self.lost: dict[int, ErrorInfo] = {}
        #: sessions at rest whose pages are to be copied down
        self.to_clean: dict[str, None] = {}
        #: those that came to rest since the last tick, if they wait for the next
        self.rested: dict[str, None] = {}
        #: how many stretches were begun, and the last beside which a copy was begun beforehand
        self.slots_begun = 0
        self.wrote_behind_in: float = -math.inf
        #: so much of the device cannot leave at once that the host gives to the disk
        self.pressing = False
        #: session -> who asked for its pages to be in a tier
        self.settling: dict[str, Any] = {}
        self._story = Story(self.limits.story_entries)
        self._out: list[Instruction] = []
        #: session -> what this event told of it last, and `Residency.changes` then
        self._told: dict[str, tuple[int, SessionInfo]] = {}

    # -- ways out ---------------------------------------------------------------------------

    def emit(self, instruction: Instruction) -> None:
        self._out.append(instruction)

    def note(self, session: Session, name: str, detail: Any = "") -> None:
        """Add a line to the session's story."""
        self._story.note(session.id, self.num_events, name, detail)

    def reply(self, request_id: int, message: Any) -> None:
        self._out.append(Reply(request_id=request_id, message=message))

    def publish(
        self,
        session: Session,
        kind: EventKind,
        *,
        done: int = 0,
        total: int = 0,
        text: str = "",
        remaining_s: float | None = None,
    ) -> None:
        """Append an event to the owner's log; it carries the session unless that has no news."""
        if session.scratch:
            return
        if kind == "progress":
            self.advanced[session.id] = None
        elif kind not in ("continued", "swapped", "lease"):
            self.changed[session.id] = None
        seq = self.event_seq.get(session.owner, 0) + 1
        self.event_seq[session.owner] = seq
        session.revision += 1
        shown = None if kind in ("progress", "terminated") else self._info(session, seq)
        if shown is not None:
            self._told[session.id] = self.residency.changes, shown
        event = Event(
            seq=seq,
            kind=kind,
            session_id=session.id,
            session=shown,
            done=done,
            total=total,
            text=text,
            remaining_s=remaining_s,
        )
        self._out.append(Publish(owner=session.owner, event=event))

    def info(self, session: Session) -> SessionInfo:
        return self._info(session, self.event_seq.get(session.owner, 0))

    def told_info(self, session: Session) -> SessionInfo:
        """The same, of a session of which nothing but its pages can have changed since this event
        began to tell of it: what was told then, if it holds."""
        changes, told = self._told.get(session.id, (None, None))
        if told is None or changes != self.residency.changes:
            return self.info(session)
        assert not self.checking or told == self.info(session), f"{session.id} is otherwise now"
        return told

    def _info(self, session: Session, seq: int) -> SessionInfo:
        return session.info(self.shape, seq, self._pages_in(session))

    def _pages_in(self, session: Session) -> dict[str, int]:
        """By tier, how many of the session's pages are there; counted when something moved."""
        changes, tables = self.residency.changes, session.tables
        known = session.counted
        if known is None or known[0] != changes or any(map(is_not, known[1], tables)):
            known = changes, tuple(tables), self.residency.count(tables)
            session.counted = known
        return known[2]

    def location(self, point: Point) -> str:
        return str(location_at(point, self.shape.num_layers))

    # -- finding and refusing -----------------------------------------------------------------

    def own(self, owner: str, session_id: str) -> Session:
        """The owner's session, or `UnknownSession`; others' do not exist for them."""
        session = self.sessions.get(session_id)
        if session is None or session.owner != owner or session.scratch:
            raise UnknownSession(
                f"no session {session_id[:80]!r}: it was terminated or never was; sessions() lists"
                " those there are"
            )
        return session

    def require_rest(self, session: Session, seen: int) -> None:
        """Refuse unless the session waits or is stopped, and the caller saw it so."""
        place = session.place(self.shape.num_layers)
        if seen != session.stop_number:
            raise StaleStop(
                f"session {session.id} has moved on: it is at stop {session.stop_number} ({place}),"
                f" and this call saw stop {seen}; look at the session again, then repeat",
                seen=seen,
                stop_number=session.stop_number,
            )
        if session.status in ("waiting", "stopped"):
            return
        then = {
            "running": "pause it, or wait for its next stop",
            "finished": "go back with session.step_back() or session.rewind(), or launch again",
            "failed": "its error says why; launch again",
        }[session.status]
        raise NotStopped(f"session {session.id} is {place}: {then}", status=session.status)

    def require_stop(self, session: Session, seen: int) -> None:
        """Refuse unless the session stands at the stop the caller saw."""
        self.require_rest(session, seen)
        if session.status != "stopped":
            place = session.place(self.shape.num_layers)
            raise NotStopped(f"session {session.id} is {place}: continue it to a stop first")

    # -- status -----------------------------------------------------------------------------

    def move(self, session: Session, status: Any) -> None:
        self.note(session, f"{session.status} → {status}")
        session.move_to(status)

    def stop(
        self,
        session: Session,
        reason: Reason,
        *,
        hit_tokens: tuple[int, ...] = (),
        hit_breakpoints: tuple[int, ...] = (),
        error: ErrorInfo | None = None,
    ) -> None:
        """Let a session stand where it is."""
        self.move(session, "stopped")
        self._rest(session)
        session.error = error
        session.stop = StopInfo(
            number=session.stop_number,
            reason=reason,
            location=self.location(session.point),
            forward=session.forward,
            first_token=session.first_token,
            end_token=session.end_token,
            layers_executed=layers_executed(session.point, self.shape.num_layers),
            hit_tokens=hit_tokens,
            hit_breakpoints=hit_breakpoints,
            error=error,
        )
        self.publish(session, "stopped")

    def wait(self, session: Session, error: ErrorInfo | None) -> None:
        """Let a session wait before the forward it could not begin."""
        self.move(session, "waiting")
        self._rest(session)
        session.error = error
        self.publish(session, "stopped")

    def finish(self, session: Session) -> None:
        """All tokens are drawn; pages stay, so that it can be forked and looked at."""
        self.move(session, "finished")
        self._rest(session)
        self.publish(session, "finished")

    def fail(self, session: Session, error: ErrorInfo) -> None:
        """A session lost to a fault holds nothing any more."""
        self.move(session, "failed")
        self._rest(session)
        session.stop = None
        session.error = error
        session.breakpoints.empty_logs()
        self.free(session)
        self.publish(session, "failed")

    def _rest(self, session: Session) -> None:
        session.stop_number += 1
        session.touched = self.now
        (self.rested if self.limits.copies_from_ticks else self.to_clean)[session.id] = None
        session.target = None
        session.pausing = False
        self._trim(session)

    def require_built(self, session: Session) -> None:
        """Refuse what needs the tensors of a session that came back without them; defined by who
        computes them again."""
        raise NotImplementedError

    def set_running(self, session: Session) -> None:
        """Queue a session, and let a long stretch give way to it."""
        self.move(session, "running")
        session.ran_from = None
        session.stop = None
        session.error = None
        self.queue(session)

    def queue(self, session: Session, *, first: bool = False) -> None:
        self.scheduler.add(session.owner, session.id, first=first)
        if self.slot is not None and self.slot.long:
            self.interrupt()

    def unqueue(self, session: Session) -> None:
        """Take a session out of the queue, or out of those that wait for copies."""
        self.scheduler.remove(session.owner, session.id)
        self.arriving.pop(session.id, None)

    def interrupt(self) -> None:
        """Ask the engine to answer at the next layer boundary, once."""
        assert self.slot is not None
        if not self.slot.interrupted:
            self.slot.interrupted = True
            self.emit(Interrupt(session_id=self.slot.session.id))

    def plan_anew(self, session: Session) -> None:
        """What the engine was told of a long stretch has changed: let it be asked again."""
        if self.slot is not None and self.slot.session is session and self.slot.long:
            self.interrupt()

    # -- pages ------------------------------------------------------------------------------

    def release(self, pages: list[int] | tuple[int, ...]) -> None:
        """Drop an owner of each page; with checks on, freed ones are filled with NaN."""
        if not pages:
            return
        freed = self.pool.release(pages)
        if self.failed_reads or self.lost:
            for page in freed:
                self.failed_reads.pop(page, None)
                self.lost.pop(page, None)
        self._poison(self.residency.forget_all(freed))

    def leave_device(self, pages: Iterable[int]) -> None:
        """Let pages leave the device that have a good copy below."""
        self._poison(self.residency.leave_device(pages))

    def _poison(self, slots: list[int]) -> None:
        if slots and self.checking:
            self.emit(PoisonPages(pages=tuple(slots)))

    def device_tables(self, session: Session, groups: range) -> tuple[tuple[int, ...], ...]:
        """Device slots of the session's pages, by group; none for groups that are not used.

        Learnt slots are kept: a decode must not cost more the longer its session is.
        """
        residency = self.residency
        if session.slots_epoch != residency.epoch:
            session.slots_epoch = residency.epoch
            session.slots = {}
        found: list[tuple[int, ...]] = [()] * groups.start
        for group in groups:
            table = session.tables[group]
            known = session.slots.get(group)
            if known is None or known[0] is not table:
                known = (table, tuple(map(residency.device_slot, table)))
                session.slots[group] = known
            found.append(known[1])
        return tuple(found)

    def _trim(self, session: Session) -> None:
        """Give back pages of groups this forward has not reached: nothing is in them."""
        shape = self.shape
        begun = shape.groups_begun(layers_begun(session.point, shape.num_layers))
        keep = shape.pages_for(session.first_token)
        for group in range(begun, shape.num_groups):
            table = session.tables[group]
            if len(table) > keep:
                session.tables[group] = table[:keep]
                self.release(table[keep:])

    def free(self, session: Session, *, but_logs: bool = False) -> None:
        """Give back all pages and tensors of a session. but_logs: not the records of logpoints."""
        pages = [page for table in session.tables for page in table]
        session.tables = [()] * self.shape.num_groups
        self.emit(DropTensors(session_id=session.id, but_logs=but_logs))
        self.release(pages)
