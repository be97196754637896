"""Requests about edits, and those that read tensors.

At the stop an edit belongs to, the value is computed anew from its unedited tensor with all edits
that are left, so undoing is exact; the session's list changes when the engine has done it, and
requests about the session wait until then. Ahead of the stop, edits are only recorded. What an
edit must look like is decided in `edit_rules`.
"""

from __future__ import annotations

from typing import Literal

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadArgument,
    BadSelector,
    NotFinished,
    NotSupported,
    QuotaExceeded,
    SessionFailed,
    UndoRefused,
)
from kernel_server.protocol.location import (
    NOT_STARTED,
    RESIDUAL_SITES,
    Point,
    is_inner,
    layers_executed,
    site_of,
)
from kernel_server.state.control import Control
from kernel_server.state.edit_rules import make_edit
from kernel_server.state.edits import Edit, at_stop, positions_here
from kernel_server.state.events import EditsApplied, EditsFailed, Requested
from kernel_server.state.instructions import ApplyEdits, ReadTensors
from kernel_server.state.quotas import require_room
from kernel_server.state.selectors import TokenSelector, count_heads, resolve_elements
from kernel_server.state.sessions import PendingEdits, Session
from kernel_server.state.tensor_bytes import value_bytes

#: Most entries per row a lens answers.
MAX_TOP_K = 1000

#: Where an edit stands to its session: part of the stop, still to come in this forward, sticky and
#: at work in other forwards, or done with.
Place = Literal["here", "ahead", "later", "past"]


class Editing(Control):
    """Adding, switching, removing and undoing edits; reading tensors."""

    # -- edits --------------------------------------------------------------------------------

    def add_edit(self, event: Requested, request: m.AddEdit, session: Session) -> None:
        self.require_rest(session, request.seen)
        most = self.limits.edits_per_session
        if len(session.edits) >= most:
            raise QuotaExceeded(
                f"session {session.id} has {most} edits, the limit: remove one first",
                have=most,
                limit=most,
            )
        edit = make_edit(
            request.edit,
            self.shape,
            session.standing(),
            edit_id=session.edits.next_id,
            stop_number=session.stop_number,
        )
        self._check_edit_bytes(event.owner, edit)
        if self._place(session, edit) == "here":
            self._apply(event, session, "add", edit)
        else:
            session.edits.add(edit)
            self._edits_changed(event.request_id, session, edit)

    def _check_edit_bytes(self, owner: str, edit: Edit) -> None:
        """Refuse a value that does not fit beside those of the owner's other edits."""
        if edit.spec.value is None:
            return
        # forks hold the same arrays: each counts once
        held = {
            id(other.spec.value): other.spec.value.nbytes
            for session in self.sessions.values()
            if session.owner == owner
            for edits in session.edit_lists()
            for other in edits
            if other.spec.value is not None
        }
        require_room(
            "edits",
            sum(held.values()),
            edit.spec.value.nbytes,
            self.limits.edit_bytes_per_owner,
            "remove an edit or terminate a session",
        )

    def enable_edit(self, event: Requested, request: m.EnableEdit, session: Session) -> None:
        edit = session.edits.get(request.edit_id)
        place = self._place(session, edit)
        if edit.enabled == request.enabled:
            self._answer(event.request_id, session, edit)
        elif place == "past":
            raise self._too_late(session, edit, "on" if request.enabled else "off")
        elif place == "here":
            self._apply(event, session, "enable" if request.enabled else "disable", edit)
        else:
            session.edits.enable(edit, request.enabled)
            self._edits_changed(event.request_id, session, edit)

    def remove_edit(self, event: Requested, request: m.RemoveEdit, session: Session) -> None:
        self._remove(event, session, session.edits.get(request.edit_id))

    def undo_edit(self, event: Requested, request: m.UndoEdit, session: Session) -> None:
        self.require_rest(session, request.seen)
        made_here = [e for e in session.edits if e.made_at_stop == session.stop_number]
        if not made_here:
            raise UndoRefused(
                f"no edit was made at stop {session.stop_number} of session {session.id}; a sticky"
                " one can be removed by its id, and session.step_back() or session.rewind() returns"
                " to before another"
            )
        self._remove(event, session, made_here[-1])

    def _remove(self, event: Requested, session: Session, edit: Edit) -> None:
        place = self._place(session, edit)
        if place == "past" and (edit.forwards_matched or session.status == "running"):
            raise self._too_late(session, edit, "away")
        if place == "here" and edit.enabled:
            self._apply(event, session, "remove", edit)
        else:
            session.edits.remove(edit)
            self._edits_changed(event.request_id, session, None)

    def _place(self, session: Session, edit: Edit) -> Place:
        if session.status == "stopped" and positions_here(
            edit, session.standing(), self.shape.logits
        ):
            return "here"
        if edit.sticky:
            return "later"
        waits = session.status in ("waiting", "stopped") and edit.point > session.point
        return "ahead" if waits and edit.forward == session.forward else "past"

    def _too_late(self, session: Session, edit: Edit, where: str) -> UndoRefused:
        place = session.place(self.shape.num_layers)
        if session.status == "running" and edit.forward == session.forward:
            return UndoRefused(
                f"session {session.id} is running the forward of edit {edit.id}, so it cannot be"
                f" taken {where} exactly: pause it first"
                if where == "away"
                else f"session {session.id} is running the forward of edit {edit.id}, so it cannot"
                f" be switched {where} exactly: pause it first"
            )
        verb = "taken away" if where == "away" else f"switched {where}"
        return UndoRefused(
            f"edit {edit.id} belongs to {self.location(edit.point)} of forward {edit.forward}, and"
            f" session {session.id} is {place}: it cannot be {verb} exactly;"
            f" session.rewind({edit.forward}, {str(self.location(edit.point))!r}) goes back there"
        )

    def _apply(
        self,
        event: Requested,
        session: Session,
        action: Literal["add", "enable", "disable", "remove"],
        edit: Edit,
    ) -> None:
        """Ask the engine for the value with the edits as they would be after `action`."""
        stand = session.standing()
        logits = self.shape.logits
        if not any(made.point == stand.point for made, _ in session.applied.get(stand.forward, ())):
            # as it was before stays too
            more = value_bytes(self.shape, stand.point, stand.first, stand.end)
            self.require_tensors(more, f"an edit at {self.location(stand.point)}")
        remaining = [
            (found, positions)
            for found, positions in at_stop(session.edits, stand, logits)
            if found is not edit
        ]
        if action in ("add", "enable"):
            remaining.append((edit, edit.positions_in(stand, edit.point == logits)))
            remaining.sort(key=lambda entry: entry[0].id)
        session.pending = PendingEdits(
            event.request_id, action, edit, {found.id: where for found, where in remaining}
        )
        self.emit(
            ApplyEdits(
                request_id=event.request_id,
                session_id=session.id,
                edits=tuple(
                    found.plan(where, stand.first, stand.end, found.point == logits)
                    for found, where in remaining
                ),
            )
        )

    def edits_applied(self, event: EditsApplied) -> None:
        session, pending = self._pending(event.session_id, event.request_id)
        self.note(session, "EditsApplied", event)
        edit = pending.edit
        match pending.action:
            case "add":
                session.edits.add(edit)
            case "enable":
                session.edits.enable(edit, True)
            case "disable":
                session.edits.enable(edit, False)
                edit.taken_back()
            case "remove":
                session.edits.remove(edit)
        results = {result.edit_id: result for result in event.results}
        for found in session.edits:
            if found.id in pending.positions:
                found.passed(session.forward, pending.positions[found.id], results.get(found.id))
        shown = None if pending.action == "remove" else edit
        self._edits_changed(pending.request_id, session, shown)

    def edits_failed(self, event: EditsFailed) -> None:
        session, pending = self._pending(event.session_id, event.request_id)
        self.note(session, "EditsFailed", event)
        self.reply(pending.request_id, m.ErrorReply(error=event.error))

    def _pending(self, session_id: str, request_id: int) -> tuple[Session, PendingEdits]:
        session = self.sessions[session_id]
        pending = session.pending
        assert pending is not None and pending.request_id == request_id, (
            f"{session_id}: request {request_id} was answered, {pending} is pending"
        )
        session.pending = None
        return session, pending

    def _edits_changed(self, request_id: int, session: Session, edit: Edit | None) -> None:
        self.plan_anew(session)
        self.publish(session, "changed")
        self._answer(request_id, session, edit)

    def _answer(self, request_id: int, session: Session, edit: Edit | None) -> None:
        infos = session.edit_infos(self.shape.num_layers)
        shown = None if edit is None else next(i for i in infos if i.id == edit.id)
        self.reply(request_id, m.EditReply(edit=shown, edits=infos))

    # -- reading ------------------------------------------------------------------------------

    def read_value(self, event: Requested, request: m.ReadValue, session: Session) -> None:
        self.require_stop(session, request.seen)
        rows = self._rows(session, request.tokens)
        layout = self.shape.layout(session.point, session.end_token)
        channels = resolve_elements(request.heads, request.channels, layout)
        self._read(event, session, rows, channels, count_heads(request.heads, layout))

    def read_lens(self, event: Requested, request: m.ReadLens, session: Session) -> None:
        self.require_stop(session, request.seen)
        self._check_top_k(request.top_k)
        rows = None
        if request.layers is None and not request.every_layer:
            self._check_residual(session.point)
            rows = self._rows(session, request.tokens)
        if len(set(request.layers or ())) < len(request.layers or ()):
            raise BadArgument("a layer is listed twice: list each layer once")
        for layer in request.layers or ():
            self._check_layer_ran(session, layer)
        self._read(event, session, rows, None)

    def _check_top_k(self, top_k: int) -> None:
        most = min(self.shape.vocab_size, MAX_TOP_K)
        if not 1 <= top_k <= most:
            raise BadArgument(f"top_k is {top_k}: give 1 to {most}")

    def _check_residual(self, point: Point) -> None:
        """The lens reads what is as wide as the residual stream."""
        if is_inner(point) and site_of(point) not in RESIDUAL_SITES:
            raise NotSupported(
                f"the logit lens reads the residual stream, and {self.location(point)} is none: use"
                f" it at {', '.join(RESIDUAL_SITES)} or output",
                site=site_of(point),
            )

    def _check_layer_ran(self, session: Session, layer: int) -> None:
        if not -1 <= layer < self.shape.num_layers:
            raise BadArgument(
                f"layer {layer}: the model has layers 0 to {self.shape.num_layers - 1}, and -1 is"
                " the embedding"
            )
        ran = layers_executed(session.point, self.shape.num_layers)
        if layer >= ran:
            raise BadArgument(
                f"layer {layer} has not run in forward {session.forward}: the session stands at"
                f" {self.location(session.point)}; step there first"
            )

    def read_capture(self, event: Requested, request: m.ReadCapture, session: Session) -> None:
        self._refuse_failed(session)
        if request.seen is not None:
            self.require_stop(session, request.seen)
        if session.forward == 0 and session.point == NOT_STARTED:
            raise NotFinished(f"session {session.id} has run no layer yet: continue it first")
        self._read(event, session, None, None)

    def read_logits(self, event: Requested, request: m.ReadLogits, session: Session) -> None:
        self._refuse_failed(session)
        if not session.finished_forwards:
            raise NotFinished(
                f"session {session.id} has finished no forward yet: continue it first"
            )
        self._read(event, session, None, None)

    def _refuse_failed(self, session: Session) -> None:
        if session.status == "failed":
            why = f": {session.error.message}" if session.error else ""
            raise SessionFailed(f"session {session.id} failed and holds no tensors{why}")

    def _rows(self, session: Session, selector: m.Selector) -> tuple[int, ...] | None:
        """Rows of the tensor at the stop, None for all of them."""
        stand = session.standing()
        tokens = TokenSelector(selector, stand.num_prompt_tokens)
        tokens.check_once(stand.end, stand.end)
        if tokens.kind == "all":
            return None
        found = tokens.positions(stand.tokens, stand.first, stand.end)
        fed = f"forward {stand.forward} feeds tokens {stand.first} to {stand.end - 1}"
        if not found or (tokens.kind == "indices" and len(found) < len(selector.indices)):
            raise BadSelector(
                f"{fed}, and {tokens} selects others: what was fed earlier is no longer here"
            )
        if session.point == self.shape.logits:
            if found != (stand.end - 1,):
                raise BadSelector(
                    f"logits are kept for the last token only: select token {stand.end - 1} (-1)"
                )
            return None
        return tuple(position - stand.first for position in found)

    def _read(
        self,
        event: Requested,
        session: Session,
        rows: tuple[int, ...] | None,
        channels: tuple[int, ...] | None,
        heads: int | None = None,
    ) -> None:
        self.emit(
            ReadTensors(
                request_id=event.request_id,
                session_id=session.id,
                message=event.message,
                rows=rows,
                channels=channels,
                first_token=session.first_token,
                forward=session.forward,
                owner=session.owner,
                heads=heads,
            )
        )
