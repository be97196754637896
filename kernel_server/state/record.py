"""A session as plain data, and back: all that determines it, none of what follows from that.

Pages and tensors are left out: they are computed again, by running the session's forwards as they
went (`rebuilding`). An edit or array that several parts of a session hold is written once and read
as one object again. Where records are kept is decided elsewhere.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.conditions import parse_condition
from kernel_server.protocol.errors import BadMessage
from kernel_server.protocol.location import NOT_STARTED, Point
from kernel_server.state.branches import Applied, Node, Tree
from kernel_server.state.breakpoints import Breakpoint, Breakpoints
from kernel_server.state.edits import Edit, Edits
from kernel_server.state.instructions import Lookup
from kernel_server.state.logpoints import Log
from kernel_server.state.selectors import TokenSelector
from kernel_server.state.sessions import Session
from kernel_server.state.shape import ModelShape


def sizes_of(shape: ModelShape) -> tuple[int, ...]:
    """What a record must agree with before it can be read at all."""
    return shape.num_layers, shape.hidden_size, shape.vocab_size


# -- to data ------------------------------------------------------------------------------------


class _Writer:
    """Gives every edit and array of a session its index."""

    def __init__(self) -> None:
        self.edits: list[m.EditRecord] = []
        self.arrays: list[Array] = []
        self._edit_index: dict[int, int] = {}
        self._array_index: dict[int, int] = {}

    def array(self, value: Array) -> int:
        if id(value) not in self._array_index:
            self._array_index[id(value)] = len(self.arrays)
            self.arrays.append(value)
        return self._array_index[id(value)]

    def edit(self, edit: Edit) -> int:
        if id(edit) not in self._edit_index:
            self._edit_index[id(edit)] = len(self.edits)
            self.edits.append(self._edit_record(edit))
        return self._edit_index[id(edit)]

    def _edit_record(self, edit: Edit) -> m.EditRecord:
        value = edit.spec.value
        return m.EditRecord(
            id=edit.id,
            spec=edit.spec if value is None else replace(edit.spec, value=None),
            array=-1 if value is None else self.array(value),
            point=edit.point,
            made_at_stop=edit.made_at_stop,
            forward=edit.forward,
            enabled=edit.enabled,
            note=edit.note,
            reached_in=edit.reached_in,
            positions=edit.positions,
            elements_changed=edit.elements_changed,
            norm_before=edit.norm_before,
            norm_after=edit.norm_after,
            forwards_matched=edit.forwards_matched,
            forwards_unmatched=edit.forwards_unmatched,
        )

    def applied(self, applied: Mapping[int, Applied]) -> tuple[m.AppliedRecord, ...]:
        found = []
        for forward in sorted(applied):
            for edit, where in applied[forward]:
                span = len(where) > 2 and where == tuple(range(where[0], where[0] + len(where)))
                found.append(
                    m.AppliedRecord(
                        forward=forward,
                        edit=self.edit(edit),
                        span=span,
                        positions=(where[0], where[-1] + 1) if span else where,
                    )
                )
        return tuple(found)

    def breakpoint(self, found: Breakpoint) -> m.BreakpointRecord:
        lookup, log = found.lookup, found.log
        ids = {} if lookup is None else lookup.token_ids
        vectors = {} if lookup is None else lookup.vectors
        made = m.BreakpointRecord(
            id=found.id,
            kind=found.kind,
            points=found.points,
            locations=found.locations,
            when=found.when,
            condition=None if found.condition is None else found.condition.text,
            has_lookup=lookup is not None,
            text_ids=tuple(m.TextIds(text=k, token_ids=tuple(v)) for k, v in ids.items()),
            vectors=tuple((name, self.array(value)) for name, value in vectors.items()),
            tokens=None if found.tokens is None else found.tokens.selector,
            ignore=found.ignore,
            once=found.once,
            enabled=found.enabled,
            hits=found.hits,
            held=found.held,
            stops=found.stops,
            read_at=found.read_at,
        )
        if log is None:
            return made
        return replace(
            made,
            what=log.what,
            max_bytes=log.max_bytes,
            stop_when_full=log.stop_when_full,
            last_seq=log.last_seq,
            dropped=log.dropped,
            num_records=len(log.sizes),
        )

    def node(self, node: Node, branch: str) -> m.NodeRecord:
        edits = node.edits
        return m.NodeRecord(
            number=node.number,
            parent=node.parent,
            status=node.status,
            forward=node.cursor[0],
            point=node.cursor[1],
            layers_replayed=node.layers_replayed,
            stop=node.stop,
            finish_reason=node.finish_reason,
            error=node.error,
            edits=None if edits is None else tuple(map(self.edit, edits)),
            next_edit_id=1 if edits is None else edits.next_id,
            left_at=node.left_at,
            branch=branch,
        )


def to_record(
    session: Session, lines: Mapping[str, Session], shape: ModelShape
) -> tuple[m.SessionRecord, tuple[Array, ...]]:
    """What determines a session, and the arrays that its record names by index.

    lines: its hidden branches, by id. The session stands wherever its last result has left it.
    """
    writer, tree = _Writer(), session.tree
    if session.prompt_array is None:
        prompt = struct.pack(f"<{len(session.prompt)}i", *session.prompt)
        session.prompt_array = Array("int32", (len(session.prompt),), prompt)
    prompt_index = writer.array(session.prompt_array)
    own = tuple(map(writer.edit, session.edits))
    applied = writer.applied(session.applied)
    start = len(session.prompt)
    branches = tuple(
        m.BranchRecord(
            id=line_id,
            tip=tip,
            generated=tuple(lines[line_id].tokens[start:]),
            applied=writer.applied(lines[line_id].applied),
        )
        for line_id, tip in tree.lines.items()
    )
    nodes = tuple(writer.node(node, tree.away.get(node.number, "")) for node in tree.nodes.values())
    breakpoints = tuple(map(writer.breakpoint, session.breakpoints))
    record = m.SessionRecord(
        id=session.id,
        owner=session.owner,
        name=session.name,
        parent=session.parent,
        prompt=prompt_index,
        generated=tuple(session.tokens[start:]),
        max_new_tokens=session.max_new_tokens,
        temperature=session.temperature,
        top_p=session.top_p,
        seed=session.seed,
        status=session.status,
        forward=session.forward,
        point=session.point,
        layers_replayed=session.layers_replayed,
        stop_number=session.stop_number,
        stop=session.stop,
        ran_from=session.ran_from,
        finish_reason=session.finish_reason,
        error=session.error,
        revision=session.revision,
        edits=tuple(writer.edits),
        own_edits=own,
        next_edit_id=session.edits.next_id,
        applied=applied,
        breakpoints=breakpoints,
        next_breakpoint_id=session.breakpoints.next_id,
        nodes=nodes,
        current=tree.current,
        branches=branches,
        lines_made=tree.lines_made,
        num_forgotten=tree.num_forgotten,
        sampled_from=tree.sampled_from,
        fingerprint=dict(session.fingerprint),
        inexact=session.inexact,
        pinned=session.pinned,
        sizes=sizes_of(shape),
    )
    return record, tuple(writer.arrays)


# -- from data ----------------------------------------------------------------------------------


class _Reader:
    """Makes the edits and arrays of a record, each once."""

    def __init__(self, record: m.SessionRecord, arrays: Sequence[Array], shape: ModelShape) -> None:
        self.record = record
        self.arrays = arrays
        self.shape = shape
        self.prompt = self._prompt()
        self.edits = [self._edit(one) for one in record.edits]

    def array(self, index: int) -> Array:
        if not 0 <= index < len(self.arrays):
            raise BadMessage(f"{self.record.id}: it names array {index} of {len(self.arrays)}")
        return self.arrays[index]

    def _prompt(self) -> tuple[int, ...]:
        found = self.array(self.record.prompt)
        if found.dtype != "int32" or len(found.shape) != 1:
            raise BadMessage(f"{self.record.id}: its prompt is no list of int32")
        return struct.unpack(f"<{found.shape[0]}i", found.data)

    def _edit(self, one: m.EditRecord) -> Edit:
        value = None if one.array < 0 else self.array(one.array)
        point = _point(one.point)
        return Edit(
            id=one.id,
            spec=one.spec if value is None else replace(one.spec, value=value),
            point=point,
            selector=TokenSelector(one.spec.tokens, len(self.prompt)),
            layout=self.shape.layout(point, 0),
            made_at_stop=one.made_at_stop,
            forward=one.forward,
            enabled=one.enabled,
            note=one.note,
            reached_in=one.reached_in,
            positions=one.positions,
            elements_changed=one.elements_changed,
            norm_before=one.norm_before,
            norm_after=one.norm_after,
            forwards_matched=one.forwards_matched,
            forwards_unmatched=one.forwards_unmatched,
        )

    def edit(self, index: int) -> Edit:
        if not 0 <= index < len(self.edits):
            raise BadMessage(f"{self.record.id}: it names edit {index} of {len(self.edits)}")
        return self.edits[index]

    def some_edits(self, indices: Iterable[int], next_id: int) -> Edits:
        made = Edits()
        for index in indices:
            made.add(self.edit(index))
        made.next_id = next_id
        return made

    def applied(self, records: Iterable[m.AppliedRecord]) -> dict[int, Applied]:
        found: dict[int, Applied] = {}
        for one in records:
            where = tuple(range(*one.positions[:2])) if one.span else one.positions
            found[one.forward] = (*found.get(one.forward, ()), (self.edit(one.edit), where))
        return found

    def breakpoint(self, one: m.BreakpointRecord) -> Breakpoint:
        lookup = None
        if one.has_lookup:
            lookup = Lookup(
                token_ids={entry.text: entry.token_ids for entry in one.text_ids},
                vectors={name: self.array(index) for name, index in one.vectors},
            )
        log = None
        if one.what is not None:
            log = Log(
                what=one.what,
                max_bytes=one.max_bytes,
                stop_when_full=one.stop_when_full,
                last_seq=one.last_seq,
                # the records themselves are gone with the server that held them
                dropped=one.dropped + one.num_records,
            )
        return Breakpoint(
            id=one.id,
            kind=one.kind,
            points=tuple(map(_point, one.points)),
            locations=one.locations,
            when=one.when,
            condition=None if one.condition is None else parse_condition(one.condition),
            lookup=lookup,
            tokens=None if one.tokens is None else TokenSelector(one.tokens, len(self.prompt)),
            ignore=one.ignore,
            once=one.once,
            log=log,
            enabled=one.enabled,
            hits=one.hits,
            held=one.held,
            stops=one.stops,
            read_at=None if one.read_at is None else (one.read_at[0], _point(one.read_at[1])),
        )

    def tree(self) -> Tree:
        record = self.record
        nodes = {one.number: self._node(one) for one in record.nodes}
        if record.status != "failed" and record.current not in nodes:
            raise BadMessage(f"{record.id} stands at node {record.current}, which is not there")
        return Tree(
            nodes=nodes,
            current=record.current,
            away={one.number: one.branch for one in record.nodes if one.branch},
            lines={one.id: one.tip for one in record.branches},
            num_forgotten=record.num_forgotten,
            lines_made=record.lines_made,
            sampled_from=record.sampled_from,
        )

    def _node(self, one: m.NodeRecord) -> Node:
        return Node(
            number=one.number,
            parent=one.parent,
            status=one.status,
            cursor=(one.forward, _point(one.point)),
            layers_replayed=one.layers_replayed,
            stop=one.stop,
            finish_reason=one.finish_reason,
            error=one.error,
            edits=None if one.edits is None else self.some_edits(one.edits, one.next_edit_id),
            left_at=one.left_at,
        )


def from_record(
    record: m.SessionRecord, arrays: Sequence[Array], shape: ModelShape
) -> tuple[Session, dict[str, Session]]:
    """The session of a record, and its hidden branches by id: dormant, without pages or tensors.

    Raises `BadMessage` for a record that does not hold together.
    """
    if record.sizes != sizes_of(shape):
        raise BadMessage(
            f"it is of a model with {record.sizes} layers, channels and tokens, this one has"
            f" {sizes_of(shape)}; start the server with the model it was run on"
        )
    try:
        reader = _Reader(record, arrays, shape)
        session = _session(reader)
        lines = {one.id: _line(reader, session, one) for one in record.branches}
    except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise BadMessage(f"session {record.id} cannot be read: {error}") from error
    return session, lines


def _session(reader: _Reader) -> Session:
    record, shape = reader.record, reader.shape
    breakpoints = Breakpoints.of(map(reader.breakpoint, record.breakpoints))
    breakpoints.next_id = record.next_breakpoint_id
    point = _point(record.point)
    return Session(
        id=record.id,
        owner=record.owner,
        name=record.name,
        parent=record.parent,
        tokens=[*reader.prompt, *record.generated],
        prompt=reader.prompt,
        max_new_tokens=record.max_new_tokens,
        temperature=record.temperature,
        top_p=record.top_p,
        seed=record.seed,
        tables=[()] * shape.num_groups,
        status=record.status,
        forward=record.forward,
        point=point,
        layers_replayed=record.layers_replayed,
        stop_number=record.stop_number,
        stop=record.stop,
        ran_from=record.ran_from,
        finish_reason=record.finish_reason,
        error=record.error,
        revision=record.revision,
        breakpoints=breakpoints,
        edits=reader.some_edits(record.own_edits, record.next_edit_id),
        tree=reader.tree(),
        applied=reader.applied(record.applied),
        fingerprint=record.fingerprint,
        inexact=record.inexact,
        pinned=record.pinned,
        # what stands before the first layer is whole without any tensor
        dormant=record.status != "failed" and (record.forward, point) != (0, NOT_STARTED),
    )


def _line(reader: _Reader, session: Session, one: m.BranchRecord) -> Session:
    tip = session.tree.nodes[one.tip]
    assert tip.edits is not None, f"the end of branch {one.id} was never left"
    return Session(
        id=one.id,
        owner=session.owner,
        name=f"branch of {session.name}",
        parent=session.id,
        scratch=True,
        branch=True,
        tokens=[*reader.prompt, *one.generated],
        prompt=reader.prompt,
        max_new_tokens=session.max_new_tokens,
        temperature=session.temperature,
        top_p=session.top_p,
        seed=session.seed,
        tables=[()] * reader.shape.num_groups,
        status=tip.status,
        forward=tip.cursor[0],
        point=tip.cursor[1],
        stop=tip.stop,
        stop_number=tip.number,
        finish_reason=tip.finish_reason,
        error=tip.error,
        edits=tip.edits.copy(),
        applied=reader.applied(one.applied),
        inexact=session.inexact,
        dormant=tip.cursor != (0, NOT_STARTED),
    )


def _point(point: float) -> Point:
    """Whole points are integers everywhere."""
    return int(point) if point == int(point) else point
