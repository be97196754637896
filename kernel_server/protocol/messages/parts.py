"""What requests, responses and events are made of: sessions, stops, breakpoints, edits."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import DjinnError
from kernel_server.protocol.messages.base import message
from kernel_server.protocol.token_list import TokenList

Status = Literal["waiting", "running", "stopped", "finished", "failed"]
STATUSES: tuple[Status, ...] = ("waiting", "running", "stopped", "finished", "failed")
Reason = Literal["entry", "breakpoint", "data breakpoint", "step", "pause", "exception"]
REASONS: tuple[Reason, ...] = (
    "entry", "breakpoint", "data breakpoint", "step", "pause", "exception",
)  # fmt: skip
When = Literal["any", "prefill", "decode"]
FinishReason = Literal["eos", "max_new_tokens"]
BreakpointKind = Literal["breakpoint", "data breakpoint", "logpoint"]
BREAKPOINT_KINDS: tuple[BreakpointKind, ...] = ("breakpoint", "data breakpoint", "logpoint")
LogContent = Literal["summary", "tensor"]
EditKind = Literal[
    "scale", "add", "set", "zero", "clamp", "project_out", "mean", "swap",
    "force", "ban", "replace",
]  # fmt: skip
EDIT_KINDS: tuple[EditKind, ...] = (
    "scale", "add", "set", "zero", "clamp", "project_out", "mean", "swap",
    "force", "ban", "replace",
)  # fmt: skip


@message
class Selector:
    """Which tokens (absolute positions in the session), which heads, or which channels.

    `all`, `prompt`, `generated`: by phase (tokens only, except `all`). `indices`: the numbers
    listed, negative ones from the end. `slice`: `start`, `stop`, `step` as in Python. `text`:
    tokens whose text is `text`, or, once the server has resolved it, whose id is in `token_ids`.
    """

    kind: Literal["all", "prompt", "generated", "indices", "slice", "text"]
    indices: tuple[int, ...] = ()
    start: int | None = None
    stop: int | None = None
    step: int | None = None
    text: str | None = None
    token_ids: tuple[int, ...] = ()


ALL = Selector(kind="all")


@message
class SiteLayout:
    """The tensor at a site of one layer: `[tokens, width]`, or `[tokens, heads, width]`.

    Channels are counted along the last axis; with heads flattened, head i has those from i * width
    on. heads: None where a vector has none. width 0: as many as there are keys
    (`attention.pattern`).
    """

    site: str
    heads: int | None
    width: int


@message
class PatchSource:
    """The value at another session's stop, or a part of it, to be taken as an edit's value."""

    session_id: str
    seen: int
    tokens: Selector = ALL
    heads: Selector = ALL
    channels: Selector = ALL
    #: where that stop is; found by the server, whatever a client says
    location: str = ""


@message
class EditSpec:
    """One change to a tensor. Computed in float32, rounded once to the model's dtype.

    scale: x * factor. add: x + alpha * value. set: value. zero: 0. clamp: between `minimum` and
    `maximum`. project_out: without its part along `value`. mean: the mean over the tokens chosen.
    swap: the two tokens chosen change places. At the logits only, of the next token: force
    `token_ids[0]`, ban all of `token_ids`, replace the first by the second.

    `value` is a scalar `[]`, a vector `[channels]` or `[tokens, channels]`, heads flattened. One
    sent in chunks is named by `upload_id`, one that the server keeps by `vector`, one taken from
    another stop by `source`; the edit itself stores the numbers.
    """

    kind: EditKind
    location: str
    tokens: Selector = ALL
    heads: Selector = ALL
    channels: Selector = ALL
    factor: float | None = None
    alpha: float = 1.0
    minimum: float | None = None
    maximum: float | None = None
    value: Array | None = None
    upload_id: str | None = None
    vector: str | None = None
    #: take a named vector that was made on another model
    inexact: bool = False
    source: PatchSource | None = None
    token_ids: tuple[int, ...] = ()
    #: instead of `token_ids`; the server resolves them
    token_texts: tuple[str, ...] = ()
    sticky: bool = False


@message
class EditInfo:
    """An edit as the session holds it, with what it did last and over all forwards."""

    id: int
    kind: EditKind
    location: str
    description: str
    sticky: bool
    enabled: bool
    #: the forward in which it was made, and the first one it may apply in
    forward: int
    #: True while it is part of the stop the session stands at
    at_this_stop: bool
    elements_changed: int | None = None
    norm_before: float | None = None
    norm_after: float | None = None
    tokens_matched: tuple[int, ...] = ()
    forwards_matched: int = 0
    forwards_unmatched: int = 0
    note: str | None = None


@message
class BreakpointInfo:
    """A breakpoint as the session holds it. `locations` are canonical names, in order.

    A data breakpoint watches a value at each of its locations; a logpoint notes what it finds and
    lets the session pass. `location` is the first of several.
    """

    id: int
    location: str
    locations: tuple[str, ...] = ()
    kind: BreakpointKind = "breakpoint"
    when: When
    condition: str | None
    ignore: int
    once: bool
    enabled: bool
    #: times the location was reached in a matching forward while enabled
    hits: int = 0
    #: of these, times the condition held
    held: int = 0
    #: of these, times the session stopped
    stops: int = 0
    #: of a logpoint: what it notes, records kept, those lost because there was no room, bytes that
    #: the kept ones take, and bytes they may take
    what: LogContent = "summary"
    records: int = 0
    dropped: int = 0
    log_bytes: int = 0
    max_bytes: int = 0


@message
class ErrorInfo:
    """An error as data: its class by `code`, its line, and values a program may use."""

    code: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    traceback: str | None = None


@message
class StopInfo:
    """Where and why a session stands."""

    number: int
    reason: Reason
    location: str
    forward: int
    #: absolute positions fed in this forward, half-open
    first_token: int
    end_token: int
    layers_executed: int
    hit_tokens: tuple[int, ...] = ()
    hit_breakpoints: tuple[int, ...] = ()
    error: ErrorInfo | None = None


@message
class SessionInfo:
    """All a client needs to show a session; no tensors."""

    id: str
    name: str
    owner: str
    status: Status
    #: prompt and generated token ids
    tokens: TokenList
    num_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    #: current forward, and the location last reached in it (None before the first)
    forward: int
    location: str | None
    layers_executed: int
    layers_replayed: int
    stop_number: int
    stop: StopInfo | None
    finish_reason: FinishReason | None
    error: ErrorInfo | None
    parent: str | None
    num_pages: int
    kv_bytes: int
    revision: int
    #: sequence number of the last event that was published when this was written
    event_seq: int
    breakpoints: tuple[BreakpointInfo, ...] = ()
    edits: tuple[EditInfo, ...] = ()
    #: of its pages, how many lie in each tier; a page may lie in several
    device_pages: int = 0
    host_pages: int = 0
    disk_pages: int = 0
    #: its pages never leave the device
    pinned: bool = False
    #: it came back after a restart, or its lease ended: its tensors are computed again when they
    #: are needed
    dormant: bool = False
    #: it is dormant because its lease ended
    lease_ended: bool = False
    #: it has gone on under another execution fingerprint than its own
    inexact: bool = False
    #: why it may not go on here, unless that is accepted; None: it may
    refused: str | None = None
    #: computed again under another fingerprint, the first forward whose token came out otherwise;
    #: the recorded one was taken
    differs_from: int | None = None


@message
class ModelInfo:
    """The model served: sizes, tokenizer, fingerprint, and how the load check went."""

    name: str
    architecture: str
    random_weights: bool
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int
    dtype: str
    device: str
    num_parameters: int
    has_tokenizer: bool
    eos_token_ids: tuple[int, ...]
    fingerprint: dict[str, Any]
    config: dict[str, Any]
    #: lines of the module tree: (path, class, parameter shapes)
    modules: tuple[tuple[str, str, str], ...]
    load_check: dict[str, Any]
    #: what can be seen and edited inside each layer, in the order of a forward
    sites: tuple[tuple[SiteLayout, ...], ...] = ()
    #: site -> why the load check switched it off, in some layers or all
    sites_off: dict[str, Any] = field(default_factory=dict)
    #: most tokens of a prompt where less than `max_context`: attention masks bound it (Cache route)
    max_prompt: int | None = None


@message
class Budget:
    """Bytes of a tier that may be used, that are used, and that there are."""

    tier: Literal["device", "host", "disk"]
    nbytes: int
    used: int
    allocated: int


@message
class ChatMessage:
    """One turn of a conversation, put into the model's own chat template."""

    role: str
    content: str


@message
class LogRecord:
    """What a logpoint noted at one location of one forward, of one token or several.

    per_token: float32 [tokens, 2], norm and largest magnitude. num_nan: int32 [tokens]. value: the
    tensor `[tokens, channels]`, when the logpoint notes tensors. Many tokens take several records.
    """

    seq: int
    forward: int
    location: str
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    per_token: Array
    num_nan: Array
    value: Array | None = None


@message
class TextIds:
    """A text of a condition, and the ids of the tokens that read so."""

    text: str
    token_ids: tuple[int, ...]


@message
class NamedArray:
    """The numbers of a named vector, float32 [width], as they were when they were asked for."""

    name: str
    value: Array


@message
class VectorInfo:
    """A named vector that the server keeps: a direction, and how it was made.

    provenance: plain values, such as the method, the prompts and the date.
    """

    name: str
    width: int
    norm: float
    location: str
    #: the model it was made on, and the hash of that model's weights
    model: str = ""
    weights: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    #: what is wrong with its file; it can only be removed then
    broken: str | None = None


def error_info(error: BaseException, traceback: str | None = None) -> ErrorInfo:
    """An exception as data; anything that is not ours becomes a ServerFault."""
    if isinstance(error, DjinnError):
        return ErrorInfo(
            code=error.code, message=error.message, details=error.details, traceback=traceback
        )
    text = str(error).splitlines()
    line = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
    return ErrorInfo(
        code="ServerFault", message=f"internal error: {line}", details={}, traceback=traceback
    )
