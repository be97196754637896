"""What a notebook's kernel shows its views: one plain, versioned description of everything.

A `Snapshot` is made by `djinn_nb.workbench` and drawn by the panels and the JupyterLab extension,
which hold no truth of their own. Only plain values, so that `as_json` is all it takes to send one;
the extension's types are generated from these classes. What a value means to a session is decided
by the server; this file only names what can be seen.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from kernel_server.protocol.messages import BreakpointKind, Reason, Status, When

#: How the kernel stands to a server: `denied` is a wrong access token.
Connection = Literal["none", "connecting", "loading", "ready", "lost", "denied"]
Level = Literal["error", "warning", "info"]
Outcome = Literal["running", "done", "failed"]
#: Where the pages of a session lie; `mixed`: not all in one tier.
Tier = Literal["none", "device", "host", "disk", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something a person should know: what happened, and what to do about it."""

    level: Level
    #: the error's code, or a word for a state such as `TakenOver`
    code: str
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressBrief:
    """How far something is, 0 to 1; None when nobody knows."""

    text: str
    done: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBrief:
    """The model served."""

    name: str
    num_layers: int
    hidden_size: int
    #: of the layers, where all agree
    num_heads: int | None
    dtype: str
    device: str
    #: inside and at the end of a layer, in the order of a forward
    sites: tuple[str, ...]
    has_tokenizer: bool
    random_weights: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionBrief:
    """A session, as a list or a ladder shows it."""

    id: str
    name: str
    owner: str
    status: Status
    reason: Reason | None
    location: str | None
    #: the layer it stands in or after; None before the first and after the last
    layer: int | None
    forward: int
    num_tokens: int
    num_prompt_tokens: int
    max_new_tokens: int
    stop_number: int
    #: distinct layers finished in this forward
    layers_executed: int
    kv_bytes: int
    tier: Tier
    pinned: bool
    parent: str | None
    error: str | None
    #: another client moved it since this notebook last looked
    taken_over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakpointBrief:
    """A breakpoint of the current session."""

    id: int
    location: str
    #: how many locations it has; a data breakpoint may watch many
    num_locations: int
    layer: int | None
    kind: BreakpointKind
    when: When
    condition: str | None
    enabled: bool
    hits: int
    stops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingBrief:
    """A breakpoint that applies to the runs that follow."""

    location: str
    layer: int | None
    when: When
    condition: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditBrief:
    """An edit of the current session."""

    id: int
    kind: str
    location: str
    text: str
    sticky: bool
    enabled: bool
    at_this_stop: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeBrief:
    """A node of the current session's branch tree."""

    number: int
    parent: int | None
    location: str | None
    forward: int
    reason: Reason | None
    status: Status
    current: bool
    #: its tensors are kept, so going there needs no forward
    kept: bool
    num_tokens: int
    num_edits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """What something holds; `tier`: `device`, `host` or `disk`."""

    kind: str
    tier: Literal["device", "host", "disk"]
    nbytes: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapBrief:
    """Pages of a session that moved between tiers."""

    #: seconds since the epoch, by the clock of the notebook's kernel
    time_s: float
    session_id: str
    nbytes: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBrief:
    """KV pages by tier, bytes; a total of 0: there is no such tier. rows: everything by kind."""

    device_used: int
    device_total: int
    host_used: int
    host_total: int
    disk_used: int
    disk_total: int
    rows: tuple[MemoryRow, ...] = ()
    #: the newest last, bounded
    swaps: tuple[SwapBrief, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the views look at together; None: nothing chosen."""

    session_id: str | None = None
    layer: int | None = None
    head: int | None = None
    #: absolute position
    token: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionBrief:
    """Something a person did, and the Python that repeats it."""

    number: int
    label: str
    code: str
    outcome: Outcome
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """What is being carried out. since_s: seconds since the epoch.

    in_cell: a cell of the notebook runs meanwhile, and what is clicked in widgets waits for it.
    """

    text: str
    since_s: float
    can_pause: bool
    progress: ProgressBrief | None = None
    in_cell: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything the views show, at one moment. A view drops one that is not newer (`rev`)."""

    rev: int
    #: tells one kernel process from another, which counts `rev` anew
    kernel: str
    connection: Connection
    address: str = ""
    notice: Notice | None = None
    #: of loading the model
    progress: ProgressBrief | None = None
    model: ModelBrief | None = None
    #: the current session
    session_id: str | None = None
    sessions: tuple[SessionBrief, ...] = ()
    breakpoints: tuple[BreakpointBrief, ...] = ()
    pending: tuple[PendingBrief, ...] = ()
    branches: tuple[NodeBrief, ...] = ()
    edits: tuple[EditBrief, ...] = ()
    memory: MemoryBrief | None = None
    selection: Selection = Selection()
    #: the newest last, bounded
    actions: tuple[ActionBrief, ...] = ()
    busy: Busy | None = None
    #: verbs that would not be refused now
    can: tuple[str, ...] = ()

    @property
    def session(self) -> SessionBrief | None:
        """The current session, if the server still has it."""
        return next((one for one in self.sessions if one.id == self.session_id), None)


def as_json(value: Any) -> Any:
    """A snapshot, or a part of one, as dicts, lists and plain values for `json.dumps`.

    >>> as_json(Selection(layer=3))["layer"]
    3
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [as_json(one) for one in value]
    return value
