"""What the engine is given to do, and what follows from how it went.

One stretch is in the engine at a time, normally a whole forward; which session's, the scheduler
says. A stretch is cut short by an interrupt (pause, or others waiting beside a long prefill); a
session that was cut short goes on from where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping

from kernel_server.protocol.errors import DjinnError, OutOfPages, QuotaExceeded, SessionFailed
from kernel_server.protocol.location import (
    EMBEDDING,
    NOT_STARTED,
    Point,
    layer_of,
    layers_begun,
    layers_executed,
)
from kernel_server.protocol.messages import ErrorReply, Reason, error_info
from kernel_server.state.breakpoints import Breakpoint, Place, questions
from kernel_server.state.core import Slot
from kernel_server.state.edits import plans_beyond
from kernel_server.state.events import (
    EditResult,
    LogResult,
    StretchAdvanced,
    StretchDone,
    StretchFailed,
)
from kernel_server.state.holding import Holding
from kernel_server.state.instructions import DropLog, RunStretch
from kernel_server.state.pages import WritePlan, plan_writes
from kernel_server.state.sessions import MOVES, Session
from kernel_server.state.stepping import Target, furthest


class Running(Holding):
    """Gives stretches to the engine and takes their results."""

    # -- giving ---------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Give the engine the next stretch, if it has none and a session can run."""
        while self.slot is None:
            session_id = self.scheduler.next()
            if session_id is None:
                return
            session = self.sessions[session_id]
            try:
                self._begin(session)
            except (OutOfPages, QuotaExceeded, SessionFailed) as error:
                self._no_room(session, error)

    def until(self, session: Session, target: Target | None) -> Point:
        """How far the current forward may run without asking."""
        if session.replay is not None:
            return session.replay.until(session.forward, self.shape.sampled)
        return furthest(
            self.shape,
            session.forward,
            session.point,
            target,
            session.pausing,
            session.breakpoints.armed(session.forward == 0),
        )

    def writes(self, session: Session, until: Point) -> WritePlan:
        """The pages to be taken before the session may run to `until`."""
        num_layers = self.shape.num_layers
        return plan_writes(
            self.shape,
            self.pool,
            session.tables,
            (layers_executed(session.point, num_layers), layers_begun(until, num_layers)),
            (session.first_token, session.end_token),
        )

    def _begin(self, session: Session) -> None:
        """Take the pages of a stretch and give it to the engine, or raise and change nothing."""
        shape = self.shape
        until = self.until(session, session.target)
        plan = self.writes(session, until)
        if plan.num_pages:
            self.pool.require(plan.num_pages, session.owner)
        arrivals = self.bring(session, until, plan)
        if arrivals is None:
            return
        copies = self._take(session, plan)
        self.will_write(session, until)
        sources = tuple(source for source, _ in copies)
        slot = self.residency.device_slot
        prefill = session.forward == 0
        long = prefill and len(session.prompt) > 1
        if long and self.scheduler:
            until = min(until, self._slice_end(session))
        point = session.point
        armed: tuple[Place, ...] = ()
        edits = []
        reads: tuple[tuple[int, Point], ...] = ()
        if session.replay is not None:
            edits = session.replay.plans(session.forward, point)
            reads = session.replay.reads_in(session.forward, point, until)
        else:
            places = session.breakpoints.armed(prefill)
            armed = tuple(p for p in places if point < p.point <= until)
            if len(session.edits):
                edits = plans_beyond(session.edits, session.standing(), shape.logits)
        edits = [entry for entry in edits if entry[0].point <= until]
        first, end = session.first_token, session.end_token
        checks, logs = questions(armed, session.tokens, first, end)
        stretch = RunStretch(
            session_id=session.id,
            forward=session.forward,
            token_ids=session.fed,
            first_token=first,
            point=point,
            until=until,
            checks=checks,
            edits=tuple(
                edit.plan(positions, first, end, edit.point == shape.logits)
                for edit, positions in edits
                if positions
            ),
            tables=self.device_tables(session, self._groups(point, until)),
            copies=tuple((slot(source), slot(target)) for source, target in copies),
            sampling=session.sampling(),
            captures=session.captures,
            arrivals=arrivals,
            logs=logs,
            log_room_bytes=self.log_room(session.owner) if logs else 0,
            reads=reads,
        )
        self.slot = Slot(
            session=session,
            forward=session.forward,
            start=point,
            until=until,
            armed=armed,
            edits=edits,
            sources=sources,
            long=long,
            number=self.slots_begun,
        )
        self.slots_begun += 1
        self.emit(stretch)
        self.note(session, "RunStretch", (session.forward, point, until, copies))

    def _slice_end(self, session: Session) -> int:
        """How far a prefill may go before others have their turn."""
        chunks = -(-len(session.prompt) // self.shape.prefill_chunk)
        layers = max(1, self.limits.prefill_slice // chunks)
        return layer_of(max(session.point, EMBEDDING)) + layers

    def _take(self, session: Session, plan: WritePlan) -> list[tuple[int, int]]:
        """Take fresh pages into the session's tables; returns the (from, to) copies to make.

        The sources keep this owner until the engine has answered.
        """
        if not plan.num_pages:
            return []
        pages = self.pool.allocate(plan.num_pages, session.owner)
        self.residency.create_all(pages)
        pages.reverse()  # the first of a table in the lowest slot, as they will lie below
        copies = []
        for group, index in plan.shared:
            table = session.tables[group]
            page = pages.pop()
            copies.append((table[index], page))
            session.tables[group] = (*table[:index], page, *table[index + 1 :])
        for group, index in plan.fresh:
            assert len(session.tables[group]) == index
            session.tables[group] += (pages.pop(),)
        return copies

    def _no_room(self, session: Session, error: DjinnError) -> None:
        """A session that was to run finds no pages: it rests and can be continued later."""
        reason = error_info(error)
        if session.point == NOT_STARTED:
            self.wait(session, reason)
        else:
            self.stop(session, "exception", error=reason)

    # -- taking ---------------------------------------------------------------------------------

    def stretch_done(self, event: StretchDone) -> None:
        slot = self._answered(event.session_id, event.point)
        session = slot.session
        if slot.ended:
            self.free(session)
            return
        self.note(session, "StretchDone", event)
        stopping = self._arrive(slot, event.point, event.held, event.edits, event.layers_run)
        full = self._noted(session, event.logs)
        if event.point == self.shape.sampled:
            assert event.token is not None, "a forward was finished without a token"
            self._drawn(session, event.token)
        elif full:
            self._stop_for_room(session, full, stopping)
        elif stopping:
            self._stop_at_breakpoints(session, stopping, event)
        elif (
            session.target is not None
            and session.target.point == event.point
            and (session.target.forward == session.forward)
        ):
            self.stop(session, session.target.reason)
        elif session.pausing and event.point != NOT_STARTED:
            self.stop(session, "pause")
        else:
            # cut short for others, or a breakpoint that is to be ignored: then run on at once
            self.queue(session, first=event.point < slot.until and not slot.interrupted)

    def stretch_failed(self, event: StretchFailed) -> None:
        if event.fatal and (self.slot is None or self.slot.session.id != event.session_id):
            self._lost_outside(event)
            return
        slot = self._answered(event.session_id, None if event.fatal else event.point)
        session = slot.session
        if slot.ended:
            self.free(session)
            return
        self.note(session, "StretchFailed", event)
        if event.fatal:
            self.fail(session, event.error)
        else:
            # an edit that could not be applied is what failed
            edits_until = event.point - (event.error.code == "BadEdit")
            slot.edits = [entry for entry in slot.edits if entry[0].point <= edits_until]
            stopping = self._arrive(slot, event.point, {}, (), 0)
            self._noted(session, event.logs)
            if event.point == NOT_STARTED:
                self.wait(session, event.error)
            else:
                ids = tuple(b.id for b in stopping)
                self.stop(session, "exception", hit_breakpoints=ids, error=event.error)

    def _lost_outside(self, event: StretchFailed) -> None:
        """A fault was found while the session was not in the engine."""
        session = self.sessions.get(event.session_id)
        if session is None or (session.status, "failed") not in MOVES:
            return
        self.note(session, "StretchFailed", event)
        self.unqueue(session)
        if session.pending is not None:
            self.reply(session.pending.request_id, ErrorReply(error=event.error))
            session.pending = None
        self.fail(session, event.error)

    def _answered(self, session_id: str, point: Point | None) -> Slot:
        """Empty the engine's slot; an answer that does not belong to it is a fault."""
        slot = self.slot
        assert slot is not None, f"{session_id} answered, and nothing was asked"
        assert slot.session.id == session_id, f"{session_id} answered for {slot.session.id}"
        assert point is None or slot.start <= point <= slot.until, (
            f"{session_id} came to point {point} from {slot.start}, until {slot.until}"
        )
        self.slot = None
        self.release(slot.sources)
        return slot

    def _arrive(
        self,
        slot: Slot,
        point: Point,
        held: Mapping[int, tuple[int, ...]],
        results: tuple[EditResult, ...],
        layers_run: int,
    ) -> list[Breakpoint]:
        """Move the cursor and count what was passed; returns the breakpoints that stop here."""
        session = slot.session
        session.point = point
        if layers_run:
            num_layers = self.shape.num_layers
            new = layers_executed(point, num_layers) - layers_executed(slot.start, num_layers)
            session.layers_replayed += max(0, layers_run - new)
        if slot.edits:
            by_id = {result.edit_id: result for result in results}
            for edit, positions in slot.edits:
                if edit.point <= point and session.edits.has(edit):
                    edit.passed(slot.forward, positions, by_id.get(edit.id))
        if not slot.armed:
            return []
        return session.breakpoints.reached(slot.armed, slot.forward, (slot.start, point), held)

    def stretch_advanced(self, event: StretchAdvanced) -> None:
        """Tell whoever waits how far a long forward is; nothing is decided by it."""
        session = self.sessions.get(event.session_id)
        if session is None or session.status != "running":
            return
        num_layers = self.shape.num_layers
        done = layers_executed(event.point, num_layers)
        self.publish(
            session,
            "progress",
            done=session.finished_forwards,
            total=session.max_new_tokens,
            text=f"forward {session.forward}: {done} of {num_layers} layers",
        )

    def _stop_at_breakpoints(
        self, session: Session, stopping: list[Breakpoint], event: StretchDone
    ) -> None:
        everywhere = range(session.first_token, session.end_token)
        hit: set[int] = set()
        for found in stopping:
            hit.update(everywhere if found.condition is None else event.held[found.id])
        ids = tuple(found.id for found in stopping)
        watched = all(found.kind == "data breakpoint" for found in stopping)
        reason: Reason = "data breakpoint" if watched else "breakpoint"
        self.stop(session, reason, hit_tokens=tuple(sorted(hit)), hit_breakpoints=ids)

    def log_room(self, owner: str) -> int:
        """Bytes that logs of this owner may still take."""
        mine = (s for s in self.sessions.values() if s.owner == owner)
        held = sum(session.breakpoints.log_bytes() for session in mine)
        return max(0, self.limits.capture_bytes_per_owner - held)

    def _noted(self, session: Session, results: tuple[LogResult, ...]) -> list[LogResult]:
        """Count what logpoints have noted; returns those that found no room and are to stop."""
        if not results:
            return []
        before = session.breakpoints.num_dropped()
        gone, full = session.breakpoints.noted(results)
        for breakpoint_id in gone:
            self.emit(DropLog(session_id=session.id, breakpoint_id=breakpoint_id))
        if not before and session.breakpoints.num_dropped():
            self.publish(session, "changed")
        return full

    def _stop_for_room(
        self, session: Session, full: list[LogResult], stopping: list[Breakpoint]
    ) -> None:
        """A log that was to lose nothing has no room for its next record."""
        first = session.breakpoints.get(full[0].breakpoint_id)
        assert first.log is not None and full[0].refused_bytes is not None
        error = first.log.full(first.id, full[0].refused_bytes, self.limits.capture_bytes_per_owner)
        ids = {found.id for found in stopping} | {result.breakpoint_id for result in full}
        self.stop(session, "exception", hit_breakpoints=tuple(sorted(ids)), error=error_info(error))

    def _drawn(self, session: Session, token: int) -> None:
        """A token was drawn: the session is finished, or its next forward is queued."""
        session.draw(token)
        total = session.max_new_tokens
        self.publish(session, "progress", done=session.finished_forwards, total=total)
        if token in self.shape.eos_token_ids:
            session.finish_reason = "eos"
        elif session.finished_forwards >= total:
            session.finish_reason = "max_new_tokens"
        if session.finish_reason is not None:
            self.finish(session)
            return
        session.forward += 1
        session.point = NOT_STARTED
        session.layers_replayed = 0
        self.queue(session)
