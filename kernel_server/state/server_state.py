"""The state machine: one event in, the instructions that follow out. No torch, no I/O, no clock.

Everything that decides what a session does lives in this package and is changed through `handle`
only. A request that cannot be done is answered with an error and changes nothing. Handling is
deterministic: the same events lead to the same state and the same instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadMessage, DjinnError, QuotaExceeded, ServerFault
from kernel_server.protocol.location import layers_begun, layers_executed
from kernel_server.protocol.messages import error_info
from kernel_server.state.budgets import Budgets
from kernel_server.state.events import (
    CopiesDone,
    DurabilityChanged,
    EditsApplied,
    EditsFailed,
    JournalRead,
    PoolGrown,
    Recorded,
    Requested,
    StateEvent,
    StretchAdvanced,
    StretchDone,
    StretchFailed,
    Ticked,
)
from kernel_server.state.instructions import Instruction, Reply
from kernel_server.state.sessions import Session
from kernel_server.state.shape import Limits, ModelShape
from kernel_server.state.story import brief

__all__ = ["Limits", "ModelShape", "ServerState"]

#: Requests that are answered even while edits of their session are being applied.
_AT_ONCE = (m.Describe, m.ReadStory, m.Pause)

#: Requests that notebooks make by themselves: nobody uses the session by them.
_UNASKED = (m.ListBranches,)

#: Requests that need no tensors, so that a dormant session answers them as it is.
_WITHOUT_TENSORS = (
    m.Describe, m.ReadStory, m.Pause, m.Accept, m.Terminate, m.ListBranches,
    m.ReadRecord, m.ReadLog, m.Hint, m.Pin,
    m.SetBreakpoint, m.EnableBreakpoint, m.RemoveBreakpoint,
)  # fmt: skip


class ServerState(Budgets):
    """All sessions of a server, and what is to be done next."""

    def __init__(
        self,
        shape: ModelShape,
        limits: Limits | None = None,
        check: bool = False,
        record: bool = False,
        host_ready: int | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        journal: bool = False,
    ) -> None:
        super().__init__(
            shape,
            limits,
            check=check,
            host_ready=host_ready,
            fingerprint=fingerprint,
            journal=journal,
        )
        #: every event handled, for `replay`; None unless asked for, since it only grows
        self.recorded: list[StateEvent] | None = [] if record else None
        self._requests: dict[type[Any], Callable[..., None]] = {
            m.Launch: self.launch,
            m.ListSessions: self.list_sessions,
            m.Describe: self.describe,
            m.Continue: self.continue_,
            m.Next: self.next,
            m.StepIn: self.step_in,
            m.StepOut: self.step_out,
            m.RunTo: self.run_to,
            m.Pause: self.pause,
            m.Fork: self.fork,
            m.StepBack: self.step_back,
            m.Rewind: self.rewind,
            m.GoTo: self.go_to,
            m.ListBranches: self.list_branches,
            m.PruneBranch: self.prune_branch,
            m.Terminate: self.terminate,
            m.Accept: self.accept,
            m.ReadRecord: self.read_record,
            m.LoadRecord: self.load_record,
            m.SetBreakpoint: self.set_breakpoint,
            m.EnableBreakpoint: self.enable_breakpoint,
            m.RemoveBreakpoint: self.remove_breakpoint,
            m.AddEdit: self.add_edit,
            m.EnableEdit: self.enable_edit,
            m.RemoveEdit: self.remove_edit,
            m.UndoEdit: self.undo_edit,
            m.ReadValue: self.read_value,
            m.ReadLens: self.read_lens,
            m.ReadCapture: self.read_capture,
            m.ReadLogits: self.read_logits,
            m.ReadLog: self.read_log,
            m.ReadStory: self.read_story,
            m.Preview: self.preview,
            m.Evict: self.evict,
            m.Restore: self.restore,
            m.Pin: self.pin,
            m.Hint: self.hint,
            m.SetBudget: self.set_budget,
            m.ReadAttention: self.read_attention,
            m.ReadAttribution: self.read_attribution,
            m.ReadSites: self.read_sites,
            m.ReadLensMap: self.read_lens_map,
            m.ReadRouter: self.read_router,
            m.ReadDiff: self.read_diff,
        }

    def handle(self, event: StateEvent) -> list[Instruction]:
        """Change the state by one event; returns what is to be done, in order."""
        self._out, self._told = [], {}
        self.num_events += 1
        if self.recorded is not None:
            self.recorded.append(event)
        match event:
            case StretchDone():
                self.stretch_done(event)
            case Requested():
                self.now = max(self.now, event.now)
                self.end_refusals()
                self._requested(event)
            case StretchAdvanced():
                self.stretch_advanced(event)
            case StretchFailed():
                self.stretch_failed(event)
                self._resume_requests(event.session_id)
            case EditsApplied():
                self.edits_applied(event)
                self._resume_requests(event.session_id)
            case EditsFailed():
                self.edits_failed(event)
                self._resume_requests(event.session_id)
            case CopiesDone():
                self.copies_done(event)
            case Ticked():
                self.now = max(self.now, event.now)
                self.end_refusals()
                self.ticked(event)
                self.record_advanced()
            case PoolGrown():
                self.pool_grown(event)
            case JournalRead():
                self.journal_read(event)
            case DurabilityChanged():
                self.durability_changed(event)
            case Recorded():
                self.session_recorded(event)
            case _:
                raise TypeError(f"{type(event).__name__} is not an event of the state machine")
        self.dispatch()
        self.keep_to_budgets()
        self.write_behind()
        if self.checking:
            self.check()
        # first what must be on disk before the rest is told
        return [*self.write_journal(), *self._out]

    def _requested(self, event: Requested) -> None:
        """Answer a request, or refuse it with its error; a fault of ours is answered too."""
        try:
            self._request(event)
        except DjinnError as error:
            self._note_refusal(event, error)
            self.reply(event.request_id, m.ErrorReply(error=error_info(error)))
        except Exception as error:
            if self.checking:
                raise
            story = self.story(getattr(event.message, "session_id", ""))[-40:]
            fault = ServerFault(
                f"internal error in {type(event.message).__name__}: {type(error).__name__}:"
                f" {error}; please report it with details['story']",
                story=story,
            )
            answered = any(
                isinstance(i, Reply) and i.request_id == event.request_id for i in self._out
            )
            if not answered:
                self.reply(event.request_id, m.ErrorReply(error=error_info(fault)))

    def _request(self, event: Requested) -> None:
        message = event.message
        answer = self._requests.get(type(message))
        if answer is None:
            raise BadMessage(f"{type(message).__name__} is not a request about sessions")
        if isinstance(message, (m.Launch, m.ListSessions, m.SetBudget, m.LoadRecord)):
            answer(event, message)
            return
        session = self.own(event.owner, message.session_id)
        if not isinstance(message, _UNASKED):
            session.touched, session.idled, session.noted_last = self.now, False, None
        if session.pending is not None and not isinstance(message, _AT_ONCE):
            self._defer(event, session)
            return
        if not isinstance(message, _WITHOUT_TENSORS):
            self.require_built(session)
            if isinstance(message, m.ReadDiff):
                self.require_known(message.other_id, event.owner)
        if not isinstance(message, (m.Describe, m.ReadStory, m.ListBranches)):
            self.note(session, type(message).__name__, brief(message))
        answer(event, message, session)

    def _defer(self, event: Requested, session: Session) -> None:
        most = self.limits.deferred_per_session
        if len(session.deferred) >= most:
            raise QuotaExceeded(
                f"{most} requests wait for the edits of session {session.id}: wait for answers",
                limit=most,
            )
        session.deferred.append(event)

    def _resume_requests(self, session_id: str) -> None:
        """Handle requests that waited for edits, until one of them brings new ones."""
        session = self.sessions.get(session_id)
        while session is not None and session.deferred and session.pending is None:
            self._requested(session.deferred.popleft())

    def _note_refusal(self, event: Requested, error: DjinnError) -> None:
        session = self.sessions.get(getattr(event.message, "session_id", ""))
        if session is not None and session.owner == event.owner:
            self.note(session, "refused", f"{error.code}: {error.message}")

    # -- looking ------------------------------------------------------------------------------

    def story(self, session_id: str) -> list[str]:
        """What happened to one session, a line each; empty when nothing is known of it."""
        return self._story.lines(session_id)

    @classmethod
    def replay(
        cls, shape: ModelShape, events: Iterable[StateEvent], limits: Limits | None = None
    ) -> ServerState:
        """The state that these events lead to, from the first one a server ever handled."""
        state = cls(shape, limits, check=True)
        for event in events:
            state.handle(event)
        return state

    def check(self) -> None:
        """Assert every invariant; names the session and the numbers that differ."""
        held = [p for s in self.sessions.values() for table in s.tables for p in table]
        if self.slot is not None:
            held += self.slot.sources
            if self.slot.ended:
                held += [p for table in self.slot.session.tables for p in table]
        self.pool.check(held)
        self.residency.check(page for page in range(self.pool.num_pages) if self.pool.owners(page))
        assert self.copying or not self.arriving, "sessions wait for copies that nobody makes"
        assert self.copying or not self.settling, "requests wait for copies that nobody makes"
        self.scheduler.check()
        queued = self.scheduler.queued()
        in_engine = self.slot.session.id if self.slot and not self.slot.ended else None
        for session in self.sessions.values():
            session.check(self.shape)
            places = queued.count(session.id) + (session.id == in_engine)
            places += session.id in self.arriving
            lines = [s.id for s in self.sessions.values() if s.branch and s.parent == session.id]
            assert session.branch or sorted(session.tree.lines) == sorted(lines), "branches"
            assert places == (session.status == "running"), f"{session.id} is in {places} places"
        assert set(queued) <= set(self.sessions), "a session that is gone is queued"
        assert self.slot is not None or not queued, "the engine idles beside a runnable session"
        self.check_builders()
        self.check_leases()
        self.check_kept()
        self._check_slot()

    def _check_slot(self) -> None:
        slot = self.slot
        if slot is None:
            return
        session, shape = slot.session, self.shape
        assert slot.ended != (self.sessions.get(session.id) is session)
        assert (slot.forward, slot.start) == (session.forward, session.point)
        assert slot.start < slot.until <= shape.sampled, f"{session.id} is to run nowhere"
        layers = range(
            layers_executed(slot.start, shape.num_layers),
            layers_begun(slot.until, shape.num_layers),
        )
        for group in {layer // shape.layers_per_group for layer in layers}:
            table = session.tables[group]
            first = session.first_token // shape.page_tokens
            assert len(table) == shape.pages_for(session.end_token)
            assert all(self.pool.owners(page) == 1 for page in table[first:]), (
                f"{session.id} would write a page with two owners"
            )
