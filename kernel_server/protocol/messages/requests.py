"""What a client asks. Each request is answered by one response on the same connection.

Anything that acts on a stop carries `seen`, the number of the stop the caller saw; the server
refuses a stale one. What makes a session run carries `wait_s`: so many seconds at most the answer
waits for the session to rest, and then says where; else, and always with 0, it says that it runs.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.messages.base import PROTOCOL_VERSION, contract_digest, message
from kernel_server.protocol.messages.parts import (
    ALL,
    BreakpointKind,
    ChatMessage,
    EditSpec,
    LogContent,
    NamedArray,
    Selector,
    TextIds,
    When,
)
from kernel_server.protocol.messages.records import ArrayPart, SessionRecord


@message
class Initialize:
    """First call of a connection: who is calling, and which contract it speaks."""

    client: str
    protocol: int = PROTOCOL_VERSION
    #: the caller's own, so that builds that differ are told apart
    contract: str = field(default_factory=contract_digest)


@message
class Launch:
    """Make a session of a text, token ids or chat messages.

    It waits until it is continued, or stops on entry.
    """

    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_on_entry: bool = False
    add_special_tokens: bool = True
    name: str | None = None


@message
class Describe:
    """Ask for one session."""

    session_id: str


@message
class ListSessions:
    """Ask for all sessions of this owner."""


@message
class Continue:
    """Run on until something stops the session."""

    session_id: str
    seen: int
    wait_s: float = 0.0


@message
class Next:
    """Run to the next layer's output (or the final norm, the logits, the next forward)."""

    session_id: str
    seen: int
    wait_s: float = 0.0


@message
class StepIn:
    """Run to the next site, inside the layer or at its end."""

    session_id: str
    seen: int
    wait_s: float = 0.0


@message
class StepOut:
    """Run to this forward's logits, before sampling."""

    session_id: str
    seen: int
    wait_s: float = 0.0


@message
class RunTo:
    """Run until `location` is reached next, in this forward or a later one."""

    session_id: str
    seen: int
    location: str
    wait_s: float = 0.0


@message
class Pause:
    """Stop at the next layer boundary."""

    session_id: str


@message
class Fork:
    """Copy a session that is not running; pages are shared until one of the two writes them.

    What is given replaces the parent's: seed, sampling, how many tokens are to come.
    """

    session_id: str
    seed: int | None = None
    name: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None


@message
class Accept:
    """Let a session go on under another execution fingerprint than its own; it is marked."""

    session_id: str


@message
class ReadRecord:
    """Ask for all that determines a session at rest."""

    session_id: str


@message
class LoadRecord:
    """Make a session of a record; it is computed again when its tensors are needed.

    inexact: also under another execution fingerprint than its own; then it is marked.
    """

    record: SessionRecord
    arrays: tuple[ArrayPart, ...] = ()
    name: str | None = None
    inexact: bool = False


@message
class Terminate:
    """End a session and free what it holds."""

    session_id: str


@message
class Evict:
    """Have a session's pages leave the device; answered when they have."""

    session_id: str
    to: Literal["host", "disk"] = "host"


@message
class StepBack:
    """Return to the previous stop: its tokens, cursor, edits and tensors."""

    session_id: str
    seen: int
    wait_s: float = 0.0


@message
class Rewind:
    """Return to a place that was passed, also one where the session did not stop."""

    session_id: str
    seen: int
    forward: int
    location: str
    wait_s: float = 0.0


@message
class GoTo:
    """Return to a node, on whatever branch."""

    session_id: str
    seen: int
    node: int
    wait_s: float = 0.0


@message
class ListBranches:
    """All nodes of a session."""

    session_id: str


@message
class PruneBranch:
    """Free a node and all that came after it; none on the session's own way can be."""

    session_id: str
    node: int


@message
class Restore:
    """Have a session's pages come to the device; answered when they have."""

    session_id: str


@message
class Pin:
    """Keep a session's pages on the device, or no longer."""

    session_id: str
    pinned: bool = True


@message
class Hint:
    """Say in how many seconds a session is to go on, so that it is back in time; None: unknown."""

    session_id: str
    resume_in_s: float | None


@message
class SetBudget:
    """Use no more than so many bytes of a tier from now on, at most what was allocated at first.

    None: as before. Of all tiers that are named, or of none where one of them is refused.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None


@message
class SetBreakpoint:
    """Add a breakpoint, data breakpoint or logpoint to a session.

    locations: one, or several for a data breakpoint or logpoint. tokens: those that its condition
    is judged for, or that a logpoint notes. A logpoint notes a `summary` or the `tensor`, up to
    `max_bytes`; when they are full it drops new records and counts them, or stops the session
    (`on_full`). Named vectors are taken as they are now: replacing one changes no breakpoint.
    """

    session_id: str
    locations: tuple[str, ...]
    kind: BreakpointKind = "breakpoint"
    when: When = "any"
    condition: str | None = None
    ignore: int = 0
    once: bool = False
    what: LogContent = "summary"
    tokens: Selector = ALL
    max_bytes: int = 16 << 20
    on_full: Literal["drop", "stop"] = "drop"
    #: filled in by the server: the texts of `prob` as ids, and the vectors of `cosine`
    text_ids: tuple[TextIds, ...] = ()
    vectors: tuple[NamedArray, ...] = ()


@message
class EnableBreakpoint:
    session_id: str
    breakpoint_id: int
    enabled: bool


@message
class RemoveBreakpoint:
    session_id: str
    breakpoint_id: int


@message
class AddEdit:
    """Edit at the stop the session stands at, or ahead of it."""

    session_id: str
    seen: int
    edit: EditSpec


@message
class EnableEdit:
    """Switch an edit off or on; at its own stop this is undone and redone exactly."""

    session_id: str
    edit_id: int
    enabled: bool


@message
class RemoveEdit:
    """Take an edit out of the list. At its own stop the value is as if it had never been."""

    session_id: str
    edit_id: int


@message
class UndoEdit:
    """Undo the last edit made at this stop."""

    session_id: str
    seen: int


@message
class ReadValue:
    """The tensor at the stop: a summary, or its elements in the dtype they have."""

    session_id: str
    seen: int
    what: Literal["summary", "tensor"] = "summary"
    tokens: Selector = ALL
    heads: Selector = ALL
    channels: Selector = ALL


@message
class ReadLens:
    """Logit lens: the model's final norm and head on the residual stream.

    `layers` None: the tensor at the stop, for `tokens`. Otherwise the last token fed, at these
    points of the current forward (layer numbers; -1 for the embedding).
    """

    session_id: str
    seen: int
    top_k: int = 5
    tokens: Selector = ALL
    layers: tuple[int, ...] | None = None
    every_layer: bool = False


@message
class ReadCapture:
    """Default capture: norm and largest magnitude by layer and token, NaN count by layer."""

    session_id: str
    #: number of the stop the caller saw; None reads whatever forward is the current one
    seen: int | None = None
    #: "forward": the current one; "session": every token so far
    span: Literal["forward", "session"] = "forward"


@message
class ReadLogits:
    """Logits of the last finished forward's last token, float32 [vocabulary]."""

    session_id: str


@message
class ReadLog:
    """Records of a logpoint after sequence number `after`, oldest first, some at a time.

    release: those up to `after` are safe with the caller; the server frees them.
    """

    session_id: str
    breakpoint_id: int
    after: int = 0
    release: bool = False


@message
class Preview:
    """What the next token would be with these edits, and without them; nothing is changed.

    Both arms run on scratch forks from this stop to the logits, with the session's own edits.
    `logits`: answer with all of them too, besides the `top_k` most probable tokens.
    """

    session_id: str
    seen: int
    edits: tuple[EditSpec, ...]
    top_k: int = 10
    logits: bool = True


@message
class ReadAttention:
    """Attention weights of a layer of this forward, recomputed on a scratch fork."""

    session_id: str
    seen: int
    layer: int
    heads: Selector = ALL
    tokens: Selector = ALL


@message
class ReadAttribution:
    """Direct logit attribution of a token at this forward's last position.

    What the embedding, each head and each MLP add to the logit, with the final norm's scale held
    fixed; parts after the stop are computed on a scratch fork.
    """

    session_id: str
    seen: int
    token_id: int | None = None
    text: str | None = None


@message
class ReadSites:
    """Values at any locations of this forward, recomputed on a scratch fork from its start."""

    session_id: str
    seen: int
    locations: tuple[str, ...]
    what: Literal["summary", "tensor"] = "summary"
    tokens: Selector = ALL


@message
class ReadLensMap:
    """Logit lens at any residual locations of this forward, for `tokens`: recomputed on a scratch
    fork from its start, also at locations that are not reached yet."""

    session_id: str
    seen: int
    locations: tuple[str, ...]
    tokens: Selector = ALL
    top_k: int = 1


@message
class ReadDiff:
    """Compare two nodes, of one session or of two: the residual stream after every layer, by token.

    node, other_node: numbers of nodes, or of the stop that a session stands at. What differs is run
    again on two scratch forks, with the edits and tokens of then; only figures are answered.
    tokens: positions compared, those of the first node. lens: with the logit lens of what differs.
    """

    session_id: str
    node: int
    other_id: str
    other_node: int
    tokens: Selector = ALL
    lens: bool = True


@message
class ReadRouter:
    """Which experts a mixture of experts chose for the tokens of this forward, in one layer."""

    session_id: str
    seen: int
    layer: int


@message
class StoreVector:
    """Keep a named vector on the server, for this owner.

    value: `[width]`, made on `model` with these `weights` (empty: the model served). One of the
    same name is refused unless `replace`.
    """

    name: str
    value: Array
    location: str
    model: str = ""
    weights: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    replace: bool = False


@message
class ListVectors:
    """Ask for all named vectors of this owner."""


@message
class ReadVector:
    """A named vector with its numbers."""

    name: str


@message
class RemoveVector:
    name: str


@message
class ReadStory:
    """The events, moves and instructions of one session."""

    session_id: str


@message
class TokenTexts:
    """The text of token ids, each with its leading space.

    `joined`: one text instead, of all together as a reader reads it, without special tokens. Only
    so are characters whole that several tokens spell.
    """

    token_ids: tuple[int, ...]
    joined: bool = False


@message
class Tokenize:
    """Token ids of a text, as `Launch` would make them."""

    text: str
    add_special_tokens: bool = True


@message
class DescribeModel:
    pass


@message
class DescribeMemory:
    pass


@message
class PollEvents:
    """Wait up to `timeout_s` for events after sequence number `after`."""

    after: int
    timeout_s: float = 20.0


@message
class ReadChunk:
    """Part of a tensor being sent. A piece may be asked for again; `cancel` ends the transfer."""

    transfer_id: str
    offset: int
    length: int
    cancel: bool = False


@message
class BeginUpload:
    """Announce a tensor that will be sent in chunks."""

    dtype: str
    shape: tuple[int, ...]


@message
class WriteChunk:
    transfer_id: str
    offset: int
    data: Array
    cancel: bool = False
