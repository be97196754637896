"""What a server answers."""

from __future__ import annotations

from typing import Literal

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.messages.base import message
from kernel_server.protocol.messages.events import Event
from kernel_server.protocol.messages.parts import (
    BreakpointInfo,
    Budget,
    EditInfo,
    ErrorInfo,
    LogRecord,
    ModelInfo,
    Reason,
    SessionInfo,
    Status,
    VectorInfo,
)
from kernel_server.protocol.messages.records import SessionRecord


@message
class Initialized:
    server_id: str
    version: str
    protocol: int
    #: "loading" (with progress) or "ready"
    phase: Literal["loading", "ready", "failed"]
    progress: str
    fraction: float
    capabilities: tuple[str, ...]
    #: sequence number of the newest event: where to start polling
    event_seq: int
    error: ErrorInfo | None = None
    #: of the journal that this server goes on with: equal after a restart; empty without one
    journal: str = ""
    #: why sessions are not durable at present; empty: they are, or there is no journal
    not_durable: str = ""


@message
class Sessions:
    sessions: tuple[SessionInfo, ...]


@message
class SessionReply:
    """The session after a control request was accepted."""

    session: SessionInfo


@message
class Terminated:
    session_id: str


@message
class BreakpointReply:
    breakpoint: BreakpointInfo


@message
class EditReply:
    """The edits of the session after the request, and the one it was about (None: removed)."""

    edit: EditInfo | None
    edits: tuple[EditInfo, ...]


@message
class Summary:
    """Figures of the tensor at a stop, and one row per token.

    shape: `[tokens, channels]`, or `[tokens, heads, channels]` where the site has heads.
    """

    location: str
    dtype: str
    shape: tuple[int, ...]
    minimum: float
    maximum: float
    mean: float
    norm: float
    num_nan: int
    num_inf: int
    #: float32 [tokens, 2]: norm and largest magnitude of each token's vector
    per_token: Array


@message
class TensorReply:
    """A tensor: inline when small, else a transfer to be read in chunks."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    data: Array | None = None
    transfer_id: str | None = None


@message
class LensReply:
    """Rows: one per layer or token; of a lens map one per location and token, by location. Texts
    are empty strings without a tokenizer."""

    #: the location of each row
    rows: tuple[str, ...]
    positions: tuple[int, ...]
    token_ids: Array
    texts: tuple[tuple[str, ...], ...]
    probabilities: Array
    #: float32 [rows], nats
    entropy: Array


@message
class CaptureReply:
    """float32 [rows, tokens] each, NaN counts int64 [rows]; rows are embedding and layers."""

    locations: tuple[str, ...]
    first_token: int
    norm: Array
    largest: Array
    num_nan: Array


@message
class PreviewReply:
    """The next token's distribution without the edits and with them; `kl` in nats, of the second
    from the first. The logits are float32 [vocabulary], None unless they were asked for."""

    before: LensReply
    after: LensReply
    kl: float
    logits_before: TensorReply | None
    logits_after: TensorReply | None
    #: elements that each edit changed in this forward
    elements_changed: tuple[int, ...] = ()


@message
class RecordReply:
    """All that determines a session, and the arrays that its record names by index."""

    record: SessionRecord
    arrays: tuple[TensorReply, ...]


@message
class AttentionReply:
    """Attention weights `[tokens, heads, keys]` of these heads and positions."""

    heads: tuple[int, ...]
    positions: tuple[int, ...]
    weights: TensorReply


@message
class AttributionReply:
    """Parts of a logit: float32 [parts], summing to `logit` up to `rest`.

    kinds: `embedding`, `head`, `attention` (what a layer's heads leave over), `mlp` or `bias`.
    """

    token_id: int
    text: str
    kinds: tuple[str, ...]
    #: -1 outside the layers
    layers: tuple[int, ...]
    #: -1 where the part is no head's
    heads: tuple[int, ...]
    values: Array
    logit: float
    rest: float
    note: str | None = None


@message
class SiteValue:
    """The value at one location: its summary, or its elements."""

    location: str
    summary: Summary | None = None
    tensor: TensorReply | None = None


@message
class SitesReply:
    """One value per location asked for."""

    values: tuple[SiteValue, ...]
    positions: tuple[int, ...]


@message
class DiffReply:
    """Two nodes compared, `[locations, tokens]`: the embedding and every layer's output.

    changed: int32, elements whose bits differ, -1 where one of the two has not run. The others are
    float32, NaN there: cosine, L2 norm of the difference, L2 norm of each, and the divergence of
    the other's logit lens from the first's in nats, NaN too where it was not asked for.
    """

    locations: tuple[str, ...]
    positions: tuple[int, ...]
    changed: Array
    cosine: Array
    difference: Array
    norm: Array
    other_norm: Array
    kl: Array
    #: prompt and generated, up to each node; and how many of them are the prompt
    token_ids: tuple[int, ...]
    other_token_ids: tuple[int, ...]
    num_prompt_tokens: int
    other_num_prompt_tokens: int
    #: positions before it are of a common past, and were not run again
    first_token: int
    #: tokens, of the last ones, whose lens was compared; None: of all that were asked for
    lens_tokens: int | None = None


@message
class RouterReply:
    """Chosen experts and their weights `[tokens, chosen]`, and the router's logits
    `[tokens, experts]`."""

    first_token: int
    experts: Array
    weights: Array
    logits: Array


@message
class LogReply:
    """Records in order; `last_seq` is the newest there is, `dropped` what had no room."""

    records: tuple[LogRecord, ...]
    last_seq: int
    dropped: int


@message
class VectorReply:
    vector: VectorInfo
    value: Array | None = None


@message
class Vectors:
    vectors: tuple[VectorInfo, ...]


@message
class NodeInfo:
    """A place where a session stood still, and can return to."""

    #: that of the stop at which it was made
    number: int
    parent: int | None
    status: Status
    reason: Reason | None
    forward: int
    location: str | None
    #: prompt and generated
    num_tokens: int
    num_edits: int
    current: bool
    #: its tensors are kept; else its forward is run again
    kept: bool
    #: empty: on the way to where the session stands
    branch: str = ""


@message
class Branches:
    """num_forgotten: nodes that are not listed any more, since there were too many."""

    session_id: str
    nodes: tuple[NodeInfo, ...]
    num_forgotten: int = 0


@message
class StoryReply:
    lines: tuple[str, ...]


@message
class Texts:
    texts: tuple[str, ...]


@message
class TokenIds:
    token_ids: tuple[int, ...]


@message
class ModelReply:
    model: ModelInfo


@message
class MemoryReply:
    """Rows of (kind, bytes, note)."""

    rows: tuple[tuple[str, int, str], ...]


@message
class BudgetReply:
    """The tiers that were named."""

    budgets: tuple[Budget, ...]


@message
class Chunk:
    offset: int
    data: Array


@message
class UploadReply:
    transfer_id: str
    received: int


@message
class ErrorReply:
    error: ErrorInfo


@message
class Events:
    """Events after the one asked for; `missed` when older ones are gone (describe anew)."""

    events: tuple[Event, ...]
    last_seq: int
    missed: bool = False
