"""Sessions that outlive their server: what is recorded of them and when, and how they come back.

A session that came back from a journal, or whose lease ended (`leasing`), is *dormant*: all that
determines it is here, its pages and tensors are not. The first request that needs them is refused
with `NotRebuilt` and starts a hidden *builder*: a run of the same prompt from its start, with the
edits that were made in each forward, fed with the tokens that were drawn, one decode for each, and
without breakpoints. Where it arrives the session takes over its pages and tensors, and has moved
not at all. Which form a record has is decided in `record`; where records lie, by the server.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kernel_server.protocol import messages as m
from kernel_server.protocol.codec import rebuild_error
from kernel_server.protocol.errors import (
    BadMessage,
    BrokenJournal,
    DjinnError,
    NotRebuilt,
    ServerRestarted,
    WrongFingerprint,
    WrongModel,
)
from kernel_server.protocol.location import NOT_STARTED, layers_executed
from kernel_server.protocol.messages import ErrorInfo, error_info
from kernel_server.state.branches import Node, Replay, cut
from kernel_server.state.breakpoints import Breakpoints
from kernel_server.state.comparing import Comparing
from kernel_server.state.events import (
    DurabilityChanged,
    JournalRead,
    Requested,
    StretchAdvanced,
)
from kernel_server.state.instructions import DropTensors, ForkTensors, Publish, WriteJournal
from kernel_server.state.record import from_record, sizes_of, to_record
from kernel_server.state.sessions import Session
from kernel_server.state.stepping import Target
from kernel_server.state.tensor_bytes import forward_bytes, needed_at

#: A sampler that drew no forward: every token is taken as it was recorded.
_NEVER = 1 << 62


class Rebuilding(Comparing):
    """Records sessions, takes them up again, and computes them anew when they are needed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: builder -> the session, or hidden branch, that it computes
        self.builders: dict[str, str] = {}
        #: sessions of a journal that could not be taken up: their owners, and why
        self.unread: dict[str, tuple[str, ErrorInfo]] = {}
        #: sessions of which somebody waits until they are recorded, with the number of his wait
        self.awaited: dict[str, int] = {}

    # -- recording ------------------------------------------------------------------------------

    def write_journal(self) -> list[WriteJournal]:
        """What is to be made durable before anything of this event is told."""
        if not self.journal:
            self.changed.clear()
            self.advanced.clear()
            return []
        found = [self._write(session_id) for session_id in self.changed]
        for session_id in self.changed:
            self.advanced.pop(session_id, None)
        self.changed.clear()
        return found

    def record_advanced(self) -> None:
        """Record those that only ran since the last time, too."""
        self.changed |= self.advanced

    def _write(self, session_id: str) -> WriteJournal:
        session, ticket = self.sessions.get(session_id), self.awaited.pop(session_id, None)
        if session is None:
            return WriteJournal(session_id=session_id, number=self.num_made, record=None)
        record, arrays = to_record(session, self.sessions, self.shape)
        return WriteJournal(
            session_id=session_id,
            number=self.num_made,
            record=record,
            arrays=arrays,
            ticket=ticket,
        )

    def durability_changed(self, event: DurabilityChanged) -> None:
        """Tell every owner whether what they do survives the server."""
        owners = {session.owner for session in self.sessions.values()} | set(self.event_seq)
        for owner in sorted(owners):
            seq = self.event_seq[owner] = self.event_seq.get(owner, 0) + 1
            told = m.Event(seq=seq, kind="durability", session_id="", text=event.text)
            self.emit(Publish(owner=owner, event=told))

    # -- coming back ----------------------------------------------------------------------------

    def journal_read(self, event: JournalRead) -> None:
        """Take up the sessions of an earlier server. One that cannot be read is left alone."""
        self.now = max(self.now, event.now)
        self.num_made = max(self.num_made, event.number)
        for session_id, (owner, lacks) in event.unreadable.items():
            self._leave_unread(session_id, owner, BrokenJournal(lacks))
        for record, arrays in event.sessions:
            try:
                session, lines = from_record(record, arrays, self.shape)
                self._stand_again(session)
                for one in (session, *lines.values()):
                    one.check(self.shape)
            except (BadMessage, AssertionError) as error:
                alike = record.sizes == sizes_of(self.shape)
                kind = BrokenJournal if alike else WrongModel
                self._leave_unread(record.id, record.owner, kind(str(error)))
                continue
            self.sessions[session.id] = session
            self.sessions.update(lines)
            session.touched = self.now
            session.refused = self._refusal(session, session.id in event.damaged)
            self.note(session, "JournalRead", session.place(self.shape.num_layers))
            self.publish(session, "launched")

    def own(self, owner: str, session_id: str) -> Session:
        whose, error = self.unread.get(session_id, (None, None))
        if error is not None and whose == owner:
            raise rebuild_error(error)
        return super().own(owner, session_id)

    def _leave_unread(self, session_id: str, owner: str, error: DjinnError) -> None:
        told = type(error)(f"session {session_id} of the journal cannot be taken up here: {error}")
        self.unread[session_id] = owner, error_info(told)

    def _stand_again(self, session: Session) -> None:
        """Let one that was running rest where its record leaves it."""
        if session.status != "running":
            return
        tree, cursor = session.tree, (session.forward, session.point)
        session.applied = cut(session.applied, cursor)
        here = tree.here
        if here.cursor == cursor:
            # it had been told to go on, and had not yet gone
            session.status, session.stop = here.status, here.stop
            if session.stop is not None:
                session.stop = replace(session.stop, number=session.stop_number)
            session.finish_reason, session.error = here.finish_reason, here.error
            return
        session.ran_from = session.stop_number
        session.stop_number += 1
        session.error = error_info(
            ServerRestarted(
                f"the server ended while session {session.id} ran; it stands before forward"
                f" {session.forward} again, and continue_() goes on from there, bit for bit"
            )
        )
        if session.point == NOT_STARTED:
            session.status = "waiting"
        else:
            session.status, session.error = "stopped", None
            session.stop = m.StopInfo(
                number=session.stop_number,
                reason="pause",
                location=self.location(session.point),
                forward=session.forward,
                first_token=session.first_token,
                end_token=session.end_token,
                layers_executed=layers_executed(session.point, self.shape.num_layers),
            )
        if cursor == (0, NOT_STARTED):
            session.stop_number, session.ran_from = session.stop_number - 1, None
            return
        tree.add(
            Node(
                number=session.stop_number,
                parent=tree.current,
                status=session.status,
                cursor=cursor,
                layers_replayed=session.layers_replayed,
                stop=session.stop,
                error=session.error,
            )
        )

    def _refusal(self, session: Session, damaged: bool) -> str | None:
        """Why it may not go on here, unless that is accepted."""
        if damaged:
            return (
                "its journal was damaged, so this may be an older state of it than you saw:"
                f" attach({session.id!r}, inexact=True) goes on from here"
            )
        then, now = session.fingerprint, self.fingerprint
        unlike = [k for k in {**then, **now} if then.get(k) != now.get(k)]
        if not unlike:
            return None
        told = ", ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in unlike[:4])
        more = f" and {len(unlike) - 4} more" if len(unlike) > 4 else ""
        return (
            f"it was run under another execution fingerprint ({told}{more}), so it would not go on"
            f" bit for bit: start the server as it was, or attach({session.id!r}, inexact=True)"
        )

    def accept(self, event: Requested, request: m.Accept, session: Session) -> None:
        if session.refused is None:
            self.reply(event.request_id, m.SessionReply(session=self.info(session)))
            return
        session.refused, session.not_rebuilt = None, None
        session.inexact, session.fingerprint = True, self.fingerprint
        for line in session.tree.lines:
            self.sessions[line].inexact = True
        self.note(session, "Accept")
        self.publish(session, "changed")
        self.reply(event.request_id, m.SessionReply(session=self.info(session)))

    # -- computing again ------------------------------------------------------------------------

    def require_built(self, session: Session) -> None:
        if not session.dormant:
            return
        shown = self._shown(session)
        if shown.refused is not None:
            raise WrongFingerprint(f"session {shown.id}: {shown.refused}", session_id=shown.id)
        if session.not_rebuilt is not None:
            error, session.not_rebuilt = session.not_rebuilt, None
            raise rebuild_error(error)
        builder = next((b for b, target in self.builders.items() if target == session.id), None)
        if builder is None:
            self._build(session)
            done = 0
        else:
            done = self.sessions[builder].forward
        why = "rested on disk" if shown.lease_ended else "came back after a restart"
        raise NotRebuilt(
            f"session {shown.id} {why} and is computed again, forward {done} of {session.forward}:"
            " ask again when it is there",
            session_id=shown.id,
            forward=done,
            forwards=session.forward,
        )

    def _shown(self, session: Session) -> Session:
        """The session that people know, of one of its branches."""
        if not session.branch:
            return session
        assert session.parent is not None
        return self.sessions[session.parent]

    def _build(self, session: Session) -> None:
        """Begin to run a dormant session from its start to where it stands."""
        shape, goal = self.shape, (session.forward, session.point)
        pages = shape.num_groups * shape.pages_for(session.end_token)
        self.pool.require(pages, session.owner)
        need = max(forward_bytes(shape, len(session.prompt)), needed_at(shape, session, *goal))
        self.require_tensors(need, f"computing session {session.id} again")
        inexact = session.inexact
        replay = Replay(
            node=None,
            after=0,
            target=Target(*goal),
            applied=cut(session.applied, goal),
            tokens=tuple(session.tokens),
            known_until=None,
            reads=session.breakpoints.reads(*goal),
        )
        builder = Session(
            id=f"{session.id}!",
            owner=session.owner,
            name=f"builder of {session.name}"[: self.limits.name_length],
            parent=session.id,
            scratch=True,
            tokens=list(session.prompt),
            prompt=session.prompt,
            max_new_tokens=session.max_new_tokens,
            temperature=session.temperature,
            top_p=session.top_p,
            seed=session.seed,
            tables=[()] * shape.num_groups,
            touched=self.now,
            breakpoints=Breakpoints(),
            replay=replay,
            target=replay.target,
            inexact=inexact,
        )
        builder.tree.sampled_from = _NEVER if inexact else self._shown(session).tree.sampled_from
        self.sessions[builder.id] = builder
        self.builders[builder.id] = session.id
        self.note(self._shown(session), "rebuild", f"to forward {goal[0]}, point {goal[1]}")
        self.set_running(builder)

    def _arrived_builder(self, builder: Session) -> None:
        """Give what was computed to the session it was computed for."""
        session = self.sessions[self.builders.pop(builder.id)]
        assert session.dormant
        assert builder.tokens == session.tokens, f"{session.id} was rebuilt with other tokens"
        del self.sessions[builder.id]
        session.tables, builder.tables = builder.tables, [()] * self.shape.num_groups
        session.dormant = session.lease_ended = False
        only = session.branch
        self.emit(ForkTensors(parent_id=builder.id, child_id=session.id, history_only=only))
        self.emit(DropTensors(session_id=builder.id))
        self._story.end(builder.id)
        self.to_clean[session.id] = None
        self.keep_to_room()
        shown = self._shown(session)
        self.note(shown, "rebuilt")
        self.publish(shown, "changed")

    def _failed_builder(self, builder: Session, error: ErrorInfo) -> None:
        """It did not come where it was to go: the session stays as it is, and says why once."""
        session = self.sessions[self.builders[builder.id]]
        self._end_builder(builder)
        session.not_rebuilt = error
        shown = self._shown(session)
        self.note(shown, "not rebuilt", error.message)
        self.publish(shown, "changed")

    def _end_builder(self, builder: Session) -> None:
        del self.builders[builder.id]
        del self.sessions[builder.id]
        self.unqueue(builder)
        self._story.end(builder.id)
        if self.slot is not None and self.slot.session is builder:
            self.slot.ended = True
            self.interrupt()
        else:
            self.free(builder)

    def _abandon(self, session_id: str) -> None:
        """The session is gone: nobody needs it computed."""
        for builder_id in [b for b, target in self.builders.items() if target == session_id]:
            self._end_builder(self.sessions[builder_id])

    # -- what a builder comes to ----------------------------------------------------------------

    def _arrived(self, fork: Session) -> None:
        if fork.id in self.builders:
            self._arrived_builder(fork)
        else:
            super()._arrived(fork)

    def _give_up(self, fork: Session, error: ErrorInfo) -> None:
        if fork.id in self.builders:
            self._failed_builder(fork, error)
        else:
            super()._give_up(fork, error)

    def wait(self, session: Session, error: ErrorInfo | None) -> None:
        if session.id in self.builders and error is None:
            self._arrived_builder(session)
        else:
            super().wait(session, error)

    def finish(self, session: Session) -> None:
        if session.id in self.builders:
            self._arrived_builder(session)
        else:
            super().finish(session)

    def fail(self, session: Session, error: ErrorInfo) -> None:
        if session.id not in self.builders:
            self._abandon(session.id)
        super().fail(session, error)

    def terminate(self, event: Requested, request: m.Terminate, session: Session) -> None:
        self._abandon(session.id)
        super().terminate(event, request, session)

    def _free_line(self, line: Session) -> None:
        self._abandon(line.id)
        super()._free_line(line)

    def stretch_advanced(self, event: StretchAdvanced) -> None:
        if event.session_id in self.builders:
            self._tell_progress(self.sessions[event.session_id], event.point)
        else:
            super().stretch_advanced(event)

    def _drawn(self, session: Session, token: int) -> None:
        if session.id in self.builders:
            self._tell_progress(session, self.shape.sampled)
            self._note_difference(session, token)
        super()._drawn(session, token)

    def _note_difference(self, builder: Session, token: int) -> None:
        """What need not be exact may draw another token; the recorded one is taken."""
        replay, shown = builder.replay, self._shown(self.sessions[self.builders[builder.id]])
        if replay is None or shown.differs_from is not None or not builder.inexact:
            return
        drawn_here = builder.forward >= shown.tree.sampled_from
        if drawn_here and token != replay.tokens[len(builder.tokens)]:
            shown.differs_from = builder.forward

    def _tell_progress(self, builder: Session, point: float) -> None:
        """Tell whoever waits for the session how far it is computed again."""
        session = self.sessions[self.builders[builder.id]]
        done = layers_executed(point, self.shape.num_layers)
        self._tell_only(
            self._shown(session),
            done=builder.forward,
            total=session.forward,
            text=f"computing again: forward {builder.forward} of {session.forward},"
            f" {done} of {self.shape.num_layers} layers",
        )

    def _tell_only(self, session: Session, *, done: int, total: int, text: str) -> None:
        """Publish progress; it has not moved, so there is nothing to record."""
        self.publish(session, "progress", done=done, total=total, text=text)
        self.advanced.pop(session.id, None)

    def require_known(self, other_id: str, owner: str) -> None:
        """Refuse what is about another session too, while that one is dormant."""
        other = self.sessions.get(other_id)
        if other is not None and other.owner == owner and not other.scratch:
            other.touched, other.idled = self.now, False
            self.require_built(other)

    def check_builders(self) -> None:
        """Assert that each builder has a dormant session to build."""
        for builder, target in self.builders.items():
            assert builder in self.sessions and self.sessions[builder].status == "running"
            assert self.sessions[target].dormant, f"{target} is whole, and built"
        assert len(set(self.builders.values())) == len(self.builders)
