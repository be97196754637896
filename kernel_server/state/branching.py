"""Going back: to a stop, to any place passed, to another branch; what is kept for it, and how long.

Wherever a session comes to rest is a node of its tree. Going back restores the tokens, the cursor,
the edits and the tensors of that place. Breakpoints and logs stay as they are. What lay ahead stays
reachable: unless another branch holds it already, the session's pages go to a new hidden branch,
from which the session's own are shared until it writes them. A node whose tensors were dropped, and
a place that is no node, are reached by running their forward again as it went: the same edits, no
breakpoints, the tokens that were drawn. The tree itself is kept in `branches`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadArgument,
    NotStopped,
    QuotaExceeded,
    SessionFailed,
    StaleStop,
)
from kernel_server.protocol.location import (
    NOT_STARTED,
    Point,
    layers_begun,
    layers_executed,
)
from kernel_server.protocol.messages import ErrorInfo, Reason, error_info
from kernel_server.state.branches import NO_EDITS, Cursor, Node, Replay, cut
from kernel_server.state.breakpoints import Breakpoint, Breakpoints
from kernel_server.state.core import Slot
from kernel_server.state.edits import Edit, Edits
from kernel_server.state.events import EditResult, EditsApplied, Requested
from kernel_server.state.instructions import ForkTensors, RestoreTensors
from kernel_server.state.pages import PageTable
from kernel_server.state.scratch import Scratching
from kernel_server.state.sessions import Session
from kernel_server.state.stepping import Target


class Branching(Scratching):
    """Step back, rewind, go to a node; list and prune them."""

    # -- requests -----------------------------------------------------------------------------

    def step_back(self, event: Requested, request: m.StepBack, session: Session) -> None:
        self._require_return(session, request.seen)
        before = list(session.tree.path(session.tree.current))[1:]
        node = next((node for node in before if node.status == "stopped"), None)
        if node is None:
            raise BadArgument(
                f"session {session.id} has no stop before this one: rewind(0, 'embedding') runs"
                " forward 0 again from its start"
            )
        self._return_to(event, session, node.cursor, node)

    def rewind(self, event: Requested, request: m.Rewind, session: Session) -> None:
        self._require_return(session, request.seen)
        point, forward = self.shape.point(request.location), request.forward
        here = session.tree.here.cursor
        if type(forward) is not int or not (0, NOT_STARTED) <= (forward, point) <= here:
            place = session.place(self.shape.num_layers)
            raise BadArgument(
                f"{self.location(point)} of forward {forward} has not been passed: the session is"
                f" {place}; run_to() goes ahead"
            )
        way = session.tree.path(session.tree.current)
        node = next((n for n in way if n.cursor == (forward, point) and n.stop is not None), None)
        self._return_to(event, session, (forward, point), node)

    def go_to(self, event: Requested, request: m.GoTo, session: Session) -> None:
        self._require_return(session, request.seen)
        node = session.tree.get(request.node)
        self._return_to(event, session, node.cursor, node)

    def list_branches(self, event: Requested, request: m.ListBranches, session: Session) -> None:
        self.reply(event.request_id, self._listed(session))

    def prune_branch(self, event: Requested, request: m.PruneBranch, session: Session) -> None:
        tree = session.tree
        top = tree.get(request.node)
        if top.number not in tree.away:
            raise BadArgument(
                f"session {session.id} has come by node {top.number}, so it cannot be pruned: go to"
                " a node beside it first"
            )
        if session.replay is not None:
            raise NotStopped(f"session {session.id} is on its way back: wait for it, or pause it")
        gone = tree.below(top.number)
        for number in gone:
            del tree.nodes[number], tree.away[number]
        self.drop_kept(session, gone)
        self._tidy(session)
        self.changed[session.id] = None
        self.reply(event.request_id, self._listed(session))

    def _listed(self, session: Session) -> m.Branches:
        tree, resting = session.tree, session.status != "running"
        nodes = tuple(
            m.NodeInfo(
                number=node.number,
                parent=node.parent,
                status=node.status,
                reason=None if node.stop is None else node.stop.reason,
                forward=node.cursor[0],
                location=None if node.stop is None else node.stop.location,
                num_tokens=self._num_tokens(session, node.cursor),
                num_edits=len(self._edits_at(session, node)),
                current=node.number == tree.current,
                kept=node.number in tree.kept or (resting and node.number == tree.current),
                branch=tree.away.get(node.number, ""),
            )
            for node in tree.nodes.values()
        )
        return m.Branches(session_id=session.id, nodes=nodes, num_forgotten=tree.num_forgotten)

    def _edits_at(self, session: Session, node: Node) -> Edits:
        return session.edits if node.edits is None else node.edits

    def _require_return(self, session: Session, seen: int) -> None:
        """Refuse unless the session rests, also finished, where the caller saw it."""
        if session.status == "finished" and seen == session.stop_number:
            return
        if session.status == "finished":
            raise StaleStop(
                f"session {session.id} has moved on, it is finished: look at it again, then repeat",
                seen=seen,
                stop_number=session.stop_number,
            )
        self.require_rest(session, seen)

    # -- going back ---------------------------------------------------------------------------

    def _return_to(
        self, event: Requested, session: Session, place: Cursor, node: Node | None
    ) -> None:
        """Stand at a node again, at once or by running to it; `node` None: at a place passed."""
        tree = session.tree
        if node is not None and node.number == tree.current:
            self.reply(event.request_id, m.SessionReply(session=self.info(session)))
            return
        self.require_built(session if node is None else self._host(session, node))
        way = list(tree.path(tree.current if node is None else node.number))
        base = self._base(session, way, place, node)
        start = base.cursor if base is not None else (max(place[0] - 1, 0), NOT_STARTED)
        anchor = base or next(n for n in way if n.cursor <= start)
        self._require_room(session, start, place, anchor)
        self.require_place(session, start[0], place)
        self._keep_stop(session)
        host = session if node is None else self._host(session, node)
        known = next(n for n in way if n.cursor <= place)
        replay, reads = None, session.breakpoints.come_back(*place)
        if start != place:
            target = Target(*place, "step")
            replay = Replay(
                node=None if node is None else node.number,
                after=known.number,
                target=target,
                applied=dict(host.applied),
                tokens=tuple(host.tokens),
                known_until=known.cursor if node is None else None,
                reads=reads,
            )
        self._switch(session, host, start, anchor, base)
        session.layers_replayed = anchor.layers_replayed if base is not None else 0
        if replay is None:
            assert node is not None
            self._stand(session, node)
        else:
            self._restore_edits(session, known, session.stop_number)
            session.finish_reason = None
            session.replay, session.target = replay, replay.target
            self.set_running(session)
            self.publish(session, "continued")
        self._drop_oldest(session)
        self.reply(event.request_id, m.SessionReply(session=self.info(session)))

    def _base(
        self, session: Session, way: list[Node], place: Cursor, node: Node | None
    ) -> Node | None:
        """The nearest node before the place from which it can be run to: its tensors are kept.

        From the forward before, too, since its logits belong to the place; None: from the start of
        that forward.
        """
        for found in way:
            if found.cursor > place or (found.cursor == place and found is not node):
                continue
            if found.cursor[0] < place[0] - 1:
                return None
            if found.number in session.tree.kept:
                return found
            if found.number == session.tree.current and self.can_keep(session):
                return found
        return None

    def _require_room(self, session: Session, start: Cursor, place: Cursor, anchor: Node) -> None:
        """Refuse what would not fit: pages to be written again, one more branch."""
        tree, shape = session.tree, self.shape
        if start != place:
            first = self._first_token(session, start[0]) // shape.page_tokens
            pages = shape.pages_for(len(session.prompt) + place[0]) - first
            self.pool.require(pages * shape.num_groups, session.owner)
        way = {node.number for node in tree.path(anchor.number)}
        most = self.limits.branches_per_session
        if set(tree.own()) <= way or tree.heir() is not None or len(tree.lines) < most:
            return
        raise QuotaExceeded(
            f"session {session.id} has {len(tree.lines)} branches, the limit is {most}: prune one"
            " first",
            have=len(tree.lines),
            limit=most,
        )

    def _switch(
        self, session: Session, host: Session, start: Cursor, anchor: Node, base: Node | None
    ) -> None:
        """Take the pages, tokens and edits made up to `start` from a line; leave one's own."""
        tree = session.tree
        tables = self._cut_tables(session, host.tables, start)
        for table in tables:
            self.pool.retain(table)
        tokens = host.tokens[: self._num_tokens(session, start)]
        applied = cut(host.applied, start)
        way = {node.number for node in tree.path(anchor.number)}
        leaving = [number for number in tree.own() if number not in way]
        left = session.tables
        if leaving:
            heir = tree.heir()
            if heir is None:
                heir = self._make_line(session, tree.here)
                for table in session.tables:
                    self.pool.retain(table)
            tree.away.update(dict.fromkeys(leaving, heir))
        # after the new branch has taken what it needs, before the other one goes
        self.emit(
            RestoreTensors(
                session_id=session.id,
                source_id=host.id,
                node=None if base is None else base.number,
                forward=start[0],
            )
        )
        session.tables = tables
        self.release([page for table in left for page in table])
        for number in way:
            tree.away.pop(number, None)
        tree.current = anchor.number
        session.tokens, session.applied = tokens, applied
        session.forward, session.point = start
        self._tidy(session)

    def _make_line(self, session: Session, tip: Node) -> str:
        """A hidden branch that ends at a node at which the session stands; its pages are owned by
        the caller's leave."""
        assert tip.edits is not None
        tree = session.tree
        tree.lines_made += 1
        line = Session(
            id=f"{session.id}/{tree.lines_made}",
            owner=session.owner,
            name=f"branch of {session.name}"[: self.limits.name_length],
            parent=session.id,
            scratch=True,
            branch=True,
            tokens=list(session.tokens),
            prompt=session.prompt,
            max_new_tokens=session.max_new_tokens,
            temperature=session.temperature,
            top_p=session.top_p,
            seed=session.seed,
            tables=list(session.tables),
            touched=session.touched,
            breakpoints=Breakpoints(),
            applied=dict(session.applied),
            inexact=session.inexact,
        )
        self._end_at(line, tip)
        self.sessions[line.id] = line
        tree.lines[line.id] = tip.number
        self.to_clean[line.id] = None
        self.emit(ForkTensors(parent_id=session.id, child_id=line.id, history_only=True))
        return line.id

    def _end_at(self, line: Session, tip: Node) -> None:
        """Let a branch end at a node."""
        line.status = tip.status
        line.forward, line.point = tip.cursor
        line.stop, line.stop_number = tip.stop, tip.number
        line.finish_reason, line.error = tip.finish_reason, tip.error
        line.edits = (tip.edits or NO_EDITS).copy()

    def _tidy(self, session: Session) -> None:
        """Free branches that hold no node, and what others hold beyond their last one."""
        tree = session.tree
        for line_id in list(tree.lines):
            held = [n for n, where in tree.away.items() if where == line_id]
            line = self.sessions[line_id]
            if not held:
                del tree.lines[line_id]
                self._free_line(line)
                continue
            tip = tree.nodes[max(held, key=lambda n: (tree.nodes[n].cursor, n))]
            if tree.lines[line_id] == tip.number:
                continue
            tree.lines[line_id] = tip.number
            tables = self._cut_tables(session, line.tables, tip.cursor)
            pairs = zip(line.tables, tables, strict=True)
            beyond = [page for old, new in pairs for page in old[len(new) :]]
            line.tables = tables
            self.release(beyond)
            line.tokens = line.tokens[: self._num_tokens(session, tip.cursor)]
            line.applied = cut(line.applied, tip.cursor)
            self._end_at(line, tip)

    def _free_line(self, line: Session) -> None:
        del self.sessions[line.id]
        self.settling.pop(line.id, None)
        self.free(line)

    def _cut_tables(
        self, session: Session, tables: list[PageTable], cursor: Cursor
    ) -> list[PageTable]:
        """The page tables of a session that stands at `cursor`."""
        shape, (forward, point) = self.shape, cursor
        begun = shape.groups_begun(layers_begun(point, shape.num_layers))
        end, first = len(session.prompt) + forward, self._first_token(session, forward)
        return [
            table[: shape.pages_for(end if group < begun else first)]
            for group, table in enumerate(tables)
        ]

    def _first_token(self, session: Session, forward: int) -> int:
        return 0 if forward == 0 else len(session.prompt) + forward - 1

    def _num_tokens(self, session: Session, cursor: Cursor) -> int:
        return len(session.prompt) + cursor[0] + (cursor[1] == self.shape.sampled)

    def _host(self, session: Session, node: Node) -> Session:
        """The line that holds a node."""
        line = session.tree.away.get(node.number)
        return session if line is None else self.sessions[line]

    # -- standing -----------------------------------------------------------------------------

    def _stand(self, session: Session, node: Node) -> None:
        """Be at rest at a node again: its number is new, so that older calls are refused."""
        tree = session.tree
        tree.current = node.number
        session.stop_number += 1
        self._restore_edits(session, node, session.stop_number)
        session.status = node.status
        session.layers_replayed = node.layers_replayed
        session.finish_reason, session.error = node.finish_reason, node.error
        session.stop = node.stop and replace(node.stop, number=session.stop_number)
        self.to_clean[session.id] = None
        self.note(session, "returned", f"to node {node.number}")
        self.publish(session, "finished" if node.status == "finished" else "stopped")

    def _restore_edits(self, session: Session, node: Node, stop_number: int) -> None:
        """The edits as they were when the node was left; those made there can be undone there."""
        assert node.edits is not None
        next_id = session.edits.next_id
        session.edits = node.edits.copy()
        session.edits.next_id = max(next_id, session.edits.next_id)
        for edit in session.edits:
            if edit.made_at_stop == node.left_at:
                edit.made_at_stop = stop_number

    def _keep_stop(self, session: Session) -> None:
        """Keep what the session holds where it stands, before it goes."""
        tree = session.tree
        node = tree.here
        if node.edits is None:
            edits = session.edits.copy() if len(session.edits) else NO_EDITS
            tree.nodes[node.number] = replace(node, edits=edits, left_at=session.stop_number)
        self.keep_stop(session, node.number)

    def _drop_oldest(self, session: Session) -> None:
        """Let the nodes left longest ago lose their tensors, where too much is kept."""
        tree, limits = session.tree, self.limits
        count, size = len(tree.kept), 0
        if self.kept_bytes > limits.kept_bytes_per_session:  # else all sessions together keep less
            size = sum(kept.nbytes for kept in tree.kept.values())
        gone = set()
        for number, kept in tree.kept.items():
            if count <= limits.kept_stops_per_session and size <= limits.kept_bytes_per_session:
                break
            gone.add(number)
            count, size = count - 1, size - kept.nbytes
        self.drop_kept(session, gone)
        self.keep_to_room()

    def _forget_oldest(self, session: Session) -> None:
        """List no more nodes than the limit; the places of the others can still be rewound to."""
        tree = session.tree
        while len(tree.nodes) > self.limits.nodes_per_session:
            ends = {0, tree.current, *tree.lines.values()}
            number = next((n for n in tree.nodes if n not in ends), None)
            if number is None:
                return
            tree.forget(number)
            self.drop_kept(session, (number,))
            self._tidy(session)

    def _arrived_at(self, session: Session) -> Node | None:
        """The node that a replay was for and has come to; any other rest ends the replay."""
        replay, session.replay = session.replay, None
        if replay is None:
            return None
        goal = (replay.target.forward, replay.target.point)
        if goal != (session.forward, session.point):
            return None
        tree = session.tree
        for passed in tree.path(replay.after):
            tree.away.pop(passed.number, None)
        tree.current = replay.after
        self._tidy(session)
        if replay.node is None:
            return None
        node = tree.nodes[replay.node]
        self._restore_edits(session, node, session.stop_number + 1)
        return node

    def _rested(self, session: Session, node: Node | None) -> None:
        """Make a node of where the session came to rest, unless it has come back to one."""
        if node is not None:
            return
        status = session.status
        assert status in ("waiting", "stopped", "finished")
        tree = session.tree
        cursor = (session.forward, session.point)
        if cursor == (0, NOT_STARTED):
            return
        tree.add(
            Node(
                number=session.stop_number,
                parent=tree.current,
                status=status,
                cursor=cursor,
                layers_replayed=session.layers_replayed,
                stop=session.stop,
                finish_reason=session.finish_reason,
                error=session.error,
            )
        )
        self._forget_oldest(session)

    def stop(
        self,
        session: Session,
        reason: Reason,
        *,
        hit_tokens: tuple[int, ...] = (),
        hit_breakpoints: tuple[int, ...] = (),
        error: ErrorInfo | None = None,
    ) -> None:
        node = None
        if not session.scratch:
            node = self._arrived_at(session)
        if node is not None and node.stop is not None and error is None:
            was = node.stop
            reason, error = was.reason, was.error
            hit_tokens, hit_breakpoints = was.hit_tokens, was.hit_breakpoints
        super().stop(
            session, reason, hit_tokens=hit_tokens, hit_breakpoints=hit_breakpoints, error=error
        )
        if not session.scratch:
            self._rested(session, node)
            self.keep_to_room()

    def wait(self, session: Session, error: ErrorInfo | None) -> None:
        node = None
        if not session.scratch:
            node = self._arrived_at(session)
        super().wait(session, error)
        if not session.scratch:
            self._rested(session, node)

    def finish(self, session: Session) -> None:
        node = self._arrived_at(session)
        super().finish(session)
        self._rested(session, node)

    def fail(self, session: Session, error: ErrorInfo) -> None:
        session.replay = None
        super().fail(session, error)
        if not session.scratch:
            self._drop_tree(session)

    def terminate(self, event: Requested, request: m.Terminate, session: Session) -> None:
        self._drop_tree(session)
        super().terminate(event, request, session)

    def _drop_tree(self, session: Session) -> None:
        """Its branches are gone with it."""
        for line_id in session.tree.lines:
            self._free_line(self.sessions[line_id])
        session.tree.lines.clear()
        session.tree.nodes.clear()
        session.tree.away.clear()
        self.forget_kept(session, tuple(session.tree.kept))

    def set_running(self, session: Session) -> None:
        if not session.scratch and session.replay is None:
            self._keep_stop(session)
            self._drop_oldest(session)
        super().set_running(session)

    # -- what was done on the way -------------------------------------------------------------

    def _arrive(
        self,
        slot: Slot,
        point: Point,
        held: Mapping[int, tuple[int, ...]],
        results: tuple[EditResult, ...],
        layers_run: int,
    ) -> list[Breakpoint]:
        session, replay = slot.session, slot.session.replay
        made = tuple(entry for entry in slot.edits if entry[0].point <= point and entry[1])
        if made and not session.scratch:
            session.applied[slot.forward] = session.applied.get(slot.forward, ()) + made
        if replay is not None:
            # figures of edits are restored with them; what comes after those counts as ever
            known = replay.known_until
            slot.edits = [
                (_known(session.edits, edit), positions)
                for edit, positions in slot.edits
                if known is not None and (slot.forward, edit.point) > known
            ]
        stopping = super()._arrive(slot, point, held, results, layers_run)
        if replay is not None and layers_run:
            num_layers = self.shape.num_layers
            new = layers_executed(point, num_layers) - layers_executed(slot.start, num_layers)
            session.layers_replayed += max(0, min(layers_run, new))
        return stopping

    def _drawn(self, session: Session, token: int) -> None:
        replay = session.replay
        if replay is not None and len(session.tokens) < len(replay.tokens):
            known = replay.tokens[len(session.tokens)]
            if token != known and session.forward >= session.tree.sampled_from:
                error = SessionFailed(
                    f"forward {session.forward} was run again and drew token {token}, and {known}"
                    " before: the run is not exact on this machine; please report it"
                )
                self.fail(session, error_info(error))
                return
            token = known
        super()._drawn(session, token)
        if replay is not None and session.status == "running":
            self._came_before(session, replay)

    def _came_before(self, session: Session, replay: Replay) -> None:
        """A way that was to end before a forward has ended: rest there again."""
        goal = (replay.target.forward, replay.target.point)
        if goal[1] != NOT_STARTED or goal != (session.forward, session.point):
            return
        self.unqueue(session)
        node = None if replay.node is None else session.tree.nodes[replay.node]
        error = None if node is None else node.error
        self.wait(session, error)

    def edits_applied(self, event: EditsApplied) -> None:
        session = self.sessions.get(event.session_id)
        pending = None if session is None else session.pending
        if session is None or session.scratch or pending is None:
            super().edits_applied(event)
            return
        self._part(session)
        super().edits_applied(event)
        before = session.applied.get(session.forward, ())
        here = tuple(
            (edit, pending.positions[edit.id])
            for edit in session.edits
            if pending.positions.get(edit.id)
        )
        kept = tuple(entry for entry in before if entry[0].point != session.point)
        session.applied[session.forward] = kept + here
        self.keep_to_room()

    def _edits_changed(self, request_id: int, session: Session, edit: Edit | None) -> None:
        if session.status != "running":
            self._part(session)
        super()._edits_changed(request_id, session, edit)

    def _part(self, session: Session) -> None:
        """A node the session came back to is edited: that is another node, beside the first."""
        tree = session.tree
        node = tree.here
        if node.edits is None or session.scratch:
            return
        line = tree.heir()
        if line is None:
            line = self._make_line(session, node)
            for table in session.tables:
                self.pool.retain(table)
        tree.away[node.number] = line
        stop = session.stop
        tree.add(replace(node, number=session.stop_number, stop=stop, edits=None, left_at=0))


def _known(edits: Edits, edit: Edit) -> Edit:
    """The session's own edit of the same id, where it has one."""
    return next((own for own in edits if own.id == edit.id), edit)
