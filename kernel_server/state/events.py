"""What has happened: the only things that go into the state machine.

Past tense. Requests come from the service, results from the engine; time arrives inside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.location import Point
from kernel_server.protocol.messages import ErrorInfo, SessionRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Requested:
    """An owner asked for something. Texts are already token ids (`Launch.token_ids`,
    `Selector.token_ids`), uploaded values are already part of the edit."""

    request_id: int
    owner: str
    message: Any
    #: seconds, from the server's clock; for display and idle times only
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EditResult:
    """What one edit did in one forward."""

    edit_id: int
    #: absolute positions changed
    positions: tuple[int, ...]
    elements_changed: int
    norm_before: float
    norm_after: float
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogResult:
    """What a logpoint noted in one stretch."""

    breakpoint_id: int
    #: points at which it had tokens to note
    held: int
    #: bytes of each record kept, in order; they are numbered on from the last one
    sizes: tuple[int, ...] = ()
    #: records that found no room
    dropped: int = 0
    #: bytes of the record that ended the stretch for want of room
    refused_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StretchDone:
    """The engine stands at `point`: as told, because a check held, or because it was interrupted.

    `point` is the last one reached; `sampled_point` when the forward's token was drawn.
    """

    session_id: str
    point: Point
    #: breakpoint id -> absolute positions at which its condition held, at `point` only
    held: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    edits: tuple[EditResult, ...] = ()
    logs: tuple[LogResult, ...] = ()
    token: int | None = None
    layers_run: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StretchAdvanced:
    """A stretch that takes long has come to `point`; told now and then, for whoever waits."""

    session_id: str
    point: Point


@dataclass(frozen=True, slots=True, kw_only=True)
class StretchFailed:
    """The engine could not go on; what was reached before (`point`) still stands."""

    session_id: str
    point: Point
    error: ErrorInfo
    #: False: the same stretch may be tried again (memory), True: the session is lost to a fault
    fatal: bool
    logs: tuple[LogResult, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EditsApplied:
    """The value at the stop was computed anew with the edits asked for."""

    request_id: int
    session_id: str
    results: tuple[EditResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EditsFailed:
    """The value at the stop is as it was."""

    request_id: int
    session_id: str
    error: ErrorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesDone:
    """A copy of pages between tiers was made, or `error` says why not."""

    ticket: int
    nbytes: int
    seconds: float
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time has passed, by the server's clock; told now and then, for idle sessions."""

    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolGrown:
    """The host's pool has so many slots ready now."""

    num_slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRead:
    """A server starts with what the journal of an earlier one holds.

    sessions: each with its arrays. damaged: ids that may have been further than their records say.
    """

    number: int
    sessions: tuple[tuple[SessionRecord, tuple[Array, ...]], ...]
    damaged: frozenset[str] = frozenset()
    #: owner of each that is not whole, and what it lacks
    unreadable: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    now: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DurabilityChanged:
    """The journal cannot be written, and why; empty: it can again."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The record of a session that was waited for is on disk; `lacks`: it is not, and why."""

    session_id: str
    ticket: int
    lacks: str = ""


StateEvent = (
    Requested
    | StretchDone
    | StretchAdvanced
    | StretchFailed
    | EditsApplied
    | EditsFailed
    | CopiesDone
    | Ticked
    | PoolGrown
    | JournalRead
    | DurabilityChanged
    | Recorded
)
