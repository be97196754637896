"""What crosses between client and server: every request, response and event, as plain data.

One request is answered by one response on the same connection; what happens later comes as events,
pulled by sequence number. Anything that acts on a stop carries `seen`, the number of the stop the
caller saw (`SessionInfo.stop_number`); the server refuses a stale one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, dataclass_transform

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import DjinnError

PROTOCOL_VERSION = 1

#: name -> class, for every message and every part of one
MESSAGES: dict[str, type[Any]] = {}

_T = TypeVar("_T", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def message(cls: _T) -> _T:
    """Make `cls` a frozen keyword-only dataclass and register it with the codec."""
    made: Any = dataclass(frozen=True, slots=True, kw_only=True)(cls)
    MESSAGES[cls.__name__] = made
    return made  # type: ignore[no-any-return]


@cache
def contract_digest() -> str:
    """Short hash of every message's fields and types: equal where both sides mean the same."""
    shapes = [
        f"{name}({', '.join(f'{f.name}: {f.type}' for f in fields(cls))})"
        for name, cls in sorted(MESSAGES.items())
    ]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:12]


Status = Literal["waiting", "running", "stopped", "finished", "failed"]
STATUSES: tuple[Status, ...] = ("waiting", "running", "stopped", "finished", "failed")
Reason = Literal["entry", "breakpoint", "data breakpoint", "step", "pause", "exception"]
REASONS: tuple[Reason, ...] = (
    "entry", "breakpoint", "data breakpoint", "step", "pause", "exception",
)  # fmt: skip
When = Literal["any", "prefill", "decode"]
FinishReason = Literal["eos", "max_new_tokens"]
EditKind = Literal["scale", "add", "set", "zero"]
EDIT_KINDS: tuple[EditKind, ...] = ("scale", "add", "set", "zero")


# --- parts ------------------------------------------------------------------------------------


@message
class Selector:
    """Which tokens (absolute positions in the session) or which channels.

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
class EditSpec:
    """One change to a tensor. Computed in float32, rounded once to the model's dtype.

    scale: x * factor. add: x + alpha * value. set: value. zero: 0. `value` is a scalar `[]`, a
    vector `[channels]` or `[tokens, channels]`. For a value sent in chunks, `upload_id` names it.
    """

    kind: EditKind
    location: str
    tokens: Selector = ALL
    channels: Selector = ALL
    factor: float | None = None
    alpha: float = 1.0
    value: Array | None = None
    upload_id: str | None = None
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
    """A breakpoint as the session holds it. `location` is the canonical name."""

    id: int
    location: str
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
    tokens: tuple[int, ...]
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


# --- requests ---------------------------------------------------------------------------------


@message
class Initialize:
    """First call of a connection: who is calling, and which contract it speaks."""

    client: str
    protocol: int = PROTOCOL_VERSION
    #: the caller's own, so that builds that differ are told apart
    contract: str = field(default_factory=contract_digest)


@message
class Launch:
    """Make a session. It waits until it is continued, or stops on entry."""

    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
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


@message
class Next:
    """Run to the next layer's output (or the final norm, the logits, the next forward)."""

    session_id: str
    seen: int


@message
class StepOut:
    """Run to this forward's logits, before sampling."""

    session_id: str
    seen: int


@message
class RunTo:
    """Run until `location` is reached next, in this forward or a later one."""

    session_id: str
    seen: int
    location: str


@message
class Pause:
    """Stop at the next layer boundary."""

    session_id: str


@message
class Fork:
    """Copy a session that is not running; pages are shared until one of the two writes them."""

    session_id: str
    seed: int | None = None
    name: str | None = None


@message
class Terminate:
    """End a session and free what it holds."""

    session_id: str


@message
class SetBreakpoint:
    """Add a breakpoint to a session."""

    session_id: str
    location: str
    when: When = "any"
    condition: str | None = None
    ignore: int = 0
    once: bool = False


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


# --- responses --------------------------------------------------------------------------------


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
    """Figures of the tensor at a stop, and one row per token."""

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
    """Rows: one per layer or token. Texts are empty strings without a tokenizer."""

    #: what each row is: location names, or positions
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


# --- events -----------------------------------------------------------------------------------


@message
class Event:
    """Something that happened to a session. `session` is None for progress and for terminated."""

    seq: int
    kind: Literal[
        "launched", "continued", "progress", "stopped", "finished", "failed", "terminated",
        "changed",
    ]  # fmt: skip
    session_id: str
    session: SessionInfo | None = None
    #: of progress: tokens generated, of how many; during a prefill, layers done
    done: int = 0
    total: int = 0
    text: str = ""


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
