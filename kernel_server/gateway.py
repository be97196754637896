"""From bytes to an answer: decodes a request, adds what only the model's words can add, routes it.

Requests that change or read a session go to the loop. Text becomes token ids here, because the
state knows numbers only; events, transfers and the model's description never reach the state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from kernel_server.edit_values import with_value
from kernel_server.event_log import EventLog
from kernel_server.jobs import JOBS_PER_OWNER, Jobs
from kernel_server.loop import Loop
from kernel_server.pacing import Pacer
from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.conditions import parse_condition
from kernel_server.protocol.errors import (
    BadArgument,
    BadCondition,
    BadEdit,
    BadMessage,
    BadPrompt,
    BadSelector,
    DjinnError,
    ModelLoading,
    NoTokenizer,
    NotSupported,
)
from kernel_server.transfers import MAX_CHUNK, OWNER_BYTES, ArraySource, Transfers
from kernel_server.vectors import Vectors

log = logging.getLogger(__name__)

CAPABILITIES = (
    "breakpoints", "conditions", "data_breakpoints", "logpoints", "edits", "sticky_edits", "fork",
    "lens", "capture", "pause", "vectors", "chat", "step_back",
)  # fmt: skip

#: Longest prompt text accepted, characters; the context limits tokens later.
MAX_PROMPT_CHARACTERS = 4_000_000
#: An answer is held back for a session to rest for so long at most, seconds.
MAX_HELD_S = 0.25
#: Longest request besides its tensors, bytes: JSON is read in one piece that nobody interrupts.
MAX_HEADER_BYTES = 4 << 20


class Words(Protocol):
    """The tokenizer's side of a model: text to ids and the text of one id."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def text(self, token_id: int) -> str: ...

    @property
    def has_chat_template(self) -> bool: ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def ids(self, text: str) -> tuple[int, ...]: ...

    def all_texts(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Served:
    """What is there once the model is loaded."""

    loop: Loop
    model: m.ModelInfo
    words: Words | None
    memory: Callable[[], tuple[tuple[str, int, str], ...]]


class Told(Protocol):
    """What clients are told of a journal."""

    identity: str

    @property
    def trouble(self) -> str: ...


class Gateway:
    """Answers every request of every client; `ready` is called once the model is loaded.

    jobs: requests of one owner at a time. transfer_bytes: of one owner's tensors on their way.
    pacer: told what the engine does for an owner.
    """

    def __init__(
        self,
        server_id: str,
        version: str,
        events: EventLog,
        *,
        vectors: Vectors | None = None,
        debug: bool = False,
        jobs: int = JOBS_PER_OWNER,
        transfer_bytes: int = OWNER_BYTES,
        pacer: Pacer | None = None,
    ) -> None:
        self._journal: Told | None = None
        self.server_id = server_id
        self.version = version
        self.events = events
        self.transfers = Transfers(transfer_bytes)
        self.jobs = Jobs(jobs)
        self.pacer = pacer or Pacer()
        self.vectors = Vectors() if vectors is None else vectors
        self.debug = debug
        self._served: Served | None = None
        self._failure: DjinnError | None = None
        self._progress = ("starting", 0.0)
        # fast tokenizers are not safe to call from two threads at once
        self._words_lock = threading.Lock()

    # -- life of the server ---------------------------------------------------------------

    def loading(self, text: str, fraction: float) -> None:
        """Say how far the model is loaded, 0 to 1."""
        self._progress = (text, fraction)

    def keep(self, journal: Told | None) -> None:
        """Name the journal that clients are told of."""
        self._journal = journal

    def ready(self, served: Served) -> None:
        self.vectors.serve(served.model.name, _weights(served.model))
        self._served = served

    def failed(self, error: DjinnError) -> None:
        """The model could not be loaded: every later request gets this error."""
        self._failure = error

    # -- the one door ---------------------------------------------------------------------

    def handle(self, owner: str, connection_id: str, payload: bytes) -> bytes:
        """Answer one request; every failure is an `ErrorReply`.

        What needs the interpreter is done one call at a time per owner, so that of an owner's many
        connections one competes with the other owners; what waits for the engine does not hold
        that gate.
        """
        gate = self.jobs.gate(owner)
        try:
            with gate:
                request = self._decode(payload)
            if isinstance(request, _WAITING):
                response = self._answer(owner, request)
            else:
                ungated = contextlib.nullcontext()
                with self.jobs.one(owner), ungated if _uses_engine(request) else gate:
                    response = self._answer(owner, request)
                if isinstance(request, _RUNS):
                    response = self._rested(owner, request, response)
        except DjinnError as error:
            response = m.ErrorReply(error=m.error_info(error, self._trace(error)))
        except Exception as error:
            log.exception("request failed")
            response = m.ErrorReply(error=m.error_info(error, self._trace(error)))
        with gate:
            return codec.encode(response)

    def _rested(self, owner: str, request: Any, response: Any) -> Any:
        """The answer to a request that made a session run, told where it rests if that is soon.

        A stop a few layers on is told so at once, by one message instead of an answer and an event.
        Who asks does not hold the gate meanwhile; their connection is kept for that long.
        """
        wait_s = min(request.wait_s, MAX_HELD_S)
        if not wait_s > 0 or not isinstance(response, m.SessionReply):
            return response
        now = response.session
        if now.status != "running":
            return response
        found = self.events.rest(owner, now.id, now.event_seq, wait_s)
        return response if found is None else m.SessionReply(session=found)

    def _decode(self, payload: bytes) -> Any:
        header_bytes = int.from_bytes(payload[4:8], "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise BadMessage(
                f"the request has {header_bytes} bytes besides its tensors, at most"
                f" {MAX_HEADER_BYTES} are read: send less text or fewer token ids"
            )
        return codec.decode(payload)

    def _trace(self, error: Exception) -> str | None:
        return "".join(traceback.format_exception(error)) if self.debug else None

    def _answer(self, owner: str, request: Any) -> Any:
        match request:
            case m.Initialize():
                return self._initialize(owner, request)
            case m.PollEvents():
                return self.events.poll(owner, request.after, request.timeout_s)
            case m.ReadChunk() | m.BeginUpload() | m.WriteChunk():
                return self._transfer(owner, request)
        served = self._ready()
        match request:
            case m.DescribeModel():
                return m.ModelReply(model=served.model)
            case m.DescribeMemory():
                return m.MemoryReply(rows=served.memory())
            case m.Tokenize():
                ids = self._encode(served, request.text, request.add_special_tokens)
                return m.TokenIds(token_ids=tuple(ids))
            case m.TokenTexts():
                return m.Texts(texts=self._texts(served, request.token_ids, request.joined))
            case m.StoreVector() | m.ListVectors() | m.ReadVector() | m.RemoveVector():
                return self._vector(served, owner, request)
            case m.Launch():
                request = self._launch(served, request)
            case m.SetBreakpoint():
                request = self._breakpoint(served, owner, request)
            case m.AddEdit():
                request = dataclasses.replace(request, edit=self._edit(served, owner, request.edit))
            case m.Preview():
                edits = tuple(self._edit(served, owner, edit) for edit in request.edits)
                request = dataclasses.replace(request, edits=edits)
            case m.ReadAttribution():
                request = self._attribution(served, request)
            case (
                m.ReadValue() | m.ReadLens() | m.ReadLensMap() | m.ReadAttention() | m.ReadSites()
                | m.ReadDiff()
            ):  # fmt: skip
                request = dataclasses.replace(
                    request, tokens=self._selector(served, request.tokens)
                )
        if isinstance(request, m.LoadRecord):
            request = self._with_arrays(owner, request)
        if isinstance(request, m.ReadRecord):
            return self._record(owner, served.loop.request(owner, request))
        if not isinstance(request, _STATE_REQUESTS):
            raise BadMessage(f"{type(request).__name__} is not a request")
        if _uses_engine(request):
            return self._have_done(served, owner, request)
        return served.loop.request(owner, request)

    def _have_done(self, served: Served, owner: str, request: Any) -> Any:
        """Have the engine do something: one thing of an owner's at a time, counted as their time.

        The engine does it between two layers of whoever runs, who waits for it. Pages that leave or
        come are copied beside it, each way on its own, so these wait for their own kind alone, and
        what they take of others' time the loop counts.
        """
        if (beside := _BESIDE.get(type(request))) is not None:
            with self.jobs.turn(owner, beside):
                return served.loop.request(owner, request)
        with self.jobs.turn(owner):
            began = time.monotonic()
            try:
                return served.loop.request(owner, request)
            finally:
                self.pacer.spend(owner, time.monotonic() - began)

    def _ready(self) -> Served:
        if self._failure is not None:
            raise self._failure
        if self._served is None:
            text, fraction = self._progress
            raise ModelLoading(
                f"the model is still loading ({text}, {fraction:.0%}): wait, or watch with"
                " 'python -m kernel_server status'"
            )
        return self._served

    def _initialize(self, owner: str, request: m.Initialize) -> m.Initialized:
        if request.protocol != m.PROTOCOL_VERSION:
            raise NotSupported(
                f"the client speaks protocol {request.protocol}, this server"
                f" {m.PROTOCOL_VERSION} (djinn-nb {self.version}): install the same version on both"
            )
        if request.contract != m.contract_digest():
            raise NotSupported(
                f"client and server (djinn-nb {self.version}) are of different builds: install the"
                " same one on both sides, and start the server again"
            )
        text, fraction = self._progress
        phase: Literal["loading", "ready", "failed"] = "loading"
        if self._failure is not None:
            phase = "failed"
        elif self._served is not None:
            phase = "ready"
        return m.Initialized(
            server_id=self.server_id,
            version=self.version,
            protocol=m.PROTOCOL_VERSION,
            phase=phase,
            progress=text,
            fraction=1.0 if self._served else fraction,
            capabilities=CAPABILITIES,
            event_seq=self.events.last_seq(owner),
            error=m.error_info(self._failure) if self._failure else None,
            journal=self._journal.identity if self._journal else "",
            not_durable=self._journal.trouble if self._journal else "",
        )

    # -- transfers ------------------------------------------------------------------------

    def _transfer(self, owner: str, request: Any) -> Any:
        if isinstance(request, m.BeginUpload):
            key = self.transfers.begin(owner, request.dtype, request.shape)
            return m.UploadReply(transfer_id=key, received=0)
        if request.cancel:
            self.transfers.cancel(owner, request.transfer_id)
            if isinstance(request, m.WriteChunk):
                return m.UploadReply(transfer_id=request.transfer_id, received=0)
            return m.Chunk(offset=request.offset, data=Array("uint8", (0,), b""))
        if isinstance(request, m.WriteChunk):
            received = self.transfers.write(
                owner, request.transfer_id, request.offset, request.data.data
            )
            return m.UploadReply(transfer_id=request.transfer_id, received=received)
        data = self.transfers.read(owner, request.transfer_id, request.offset, request.length)
        return m.Chunk(offset=request.offset, data=Array("uint8", (len(data),), data))

    def _with_arrays(self, owner: str, request: m.LoadRecord) -> m.LoadRecord:
        """The record's arrays where it names uploads."""
        parts = []
        for part in request.arrays:
            if (part.data is None) == (part.upload_id is None):
                raise BadMessage("an array of a record is either here, or was uploaded")
            data = part.data
            if part.upload_id is not None:
                data = self.transfers.take(owner, part.upload_id)
            parts.append(m.ArrayPart(data=data))
        return dataclasses.replace(request, arrays=tuple(parts))

    def _record(self, owner: str, reply: Any) -> Any:
        """Large arrays of a record go in chunks."""
        if not isinstance(reply, m.RecordReply):
            return reply
        arrays = tuple(
            one
            if one.data is None or one.nbytes <= MAX_CHUNK
            else dataclasses.replace(
                one, data=None, transfer_id=self.transfers.offer(owner, ArraySource(one.data))
            )
            for one in reply.arrays
        )
        return dataclasses.replace(reply, arrays=arrays)

    # -- named vectors --------------------------------------------------------------------

    def _vector(self, served: Served, owner: str, request: Any) -> Any:
        match request:
            case m.StoreVector():
                info = self.vectors.store(
                    owner,
                    request.name,
                    request.value.numpy(),
                    location=request.location,
                    model=request.model or served.model.name,
                    weights=request.weights or _weights(served.model),
                    provenance=request.provenance,
                    replace=request.replace,
                )
                return m.VectorReply(vector=info)
            case m.ReadVector():
                entry = self.vectors.read(owner, request.name)
                return m.VectorReply(vector=entry.info, value=Array.from_numpy(entry.array))
            case m.RemoveVector():
                self.vectors.remove(owner, request.name)
        return m.Vectors(vectors=self.vectors.listed(owner))

    # -- words ----------------------------------------------------------------------------

    def _words(self, served: Served, what: str, instead: str) -> Words:
        if served.words is None:
            raise NoTokenizer(
                f"{served.model.name} has no tokenizer, so {what} is not possible: {instead}"
            )
        return served.words

    def _encode(self, served: Served, text: str, add_special_tokens: bool) -> list[int]:
        words = self._words(served, "a text prompt", "give a list of token ids")
        _check_length(len(text))
        with self._words_lock:
            return words.encode(text, add_special_tokens=add_special_tokens)

    def _texts(self, served: Served, token_ids: tuple[int, ...], joined: bool) -> tuple[str, ...]:
        size = served.model.vocab_size
        if bad := [i for i in token_ids if not 0 <= i < size]:
            raise BadArgument(f"token id {bad[0]} lies outside the vocabulary (0 to {size - 1})")
        if served.words is None:
            return ("",) * (1 if joined else len(token_ids))
        with self._words_lock:
            if joined:
                return (served.words.decode(token_ids),)
            return tuple(served.words.text(i) for i in token_ids)

    def _launch(self, served: Served, request: m.Launch) -> m.Launch:
        given = (request.prompt, request.token_ids, request.messages)
        if sum(one is not None for one in given) != 1:
            raise BadPrompt("give the prompt as a text, as token ids, or as chat messages")
        if request.messages is not None:
            ids = self._encode_chat(served, request.messages)
        elif request.prompt is None:
            return request
        elif not request.prompt:
            raise BadPrompt("the prompt is empty: give at least one token")
        else:
            ids = self._encode(served, request.prompt, request.add_special_tokens)
        return dataclasses.replace(request, prompt=None, messages=None, token_ids=tuple(ids))

    def _encode_chat(self, served: Served, messages: Sequence[m.ChatMessage]) -> list[int]:
        words = self._words(served, "a conversation", "give a list of token ids")
        if not words.has_chat_template:
            raise NotSupported(
                f"{served.model.name} has no chat template, so a conversation has no form of its"
                " own: write it as one text and launch that"
            )
        if not messages or not all(one.role for one in messages):
            raise BadPrompt("messages are one or more turns, each with a role and its content")
        _check_length(sum(len(one.role) + len(one.content) for one in messages))
        with self._words_lock:
            return words.encode_chat(
                [{"role": one.role, "content": one.content} for one in messages]
            )

    def _selector(self, served: Served, selector: m.Selector) -> m.Selector:
        """Fill in the token ids of a text selector."""
        if selector.kind != "text" or selector.text is None:
            return selector
        ids = self._ids_of(
            served, selector.text, "selecting tokens by text", "give their positions"
        )
        if not ids:
            raise BadSelector(
                f"no token has the text {selector.text!r}{self._near(served, selector.text)}"
            )
        return dataclasses.replace(selector, token_ids=ids)

    def _ids_of(self, served: Served, text: str, what: str, instead: str) -> tuple[int, ...]:
        words = self._words(served, what, instead)
        with self._words_lock:
            return words.ids(text)

    def _near(self, served: Served, text: str) -> str:
        """A hint: tokens that differ from `text` by spaces or a letter or two."""
        assert served.words is not None
        with self._words_lock:
            texts = served.words.all_texts()
        same = sorted({t for t in texts if t.strip() == text.strip() and t.strip()})
        near = same or difflib.get_close_matches(text, texts[:50_000], n=1, cutoff=0.7)
        return f"; did you mean {near[0]!r}?" if near else ""

    def _breakpoint(self, served: Served, owner: str, request: m.SetBreakpoint) -> m.SetBreakpoint:
        """Fill in what the texts of a condition stand for. A text that no token has would never
        hold, so it is refused now."""
        request = dataclasses.replace(
            request, tokens=self._selector(served, request.tokens), text_ids=(), vectors=()
        )
        if request.condition is None:
            return request
        condition = parse_condition(request.condition)
        if "top_token" in condition.names:
            self._words(served, "a condition on top_token", "use entropy or top_token_changed")
        ids: dict[str, tuple[int, ...]] = {}
        for text in (*condition.token_texts, *condition.prob_texts):
            what = "a condition on the text of a token"
            ids[text] = self._ids_of(served, text, what, "compare token_id with a number")
            if not ids[text]:
                raise BadCondition(
                    f"no token of this model has the text {text!r}, so the condition cannot be"
                    f" judged by it{self._near(served, text)}"
                )
        found = [(name, self.vectors.get(owner, name).array) for name in condition.vectors]
        return dataclasses.replace(
            request,
            text_ids=tuple(
                m.TextIds(text=text, token_ids=ids[text]) for text in condition.prob_texts
            ),
            vectors=tuple(
                m.NamedArray(name=name, value=Array.from_numpy(array)) for name, array in found
            ),
        )

    def _attribution(self, served: Served, request: m.ReadAttribution) -> m.ReadAttribution:
        """Fill in the id of a text; one text must be one token."""
        if request.text is None or request.token_id is not None:
            return request
        ids = self._ids_of(served, request.text, "attribution by text", "give a token id")
        if len(ids) != 1:
            raise BadArgument(
                f"{len(ids) or 'no'} tokens have the text {request.text!r}: name one token, by its"
                f" id if need be{self._near(served, request.text) if not ids else ''}"
            )
        return dataclasses.replace(request, token_id=ids[0], text=None)

    def _edit(self, served: Served, owner: str, edit: m.EditSpec) -> m.EditSpec:
        """The edit in numbers: of texts, uploads, named vectors and values at other stops."""
        if edit.source is not None:
            tokens = self._selector(served, edit.source.tokens)
            source = dataclasses.replace(edit.source, tokens=tokens)
            edit = dataclasses.replace(edit, source=source)
        if edit.token_texts:
            edit = dataclasses.replace(edit, token_ids=self._ids_of_edit(served, edit))
        edit = dataclasses.replace(edit, tokens=self._selector(served, edit.tokens))
        return with_value(
            edit, owner, loop=served.loop, transfers=self.transfers, vectors=self.vectors
        )

    def _ids_of_edit(self, served: Served, edit: m.EditSpec) -> tuple[int, ...]:
        """Ids of the tokens that an edit of the next token names by their texts."""
        if edit.token_ids:
            raise BadEdit("the tokens are named by ids and by texts: give one of them")
        found: list[int] = []
        for text in edit.token_texts:
            ids = self._ids_of(served, text, f"{edit.kind} by a token's text", "give its id")
            if not ids:
                raise BadEdit(
                    f"no token of this model has the text {text!r}{self._near(served, text)}"
                )
            if len(ids) > 1 and edit.kind != "ban":
                listed = ", ".join(map(str, ids[:8]))
                raise BadEdit(
                    f"{len(ids)} tokens have the text {text!r}, and {edit.kind} takes one: give"
                    f" the id of one of them ({listed})"
                )
            found += ids
        return tuple(found)


def _check_length(characters: int) -> None:
    if characters > MAX_PROMPT_CHARACTERS:
        raise BadPrompt(
            f"the prompt has {characters} characters, more than {MAX_PROMPT_CHARACTERS}"
        )


def _weights(model: m.ModelInfo) -> str:
    return str(model.fingerprint.get("weights", ""))


_STATE_REQUESTS = (
    m.Launch, m.Describe, m.ListSessions, m.Continue, m.Next, m.StepIn, m.StepOut, m.RunTo, m.Pause,
    m.Evict, m.Restore, m.Pin, m.Hint, m.SetBudget, m.Fork, m.Terminate, m.SetBreakpoint,
    m.EnableBreakpoint, m.RemoveBreakpoint, m.AddEdit, m.EnableEdit, m.RemoveEdit, m.UndoEdit,
    m.ReadValue, m.ReadLens, m.ReadCapture, m.ReadLogits, m.ReadLog, m.ReadStory, m.Preview,
    m.ReadAttention, m.ReadAttribution, m.ReadSites, m.ReadRouter, m.ReadDiff,
    m.ReadLensMap,
    m.StepBack, m.Rewind, m.GoTo, m.ListBranches, m.PruneBranch, m.Accept,
    m.ReadRecord, m.LoadRecord,
)  # fmt: skip

#: Requests that wait for something to happen, and a pause, which must always get through; the
#: others are jobs.
_WAITING = (m.Initialize, m.PollEvents, m.Pause)
#: Requests that the state answers at once; the other ones about sessions wait for the engine.
_AT_ONCE = (
    m.Launch, m.Describe, m.ListSessions, m.Continue, m.Next, m.StepIn, m.StepOut, m.RunTo, m.Pause,
    m.Pin, m.Hint, m.SetBudget, m.Fork, m.Terminate, m.SetBreakpoint, m.EnableBreakpoint,
    m.RemoveBreakpoint, m.ReadStory,
    m.StepBack, m.Rewind, m.GoTo, m.ListBranches, m.PruneBranch, m.Accept,
    m.ReadRecord, m.LoadRecord,
)  # fmt: skip
#: Requests that make a session run.
_RUNS = (
    m.Continue, m.Next, m.StepIn, m.StepOut, m.RunTo, m.StepBack, m.Rewind, m.GoTo,
)  # fmt: skip
#: Requests that the engine only begins.
_BESIDE: dict[type, str] = {m.Evict: "pages that leave", m.Restore: "pages that come"}


def _uses_engine(request: Any) -> bool:
    """Whether the request is carried out by the engine, between two layers."""
    return isinstance(request, _STATE_REQUESTS) and not isinstance(request, _AT_ONCE)
