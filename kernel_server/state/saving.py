"""Sessions that leave a server as data, and come to one: what a checkpoint holds, and who takes it.

What is given out is the record of a session at rest. A record that comes from a client is judged
like any request: it may say anything, and is refused whole. One that is taken is a new session,
dormant like those that came back after a restart, and computed again when it is needed.
"""

from __future__ import annotations

from dataclasses import replace

from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import (
    BadArgument,
    BadMessage,
    DjinnError,
    NotStopped,
    QuotaExceeded,
    WrongFingerprint,
    WrongModel,
)
from kernel_server.state.events import Requested
from kernel_server.state.quotas import require_room
from kernel_server.state.rebuilding import Rebuilding
from kernel_server.state.record import from_record, sizes_of, to_record
from kernel_server.state.sessions import Session


class Saving(Rebuilding):
    """Gives out the record of a session, and takes one."""

    def read_record(self, event: Requested, request: m.ReadRecord, session: Session) -> None:
        if session.status in ("running", "failed") or session.pending is not None:
            place = session.place(self.shape.num_layers)
            raise NotStopped(
                f"session {session.id} is {place}: what rests can be saved, pause it first",
                status=session.status,
            )
        record, arrays = to_record(session, self.sessions, self.shape)
        tensors = tuple(
            m.TensorReply(dtype=one.dtype, shape=one.shape, nbytes=one.nbytes, data=one)
            for one in arrays
        )
        self.reply(event.request_id, m.RecordReply(record=record, arrays=tensors))

    def load_record(self, event: Requested, request: m.LoadRecord) -> None:
        self._check_name(request.name)
        self._check_quota(event.owner)
        given = request.record
        if given.sizes != sizes_of(self.shape):
            raise WrongModel(
                f"the session is of a model with {_sizes(given.sizes)}, this server's has"
                f" {_sizes(sizes_of(self.shape))}: connect to one that serves its model"
            )
        arrays = tuple(part.data for part in request.arrays if part.data is not None)
        number = self.num_made + 1
        record = _renamed(given, f"s{number}", event.owner, request.name or given.name)
        session, lines = self._taken(record, arrays)
        refusal = self._refusal(session, damaged=False)
        if refusal is not None and not request.inexact:
            told = refusal.partition(": start the server")[0]
            raise WrongFingerprint(
                f"{told}: load it where it was made, or with inexact=True, which marks it"
            )
        if refusal is not None:
            session.inexact, session.fingerprint = True, self.fingerprint
            for line in lines.values():
                line.inexact = True
        self.num_made = number
        self.sessions[session.id] = session
        self.sessions.update(lines)
        session.touched = self.now
        self.note(session, "LoadRecord", session.place(self.shape.num_layers))
        self.publish(session, "launched")
        self.reply(event.request_id, m.SessionReply(session=self.info(session)))

    def _taken(
        self, record: m.SessionRecord, arrays: tuple[Array, ...]
    ) -> tuple[Session, dict[str, Session]]:
        """The session of a record that may say anything, or a refusal; changes nothing."""
        limits = self.limits
        for count, most, what in (
            (len(record.breakpoints), limits.breakpoints_per_session, "breakpoints"),
            (len(record.own_edits), limits.edits_per_session, "edits"),
            (len(record.nodes), limits.nodes_per_session, "stops"),
            (len(record.branches), limits.branches_per_session, "branches"),
        ):
            if count > most:
                raise QuotaExceeded(
                    f"the session has {count} {what}, this server takes {most} of a session",
                    have=count,
                    limit=most,
                )
        if record.status in ("running", "failed"):
            raise BadArgument(f"the session is {record.status}: what rests can be loaded")
        self._check_sampling(record.temperature, record.top_p)
        self._check_seed(record.seed)
        try:
            session, lines = from_record(record, arrays, self.shape)
            self._checked_prompt(
                m.Launch(token_ids=session.prompt, max_new_tokens=session.max_new_tokens)
            )
            self._check_tokens(session)
            for one in (session, *lines.values()):
                self._check_tokens(one)
                one.check(self.shape)
        except (AssertionError, KeyError, ValueError, OverflowError) as error:
            if isinstance(error, DjinnError):
                raise
            raise BadMessage(f"the session's record does not hold together: {error}") from error
        self._check_values(session, arrays)
        return session, lines

    def _check_tokens(self, session: Session) -> None:
        vocabulary, most = self.shape.vocab_size, len(session.prompt) + session.max_new_tokens
        if len(session.tokens) > most or not all(0 <= t < vocabulary for t in session.tokens):
            raise BadMessage(
                f"the record has {len(session.tokens)} tokens, at most {most} fit, each below"
                f" {vocabulary}"
            )
        for forward, entries in session.applied.items():
            first = 0 if forward == 0 else len(session.prompt) + forward - 1
            end = len(session.prompt) + forward
            places = (position for _, where in entries for position in where)
            if forward < 0 or not all(first <= position < end for position in places):
                raise BadMessage(f"the record edits tokens that forward {forward} does not feed")

    def _check_values(self, session: Session, arrays: tuple[Array, ...]) -> None:
        held = {
            id(edit.spec.value): edit.spec.value.nbytes
            for other in self.sessions.values()
            if other.owner == session.owner
            for edits in other.edit_lists()
            for edit in edits
            if edit.spec.value is not None
        }
        require_room(
            "edits",
            sum(held.values()),
            sum(array.nbytes for array in arrays),
            self.limits.edit_bytes_per_owner,
            "remove an edit or terminate a session",
        )


def _renamed(record: m.SessionRecord, new_id: str, owner: str, name: str) -> m.SessionRecord:
    """The record under an id of this server's, its branches with it."""

    def branch(old: str) -> str:
        return f"{new_id}/{old.rpartition('/')[2]}" if old else ""

    return replace(
        record,
        id=new_id,
        owner=owner,
        name=name,
        parent=None,
        ran_from=None,
        revision=0,
        # a pin is a wish about the device of the server that saved it, and its lease: here it would
        # hold pages that nobody here asked to hold
        pinned=False,
        nodes=tuple(replace(node, branch=branch(node.branch)) for node in record.nodes),
        branches=tuple(replace(one, id=branch(one.id)) for one in record.branches),
    )


def _sizes(sizes: tuple[int, ...]) -> str:
    names = ("layers", "channels", "tokens in its vocabulary")
    return ", ".join(f"{n} {name}" for n, name in zip(sizes, names, strict=False)) or "no sizes"
