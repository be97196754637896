"""Scratch forks: copies of a stop that nobody sees, run to answer one question about it.

They publish nothing, have no breakpoints and draw no token. One that starts at the stop shows what
would follow (a preview, with edits and without); one that starts at the beginning of the forward
shows what was on the way (attention, any site), with the edits that were made on the way made
again. When all forks of a question have arrived the engine answers it and forgets them. What is
computed from the values they caught is the engine's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadArgument,
    BadEdit,
    BadSelector,
    DjinnError,
    NotSupported,
    QuotaExceeded,
)
from kernel_server.protocol.location import (
    EMBEDDING,
    NOT_STARTED,
    Point,
    final_norm_point,
    inner_point,
)
from kernel_server.protocol.messages import ErrorInfo, ErrorReply, Reason
from kernel_server.state.breakpoints import Breakpoints
from kernel_server.state.edit_rules import make_edit
from kernel_server.state.editing import Editing
from kernel_server.state.edits import at_stop
from kernel_server.state.events import EditsApplied, EditsFailed, Requested
from kernel_server.state.instructions import (
    ApplyEdits,
    Captures,
    Compared,
    DropTensors,
    ForkTensors,
    ReadTensors,
)
from kernel_server.state.selectors import TokenSelector, count_heads, resolve_elements
from kernel_server.state.sessions import Session
from kernel_server.state.stepping import Target
from kernel_server.state.tensor_bytes import standing_bytes

#: Most rows of the residual stream that one lens map puts through the model's head (the engine does
#: nothing else meanwhile), and most tokens it names.
MAX_LENS_CELLS, MAX_LENS_ENTRIES = 4096, 1 << 16


@dataclass(slots=True, kw_only=True)
class Question:
    """What is to be answered once the forks have arrived."""

    request_id: int
    owner: str
    message: Any
    forward: int
    first_token: int
    #: how far the forks run
    until: Point
    #: the forks in the order the engine is to see them
    forks: tuple[str, ...] = ()
    under_way: set[str] = field(default_factory=set)
    rows: tuple[int, ...] | None = None
    elements: tuple[int, ...] | None = None
    #: heads among the elements
    heads: int | None = None
    #: the previewed edits, and what each changed, by id
    edit_ids: tuple[int, ...] = ()
    changed: dict[int, int] = field(default_factory=dict)
    #: of a comparison
    compared: Compared | None = None


class Scratching(Editing):
    """Previews, and looks at what is not kept."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: by scratch fork
        self.questions: dict[str, Question] = {}
        self._num_forks = 0

    # -- questions ------------------------------------------------------------------------------

    def preview(self, event: Requested, request: m.Preview, session: Session) -> None:
        self.require_stop(session, request.seen)
        self._check_top_k(request.top_k)
        if not request.edits:
            raise BadEdit("a preview needs at least one edit")
        before = self._fork(session)
        after = self._fork(session)
        for spec in request.edits:
            edit = make_edit(
                spec,
                self.shape,
                session.standing(),
                edit_id=after.edits.next_id,
                stop_number=session.stop_number,
            )
            after.edits.add(edit)
        question = self._ask(event, session, self.shape.logits, before, after)
        new = len(request.edits)
        question.edit_ids = tuple(range(after.edits.next_id - new, after.edits.next_id))
        self._run(before)
        here = at_stop(after.edits, session.standing(), self.shape.logits)
        if not here:
            self._run(after)
            return
        stand = session.standing()
        self.emit(
            ApplyEdits(
                request_id=event.request_id,
                session_id=after.id,
                edits=tuple(
                    found.plan(where, stand.first, stand.end, found.point == self.shape.logits)
                    for found, where in here
                ),
            )
        )

    def read_attention(self, event: Requested, request: m.ReadAttention, session: Session) -> None:
        self.require_stop(session, request.seen)
        self._check_layer(request.layer)
        site = f"layers.{request.layer}.attention.pattern"
        point = self.shape.point(site)
        layout = self.shape.layout(point, session.end_token)
        elements = resolve_elements(request.heads, m.ALL, layout)
        rows = self._rows_fed(session, request.tokens, point)
        question = self._catch(event, session, (point,), "tensor", rows, elements)
        question.heads = count_heads(request.heads, layout)

    def read_attribution(
        self, event: Requested, request: m.ReadAttribution, session: Session
    ) -> None:
        self.require_stop(session, request.seen)
        shape = self.shape
        token = request.token_id
        if token is not None and not 0 <= token < shape.vocab_size:
            raise BadArgument(
                f"token id {token} lies outside the vocabulary, 0 to {shape.vocab_size - 1}"
            )
        points: list[Point] = [EMBEDDING]
        for layer in range(shape.num_layers):
            have = {layout.site for layout in shape.inner_sites(layer)}
            if "attention.heads" in have:
                points.append(inner_point(layer, "attention.heads"))
            points += [
                shape.point(f"layers.{layer}.{site}") for site in ("attention.output", "mlp.output")
            ]
        norm = final_norm_point(shape.num_layers)
        points += [shape.num_layers, norm, shape.logits]
        last = session.end_token - session.first_token - 1
        self._catch(event, session, tuple(points), "tensor", (last,), None)

    def read_sites(self, event: Requested, request: m.ReadSites, session: Session) -> None:
        self.require_stop(session, request.seen)
        if not request.locations:
            raise BadArgument("name at least one location to capture")
        points = tuple(map(self.shape.point, request.locations))
        if len(set(points)) < len(points):
            raise BadArgument("a location is listed twice: list each once")
        rows = self._rows_fed(session, request.tokens, max(points))
        self._check_size(session, points, rows, request.what)
        self._catch(event, session, tuple(sorted(points)), request.what, rows, None)

    def read_lens_map(self, event: Requested, request: m.ReadLensMap, session: Session) -> None:
        self.require_stop(session, request.seen)
        self._check_top_k(request.top_k)
        if not request.locations:
            raise BadArgument("name at least one location to read the lens at")
        points = tuple(map(self.shape.point, request.locations))
        if len(set(points)) < len(points):
            raise BadArgument("a location is listed twice: list each once")
        for point in points:
            self._check_residual(point)
            if point == self.shape.logits:
                raise NotSupported(
                    "a lens map is of the residual stream, and the logits are none: leave them out,"
                    " or read them with stop.lens() there"
                )
        rows = self._rows_fed(session, request.tokens, max(points))
        count = session.end_token - session.first_token if rows is None else len(rows)
        self._check_cells(len(points), count, request.top_k)
        self._check_size(session, points, rows, "tensor")
        self._catch(event, session, tuple(sorted(points)), "tensor", rows, None)

    def _check_cells(self, num_points: int, num_tokens: int, top_k: int) -> None:
        """Refuse more than goes through the head, or travels, at a time."""
        cells = num_points * num_tokens
        for count, most, what in (
            (cells, MAX_LENS_CELLS, "cells"),
            (cells * top_k, MAX_LENS_ENTRIES, f"entries, {top_k} for each cell"),
        ):
            if count > most:
                raise QuotaExceeded(
                    f"the lens of {num_tokens} tokens at {num_points} locations is {count:,}"
                    f" {what}, the limit is {most:,}: choose fewer tokens or locations, or a"
                    " smaller top_k",
                    needed=count,
                    limit=most,
                )

    def read_router(self, event: Requested, request: m.ReadRouter, session: Session) -> None:
        self.require_stop(session, request.seen)
        self._check_layer(request.layer)
        self._catch(event, session, (request.layer,), "router", None, None, until=request.layer + 1)

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.shape.num_layers:
            raise BadArgument(
                f"layer {layer}: the model has layers 0 to {self.shape.num_layers - 1}"
            )

    def _check_size(
        self,
        session: Session,
        points: tuple[Point, ...],
        rows: tuple[int, ...] | None,
        what: str,
    ) -> None:
        if what != "tensor":
            return
        count = session.end_token - session.first_token if rows is None else len(rows)
        total = 0
        for point in points:
            heads, width = self.shape.layout(point, session.end_token)
            total += 4 * (heads or 1) * width * (1 if point == self.shape.logits else count)
        if total > (most := self.limits.captured_bytes):
            raise QuotaExceeded(
                f"{len(points)} locations of {count} tokens are about {total:,} bytes, the limit of"
                f" one capture is {most:,}: choose fewer tokens or locations, or 'summary'",
                needed=total,
                limit=most,
            )

    def _rows_fed(
        self, session: Session, selector: m.Selector, point: Point
    ) -> tuple[int, ...] | None:
        """Rows of this forward that the selector means, None for all of them."""
        stand = session.standing()
        tokens = TokenSelector(selector, stand.num_prompt_tokens)
        tokens.check_once(stand.end, stand.end)
        if tokens.kind == "all":
            return None
        found = tokens.positions(stand.tokens, stand.first, stand.end)
        if not found or (tokens.kind == "indices" and len(found) < len(selector.indices)):
            raise BadSelector(
                f"forward {stand.forward} feeds tokens {stand.first} to {stand.end - 1}, and"
                f" {tokens} selects others"
            )
        if point == self.shape.logits and stand.end - 1 not in found:
            raise BadSelector(
                f"logits are kept for the last token only: select token {stand.end - 1} (-1) too"
            )
        return tuple(position - stand.first for position in found)

    # -- forks ----------------------------------------------------------------------------------

    def _catch(
        self,
        event: Requested,
        session: Session,
        points: tuple[Point, ...],
        what: Any,
        rows: tuple[int, ...] | None,
        elements: tuple[int, ...] | None,
        until: Point | None = None,
    ) -> Question:
        """Run this forward again from its start, and catch the values at `points`."""
        fork = self._fork(session, from_start=True)
        fork.captures = Captures(points=points, what=what, rows=rows, elements=elements)
        question = self._ask(event, session, points[-1] if until is None else until, fork)
        question.rows, question.elements = rows, elements
        self._run(fork)
        return question

    def _fork(self, parent: Session, *, from_start: bool = False) -> Session:
        """A copy that is in no list; from the start of the forward, or from the stop."""
        mine = sum(question.owner == parent.owner for question in self.questions.values())
        if mine >= (most := self.limits.scratch_per_owner):
            raise QuotaExceeded(
                f"{mine} scratch forks of yours are running, the limit is {most}: wait for their"
                " answers",
                have=mine,
                limit=most,
            )
        tables = list(parent.tables)
        if from_start:
            kept = self.shape.pages_for(parent.first_token)
            tables = [table[:kept] for table in tables]
        return Session(
            id="",  # named when it is entered
            owner=parent.owner,
            name=f"scratch fork of {parent.name}",
            parent=parent.id,
            scratch=True,
            tokens=list(parent.tokens),
            prompt=parent.prompt,
            max_new_tokens=parent.max_new_tokens,
            temperature=parent.temperature,
            top_p=parent.top_p,
            seed=parent.seed,
            tables=tables,
            status="waiting" if from_start else "stopped",
            forward=parent.forward,
            point=NOT_STARTED if from_start else parent.point,
            stop_number=parent.stop_number,
            stop=None if from_start else parent.stop,
            breakpoints=Breakpoints(),
            edits=parent.edits.copy(),
        )

    def _ask(
        self,
        event: Requested,
        parent: Session,
        until: Point,
        *forks: Session,
        pages: int | None = None,
    ) -> Question:
        """Enter forks that were made, or refuse for want of pages and change nothing.

        pages: how many all of them take; None: each what it writes on its way to `until`.
        """
        for fork in forks:
            for table in fork.tables:
                self.pool.retain(table)
        try:
            if pages is not None:
                self.pool.require(pages, parent.owner)
            for fork in forks if pages is None else ():
                self.pool.require(self.writes(fork, until).num_pages, parent.owner)
            need = sum(standing_bytes(self.shape, fork) for fork in forks)
            self.require_tensors(need, f"what is asked about {parent.id}")
        except DjinnError:
            for fork in forks:
                for table in fork.tables:
                    self.pool.release(table)  # all are the parent's too: none becomes free
            raise
        for fork in forks:
            self._num_forks += 1
            assert fork.parent is not None
            fork.id = f"{fork.parent}~{self._num_forks}"
            self.sessions[fork.id] = fork
            self.emit(ForkTensors(parent_id=fork.parent, child_id=fork.id))
        question = Question(
            request_id=event.request_id,
            owner=parent.owner,
            message=event.message,
            forward=parent.forward,
            first_token=parent.first_token,
            until=until,
            forks=tuple(fork.id for fork in forks),
            under_way={fork.id for fork in forks},
        )
        for fork in forks:
            self.questions[fork.id] = question
        self.note(parent, "scratch", ", ".join(question.forks))
        self.keep_to_room()
        return question

    def _run(self, fork: Session) -> None:
        until = self.questions[fork.id].until
        if fork.point == until:
            self._arrived(fork)
            return
        fork.target = Target(fork.forward, until)
        self.set_running(fork)

    # -- what comes of them ---------------------------------------------------------------------

    def edits_applied(self, event: EditsApplied) -> None:
        if event.session_id not in self.sessions:
            return  # a fork that was given up meanwhile
        question = self.questions.get(event.session_id)
        if question is None:
            super().edits_applied(event)
            return
        fork = self.sessions[event.session_id]
        for result in event.results:
            question.changed[result.edit_id] = result.elements_changed
        self._run(fork)

    def edits_failed(self, event: EditsFailed) -> None:
        if event.session_id in self.questions:
            self._give_up(self.sessions[event.session_id], event.error)
        elif event.session_id in self.sessions:
            super().edits_failed(event)

    def stop(
        self,
        session: Session,
        reason: Reason,
        *,
        hit_tokens: tuple[int, ...] = (),
        hit_breakpoints: tuple[int, ...] = (),
        error: ErrorInfo | None = None,
    ) -> None:
        if not session.scratch:
            super().stop(
                session,
                reason,
                hit_tokens=hit_tokens,
                hit_breakpoints=hit_breakpoints,
                error=error,
            )
        elif error is not None:
            self._give_up(session, error)
        else:
            self._arrived(session)

    def wait(self, session: Session, error: ErrorInfo | None) -> None:
        if session.scratch:
            assert error is not None, f"{session.id} waits for nothing"
            self._give_up(session, error)
        else:
            super().wait(session, error)

    def fail(self, session: Session, error: ErrorInfo) -> None:
        if session.scratch:
            self._give_up(session, error)
        else:
            super().fail(session, error)

    def _arrived(self, fork: Session) -> None:
        question = self.questions[fork.id]
        question.under_way.discard(fork.id)
        for edit in fork.edits:
            if edit.elements_changed is not None:
                question.changed.setdefault(edit.id, edit.elements_changed)
        self._leave(fork)
        if question.under_way:
            return
        self.emit(
            ReadTensors(
                request_id=question.request_id,
                session_id=question.forks[-1],
                message=question.message,
                rows=question.rows,
                channels=question.elements,
                first_token=question.first_token,
                forward=question.forward,
                owner=question.owner,
                heads=question.heads,
                beside=question.forks[:-1],
                changed=tuple(question.changed.get(i, 0) for i in question.edit_ids),
                compared=question.compared,
            )
        )
        self._forget(question)

    def _give_up(self, fork: Session, error: ErrorInfo) -> None:
        """One fork failed: the question is answered with why, and the others are ended."""
        question = self.questions[fork.id]
        self.reply(question.request_id, ErrorReply(error=error))
        for fork_id in list(question.under_way):
            other = self.sessions[fork_id]
            self.unqueue(other)
            if self.slot is not None and self.slot.session is other:
                self.slot.ended = True
                self.interrupt()
                del self.sessions[fork_id]
            else:
                self._leave(other)
        self._forget(question)

    def _leave(self, fork: Session) -> None:
        """Its pages are free; its tensors stay until the question is answered."""
        del self.sessions[fork.id]
        pages = [page for table in fork.tables for page in table]
        fork.tables = [()] * self.shape.num_groups
        self.release(pages)

    def _forget(self, question: Question) -> None:
        for fork_id in question.forks:
            del self.questions[fork_id]
            self._story.end(fork_id)
            if self.slot is None or self.slot.session.id != fork_id:
                self.emit(DropTensors(session_id=fork_id))
