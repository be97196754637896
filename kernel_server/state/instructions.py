"""What is to be done: the only things that come out of the state machine. Imperatives.

The loop carries them out in order. `RunStretch` goes to the engine's one work slot; `ApplyEdits`,
`ForkTensors`, `KeepTensors`, `RestoreTensors`, `DropNodes`, `DropTensors`, `DropLog`, `PoisonPages`
and `ReadTensors` are errands the engine does between two layers of whatever it runs; `Interrupt`,
`Reply` and `Publish` take effect at once, but for what must be on disk first: `WriteJournal`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.location import Point
from kernel_server.protocol.messages import EditSpec, LogContent, SessionRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn; keyed by (seed, position), so it depends on nothing else."""

    temperature: float
    top_p: float
    seed: int
    #: absolute position the new token will take
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EditPlan:
    """An edit with its selectors resolved for one forward."""

    edit_id: int
    point: Point
    spec: EditSpec
    #: rows of this forward (0 is its first token), None for all
    rows: tuple[int, ...] | None
    #: elements of a token's vector (heads flattened), None for all
    channels: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the texts of a condition stand for: tokens of `prob`, vectors float32 of `cosine`."""

    token_ids: Mapping[str, tuple[int, ...]]
    vectors: Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A breakpoint to be judged when its point is reached.

    `holds` gets, per token fed, the variables and functions named in `names`; None holds for every
    token. rows: the tokens it is judged for (0 is the forward's first), None for all.
    """

    breakpoint_id: int
    point: Point
    names: frozenset[str]
    holds: Callable[[Mapping[Any, Any]], bool] | None
    hits: int
    rows: tuple[int, ...] | None = None
    lookup: Lookup | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPlan:
    """A logpoint at a point: what is noted there, of the tokens its check holds at, or of `rows`.

    room_bytes: how much it may note in this stretch. stop_when_full: end the stretch where a record
    finds no room, instead of dropping it.
    """

    breakpoint_id: int
    point: Point
    check: Check | None
    rows: tuple[int, ...] | None
    what: LogContent
    room_bytes: int
    stop_when_full: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Captures:
    """Values to be caught on the way, with the edits there: of a scratch fork.

    `summary` and `tensor`: the value at each of `points`; `router`: which experts the layer that
    follows the point chooses; `stream`: the value at each point of every forward that the fork
    runs, where `rows` are absolute positions.
    """

    points: tuple[Point, ...]
    what: Literal["summary", "tensor", "router", "stream"]
    #: rows of this forward and elements of a row, None for all
    rows: tuple[int, ...] | None
    elements: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStretch:
    """Run a session's current forward from where it stands to `until`, or to the first check that
    holds, or to the next boundary after an `Interrupt`."""

    session_id: str
    forward: int
    #: tokens fed in this forward, and the absolute position of the first
    token_ids: tuple[int, ...]
    first_token: int
    #: where it stands (NOT_STARTED before the embedding); edits and checks lie beyond it
    point: Point
    #: a point, or `sampled_point`: draw the next token
    until: Point
    checks: tuple[Check, ...]
    edits: tuple[EditPlan, ...]
    #: device slots of the pages per page group, for the groups this stretch can reach; empty where
    #: it reads none
    tables: tuple[tuple[int, ...], ...]
    #: (from, to), device slots: pages to copy first, written by two sessions otherwise
    copies: tuple[tuple[int, int], ...]
    sampling: Sampling
    captures: Captures | None = None
    #: copies to wait for before a page group is used: (group, ticket), all that bring pages of it;
    #: none where there are `copies`
    arrivals: tuple[tuple[int, int], ...] = ()
    logs: tuple[LogPlan, ...] = ()
    #: how much all logs together may note in this stretch
    log_room_bytes: int = 0
    #: breakpoint id and point: what the lens reads there is kept for it, and nothing is judged
    reads: tuple[tuple[int, Point], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPages:
    """Copy pages from one tier to another, beside what is computed; answered by `CopiesDone`."""

    ticket: int
    #: `device-host`, `host-device`, `host-disk` or `disk-host`
    way: str
    #: slots, one of each page, in the same order
    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupt:
    """Stop the running stretch of this session at the next layer boundary."""

    session_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyEdits:
    """Compute the value at the stop from its unedited tensor and these edits, in order.

    Answered by `EditsApplied` (results of all of them) or `EditsFailed` (nothing changed)."""

    request_id: int
    session_id: str
    edits: tuple[EditPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkTensors:
    """Give another session the same tensors. nodes: with those kept of these stops.
    history_only: of a branch, the figures of finished forwards are enough."""

    parent_id: str
    child_id: str
    nodes: tuple[int, ...] = ()
    history_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepTensors:
    """Keep the tensors of a stop that the session leaves."""

    session_id: str
    node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreTensors:
    """Put back the tensors kept of a stop; `node` None: those of the start of a forward, as far as
    `source_id`, a session or its branch, still knows them."""

    session_id: str
    source_id: str
    node: int | None
    forward: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DropNodes:
    session_id: str
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DropTensors:
    """Let go what is held of a session. but_logs: the records of its logpoints stay."""

    session_id: str
    but_logs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DropLog:
    """Free the records of a logpoint; those noted by a stretch that still runs come after it."""

    session_id: str
    breakpoint_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoisonPages:
    """Fill freed device slots with NaN (with --check), so that a wrong read shows."""

    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What is known of two nodes whose streams are compared, the first one's first."""

    #: one past the last position that both have
    end_token: int
    token_ids: tuple[tuple[int, ...], tuple[int, ...]]
    num_prompt_tokens: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTensors:
    """Answer a read request, or a question for which scratch forks were run."""

    request_id: int
    session_id: str
    message: Any
    #: rows and elements of a row (heads flattened) of the tensor at the stop, None for all
    rows: tuple[int, ...] | None
    channels: tuple[int, ...] | None
    #: absolute position of the forward's first token, and the forward's number
    first_token: int
    forward: int
    owner: str
    #: heads among the elements of a row, None where the tensor has none
    heads: int | None = None
    #: other sessions the answer is about: of a preview, the fork without the edits
    beside: tuple[str, ...] = ()
    #: elements changed by each previewed edit
    changed: tuple[int, ...] = ()
    #: of a comparison
    compared: Compared | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteJournal:
    """Make a session durable as it is now, before anything that follows is told to anyone.

    record: None when it has ended. number: of the newest session ever made. ticket: answered by
    `Recorded` when it is on disk, or cannot be.
    """

    session_id: str
    number: int
    record: SessionRecord | None
    arrays: tuple[Array, ...] = ()
    ticket: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Answer a request with a protocol response (`ErrorReply` for errors)."""

    request_id: int
    message: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Append a protocol event to the owner's log. Sequence numbers are the state's own."""

    owner: str
    event: Any


Instruction = (
    RunStretch
    | CopyPages
    | Interrupt
    | ApplyEdits
    | ForkTensors
    | KeepTensors
    | RestoreTensors
    | DropNodes
    | DropTensors
    | DropLog
    | PoisonPages
    | ReadTensors
    | WriteJournal
    | Reply
    | Publish
)
