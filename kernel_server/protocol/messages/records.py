"""All that determines a session, as data: what a journal and a checkpoint hold.

Arrays (the prompt, values of edits, vectors of conditions) lie beside a record and are named by
their index, so that one that several parts hold is written once. How a session becomes a record,
and a record a session, is decided in `kernel_server.state.record`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.messages.base import message
from kernel_server.protocol.messages.parts import (
    BreakpointKind,
    EditSpec,
    ErrorInfo,
    FinishReason,
    LogContent,
    Selector,
    Status,
    StopInfo,
    TextIds,
    When,
)


@message
class EditRecord:
    """One edit with what it did. `array`: the index of its value, -1 without one."""

    id: int
    spec: EditSpec
    array: int = -1
    point: float
    made_at_stop: int
    forward: int
    enabled: bool
    note: str | None
    reached_in: int
    positions: tuple[int, ...]
    elements_changed: int | None
    norm_before: float | None
    norm_after: float | None
    forwards_matched: int
    forwards_unmatched: int


@message
class AppliedRecord:
    """An edit that was made in a forward. `span`: `positions` are a first and an end, not a list.

    edit: index among the record's edits.
    """

    forward: int
    edit: int
    span: bool
    positions: tuple[int, ...]


@message
class BreakpointRecord:
    """One breakpoint with its counts. vectors: names, and indices of their arrays, float32."""

    id: int
    kind: BreakpointKind
    points: tuple[float, ...]
    locations: tuple[str, ...]
    when: When
    condition: str | None
    has_lookup: bool
    text_ids: tuple[TextIds, ...]
    vectors: tuple[tuple[str, int], ...]
    tokens: Selector | None
    ignore: int
    once: bool
    enabled: bool
    hits: int
    held: int
    stops: int
    #: of a logpoint; its records are not part of this
    what: LogContent | None = None
    max_bytes: int = 0
    stop_when_full: bool = False
    last_seq: int = 0
    dropped: int = 0
    #: records that are held, and lost with the server
    num_records: int = 0
    #: forward and point where it last read the lens, of one that compares with what it read before
    read_at: tuple[int, float] | None = None


@message
class NodeRecord:
    """A place where the session stood still. `edits`: as they were then, None while it is there."""

    number: int
    parent: int | None
    status: Literal["waiting", "stopped", "finished"]
    forward: int
    point: float
    layers_replayed: int
    stop: StopInfo | None
    finish_reason: FinishReason | None
    error: ErrorInfo | None
    edits: tuple[int, ...] | None
    next_edit_id: int
    left_at: int
    #: the branch it lies on, empty on the session's own line
    branch: str


@message
class BranchRecord:
    """A hidden branch: its tokens after the prompt, and the edits made on it."""

    id: str
    tip: int
    generated: tuple[int, ...]
    applied: tuple[AppliedRecord, ...]


@message
class SessionRecord:
    """A session, but for the tensors that follow from the rest."""

    id: str
    owner: str
    name: str
    parent: str | None
    #: index of the prompt's token ids, int32
    prompt: int
    generated: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    status: Status
    forward: int
    point: float
    layers_replayed: int
    stop_number: int
    stop: StopInfo | None
    #: the stop from which it ran when its server ended; None: it did not
    ran_from: int | None = None
    finish_reason: FinishReason | None
    error: ErrorInfo | None
    revision: int
    #: every edit that any part of the record names by its index
    edits: tuple[EditRecord, ...]
    own_edits: tuple[int, ...]
    next_edit_id: int
    applied: tuple[AppliedRecord, ...]
    breakpoints: tuple[BreakpointRecord, ...]
    next_breakpoint_id: int
    nodes: tuple[NodeRecord, ...]
    current: int
    branches: tuple[BranchRecord, ...]
    lines_made: int
    num_forgotten: int
    sampled_from: int
    #: under which it ran, or which was accepted instead
    fingerprint: dict[str, Any] = field(default_factory=dict)
    inexact: bool = False
    #: its pages are to stay on its server's device; journals of before have no such field
    pinned: bool = False
    #: layers, hidden size and vocabulary of its model
    sizes: tuple[int, ...] = ()


@message
class ArrayPart:
    """An array that a record names, or the upload in which it was sent."""

    data: Array | None = None
    upload_id: str | None = None


@message
class JournalHead:
    """The first frame of a journal. number: of the newest session ever made."""

    identity: str
    version: int = 1
    number: int = 0


@message
class JournalArray:
    """An array that records name by its key, the hash of what it holds."""

    key: str
    value: Array


@message
class JournalSession:
    """A session as it is now; `record` None: it has ended. arrays: keys, by index."""

    identity: str
    session_id: str
    number: int
    record: SessionRecord | None = None
    arrays: tuple[str, ...] = ()
