"""Typed calls to one server, tensors in chunks, and what the server's events have told.

Messages become bytes here and answers become values or exceptions. The public objects (`Server`,
`Session`, `Stopped`) share one `Client`; they decide what to ask, this file only how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from djinn_nb.leases import Leases
from djinn_nb.progress import Progress
from djinn_nb.restarts import Durability, identity, wait_until_ready
from djinn_nb.swaps import Swaps
from djinn_nb.transport import Transport
from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BadMessage, ConnectionLost, UnknownSession
from kernel_server.protocol.token_list import TokenList
from kernel_server.wire import PlainConnection

_Reply = TypeVar("_Reply")

#: Answer expected within this, seconds; computing answers (lens, large summaries) get longer.
CALL_S, COMPUTE_S = 30.0, 300.0
#: Tensors travel in pieces of this size; up to one piece they travel inside the call.
CHUNK_BYTES = 1 << 20
#: How long one poll for events waits at the server, seconds.
POLL_WAIT_S = 10.0
#: Events that an answer has overtaken are waited for at most so long, seconds.
CATCH_UP_S = 2.0
#: Most token ids asked for in one call: their texts must fit into one frame.
TEXTS_PER_CALL = 20_000


class Client:
    """One server as seen by this process: `call`, tensor transfers, newest `SessionInfo`s."""

    def __init__(self, transport: Transport, name: str) -> None:
        self.transport = transport
        self.mirror = Mirror()
        self._name = name
        self._texts: dict[int, str] = {}
        #: the newest list of which every text is known: forks and stops ask for the same again
        self._learnt = TokenList()
        self.durability = Durability()
        self.leases = Leases()
        #: the server that answers now goes on with the sessions of the one before
        self.restarted = False
        self.initialized = self.initialize()
        self.durability.take(self.initialized.not_durable)
        self._model: m.ModelInfo | None = None
        #: why events do not come at present; None while they do
        self.trouble: Exception | None = None
        weakref.finalize(self, transport.close)
        greet = weakref.WeakMethod(self._greet)  # the transport holds no client
        transport.greet(lambda connection: (greet() or _nobody)(connection))
        self._listen(self.initialized.event_seq)

    # -- calls ----------------------------------------------------------------------------

    def call(
        self,
        message: Any,
        reply: type[_Reply],
        *,
        timeout_s: float = CALL_S,
        bulk: bool = False,
        opens: Opened | None = None,
    ) -> _Reply:
        """Send a request and return its answer; raises the server's error by its class.

        opens: takes note of the transfer that the answer opens, even if nobody waits for it.
        """
        payload = codec.encode(message)
        self.leases.asked(message)
        told = None if opens is None else opens.answered
        channel: Any = "bulk" if bulk else "control"
        while True:
            guard = self._guard(message)
            answer = codec.decode(self.transport.request(payload, channel, timeout_s, told, guard))
            if not isinstance(answer, m.ErrorReply):
                break
            # a server that was restarted has its sessions, and computes them when asked
            if not wait_until_ready(self, answer.error):
                codec.raise_error(answer.error)
        if not threading.current_thread().name.startswith("djinn-"):  # where nobody would see it
            self.durability.warn()
            self.leases.warn()
        if not isinstance(answer, reply):
            raise BadMessage(
                f"the server answered {type(message).__name__} with {type(answer).__name__}:"
                " client and server are of different versions"
            )
        return answer

    def _guard(self, message: Any) -> Callable[[], None] | None:
        """Refuses to send what is about a session of a server that is no longer there: another
        one at the same address may have a session of the same id."""
        if not hasattr(message, "session_id"):
            return None
        expected = self.identity

        def check() -> None:
            if self.identity != expected:
                raise UnknownSession(self.other_server(message.session_id))

        return check

    def other_server(self, session_id: str) -> str:
        """Says that a session's server has gone and another one stands in its place."""
        return (
            f"session {session_id} was on a server that has ended; {self.transport.address} is"
            " another one now: launch again"
        )

    def _greet(self, connection: PlainConnection) -> None:
        """Learn who answers on a new connection; runs on its I/O thread."""
        request = codec.encode(m.Initialize(client=self._name))
        answer = codec.decode(connection.call(request, CALL_S))
        if not isinstance(answer, m.Initialized):
            return  # whoever calls is told what is wrong with it
        if answer.server_id != self.initialized.server_id:
            # its events are numbered from the start; its sessions are others, or described anew
            self.mirror.forget_sessions()
            self.leases.forget()
            self.restarted = identity(answer) == self.identity
            self.initialized = answer
            self.durability.take(answer.not_durable)
            self._model = None
            self._texts, self._learnt = {}, TokenList()
            self._listen(answer.event_seq)

    def initialize(self) -> m.Initialized:
        """Ask the server who it is and how far its model is loaded."""
        return self.call(m.Initialize(client=self._name), m.Initialized)

    @property
    def identity(self) -> str:
        """Equal as long as the server, or one restarted in its place, has the same sessions."""
        return identity(self.initialized)

    def is_dormant(self, session_id: str) -> bool:
        """Whether a session that came back is not yet computed again."""
        return self.describe(session_id).dormant

    def control(self, message: Any) -> m.SessionInfo:
        """A request about a session that is answered with the session."""
        info = self.call(message, m.SessionReply).session
        self.mirror.update(info)
        return info

    def describe(self, session_id: str) -> m.SessionInfo:
        """The session as it is now."""
        return self.control(m.Describe(session_id=session_id))

    @property
    def known_model(self) -> m.ModelInfo | None:
        """The model served, if it has been asked for."""
        return self._model

    @property
    def model(self) -> m.ModelInfo:
        """The model served, asked for once."""
        if self._model is None:
            self._model = self.call(m.DescribeModel(), m.ModelReply).model
        return self._model

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token, empty without a tokenizer; each id is asked for once."""
        self.learn_texts(token_ids)
        return [self._texts[i] for i in token_ids]

    def learn_texts(self, token_ids: Sequence[int]) -> None:
        """Ask for the texts of those tokens that are not known yet."""
        if isinstance(token_ids, TokenList) and token_ids == self._learnt:
            return
        # not a difference of sets, which goes through all that is known
        unknown = sorted({one for one in token_ids if one not in self._texts})
        for start in range(0, len(unknown), TEXTS_PER_CALL):
            ids = tuple(unknown[start : start + TEXTS_PER_CALL])
            texts = self.call(m.TokenTexts(token_ids=ids), m.Texts).texts
            self._texts.update(zip(ids, texts, strict=True))
        if isinstance(token_ids, TokenList):
            self._learnt = token_ids

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of token ids together, without special tokens; empty without a tokenizer."""
        message = m.TokenTexts(token_ids=tuple(token_ids), joined=True)
        return self.call(message, m.Texts).texts[0]

    # -- tensors --------------------------------------------------------------------------

    def read_tensor(self, message: Any, label: str) -> npt.NDArray[Any]:
        """The tensor a request is answered with; a large one comes in chunks, with progress.

        An interrupt ends the transfer on both sides.
        """
        with Opened(self) as opened:
            reply = self.call(message, m.TensorReply, timeout_s=COMPUTE_S, opens=opened)
            return self.tensor(reply, label)

    def tensor(self, reply: m.TensorReply, label: str) -> npt.NDArray[Any]:
        """The tensor of an answer that came; a large one is fetched now, in chunks."""
        if reply.data is not None:
            return np.array(reply.data.numpy())  # the answer's own bytes are read-only
        if reply.transfer_id is None:
            raise BadMessage("the server sent neither a tensor nor a transfer")
        data = self._download(reply.transfer_id, reply.nbytes, label)
        return Array(reply.dtype, reply.shape, memoryview(data)).numpy()

    def fetch_array(self, reply: m.TensorReply, label: str) -> Array:
        """The bytes of an answer that go in chunks, in the dtype they have."""
        assert reply.transfer_id is not None
        data = self._download(reply.transfer_id, reply.nbytes, label)
        return Array(reply.dtype, reply.shape, memoryview(data))

    def _download(self, transfer_id: str, nbytes: int, label: str) -> bytearray:
        data = bytearray(nbytes)
        offset = 0
        with Progress(f"fetching {label}", unit="B") as progress:
            while offset < nbytes:
                message = m.ReadChunk(transfer_id=transfer_id, offset=offset, length=CHUNK_BYTES)
                chunk = self._piece(message, m.Chunk)
                piece = chunk.data.data
                if chunk.offset != offset or not 0 < len(piece) <= nbytes - offset:
                    raise BadMessage(f"the server sent a wrong piece of {label}")
                data[offset : offset + len(piece)] = piece
                offset += len(piece)
                progress.at(offset, nbytes)
        return data

    def _piece(self, message: Any, reply: type[_Reply]) -> _Reply:
        """A piece of a transfer; asked for or sent once more when the connection broke, since
        pieces are named by their offset and the server knows which it has."""
        try:
            return self.call(message, reply, bulk=True)
        except ConnectionLost:
            return self.call(message, reply, bulk=True)

    def upload(self, array: Array, label: str, opened: Opened) -> str:
        """Send a large tensor in chunks and return the id by which an edit names it."""
        begin = m.BeginUpload(dtype=array.dtype, shape=array.shape)
        transfer_id = self.call(begin, m.UploadReply, opens=opened).transfer_id
        view = memoryview(array.data)
        with Progress(f"sending {label}", unit="B") as progress:
            for offset in range(0, len(view), CHUNK_BYTES):
                piece = view[offset : offset + CHUNK_BYTES]
                data = Array("uint8", (len(piece),), piece)
                message = m.WriteChunk(transfer_id=transfer_id, offset=offset, data=data)
                self._piece(message, m.UploadReply)
                progress.at(offset + len(piece), len(view))
        return transfer_id

    def end_transfer(self, transfer_id: str) -> None:
        """Close a transfer on a thread of its own: the caller is done, or on its way out."""
        payload = codec.encode(
            m.ReadChunk(transfer_id=transfer_id, offset=0, length=1, cancel=True)
        )

        def send() -> None:
            # an idle transfer is dropped by the server anyway
            with contextlib.suppress(Exception):
                self.transport.request(payload, "bulk", 5.0)

        threading.Thread(target=send, name="djinn-cancel", daemon=True).start()

    # -- events ---------------------------------------------------------------------------

    def _listen(self, after: int) -> None:
        self.mirror.heard_seq = after
        # the events thread holds us weakly: a connection that nobody uses any more is closed
        weak = weakref.ref(self)

        def take(answer: bytes) -> int:
            client = weak()
            return client._take(answer) if client is not None else after

        def trouble(error: Exception | None) -> None:
            if (client := weak()) is not None:
                client._trouble(error)

        self.transport.listen(_poll, take, after=after, on_trouble=trouble)

    def _take(self, answer: bytes) -> int:
        reply = codec.decode(answer)
        if isinstance(reply, m.ErrorReply):
            codec.raise_error(reply.error)
        if not isinstance(reply, m.Events):
            raise BadMessage(f"a poll for events was answered with {type(reply).__name__}")
        if reply.missed:
            self.mirror.doubt()
        for event in reply.events:
            if event.kind == "durability":
                self.durability.take(event.text)
            else:
                self.leases.take(event)
                self.mirror.take(event)
        self.mirror.heard_seq = reply.last_seq
        return reply.last_seq

    def catch_up(self) -> None:
        """Wait until the events have come that led to what is known of the sessions: an answer may
        overtake them, by a tenth of a second. Where polls fail nothing is waited for."""
        wanted, end = self.mirror.known_seq, time.monotonic() + CATCH_UP_S
        while self.mirror.heard_seq < wanted and self.trouble is None and time.monotonic() < end:
            time.sleep(0.002)

    def _trouble(self, error: Exception | None) -> None:
        """Polling fails, or works again: whoever waits shall look for himself."""
        self.trouble = error
        self.mirror.doubt()

    def close(self) -> None:
        """End the connection. Sessions stay with the server."""
        self.transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Opened:
    """The transfers that a request opens; closed on the server when its `with` is left.

    An interrupt may come before the answer that names them: then they are closed when the answer
    comes. They are always closed by us, not by their last byte, which may be asked for again.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._transfer_ids: list[str] = []
        self._left = False

    def answered(self, answer: bytes) -> None:
        """Take note of the answer; runs on the I/O thread."""
        with contextlib.suppress(BadMessage):  # the caller, if there still is one, is told
            self._transfer_ids += _transfers_in(codec.decode(answer))
        if self._left:
            self._close()

    def _close(self) -> None:
        for transfer_id in self._transfer_ids:
            self._client.end_transfer(transfer_id)

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left = True
        self._close()


def _transfers_in(answer: Any) -> list[str]:
    """Ids of the transfers that an answer, or a part of it, names."""
    if isinstance(answer, tuple):
        return [one for part in answer for one in _transfers_in(part)]
    if not dataclasses.is_dataclass(answer):
        return []
    found = getattr(answer, "transfer_id", None)
    parts = [getattr(answer, field.name) for field in dataclasses.fields(answer)]
    return [found] if isinstance(found, str) else _transfers_in(tuple(parts))


def _nobody(connection: PlainConnection) -> None:
    """The client is gone; its connections end with it."""


def _poll(after: int) -> bytes:
    return codec.encode(m.PollEvents(after=after, timeout_s=POLL_WAIT_S))


class Mirror:
    """The newest description of each session, by revision, and a call to whoever waits for one.

    Filled by answers and events. Waiters sleep on a `SimpleQueue`: an interrupt while waiting
    leaves no lock held.
    """

    def __init__(self) -> None:
        self._infos: dict[str, m.SessionInfo] = {}
        self._gone: set[str] = set()
        self._versions: dict[str, int] = {}
        self._waiters: list[Waiter] = []
        self._progress: dict[str, m.Event] = {}
        #: called when anything told here has changed, on whichever thread told it
        self.listeners: list[Callable[[], None]] = []
        #: how often events may have been missed
        self.num_doubts = 0
        #: sequence numbers of the newest event that a description knows of, and that has come
        self.known_seq = self.heard_seq = 0
        #: sessions that this process terminated
        self.ended_here: set[str] = set()
        self.swaps = Swaps()
        self._lock = threading.Lock()

    def update(self, info: m.SessionInfo) -> None:
        """Keep a description unless a newer one is here."""
        with self._lock:
            self.known_seq = max(self.known_seq, info.event_seq)
            known = self._infos.get(info.id)
            if known is not None and known.revision > info.revision:
                return
            self._infos[info.id] = info
            if known is None or known.edits != info.edits:
                self._versions[info.id] = self._versions.get(info.id, 0) + 1
        if known != info:
            self._tell()

    def forget_sessions(self) -> None:
        """Another server has taken the place of the one described here."""
        with self._lock:
            self._infos.clear()
            self._gone.clear()
            self._progress.clear()
            self.ended_here.clear()
            self.swaps = Swaps()
            self.known_seq = self.heard_seq = 0
        self._tell()

    def take(self, event: m.Event) -> None:
        """Learn from an event."""
        if event.session is not None:
            self.update(event.session)
        if event.kind == "terminated":
            with self._lock:
                self._gone.add(event.session_id)
                if event.seq == 0:
                    self.ended_here.add(event.session_id)
        if event.kind == "progress":
            self._progress[event.session_id] = event
        elif event.kind not in ("changed", "swapped", "lease"):
            self._progress.pop(event.session_id, None)
        self.swaps.take(event, time.time())
        self._wake(event.session_id, event)

    def doubt(self) -> None:
        """Events may have been missed: every waiter asks the server."""
        self.num_doubts += 1
        self._wake(None, None)

    def listed(self, infos: Sequence[m.SessionInfo], before: set[str]) -> None:
        """All sessions of the server. before: those known when it was asked; of these, one that is
        not listed has ended."""
        for info in infos:
            self.update(info)
        with self._lock:
            self._gone |= before - {info.id for info in infos}
        self._tell()

    def sessions(self) -> list[m.SessionInfo]:
        """The newest description of every session known that has not ended."""
        with self._lock:
            return [info for info in self._infos.values() if info.id not in self._gone]

    def progress(self, session_id: str) -> m.Event | None:
        """The newest event of progress of a session that runs."""
        return self._progress.get(session_id)

    def is_waited_for(self, session_id: str) -> bool:
        """Whether somebody of this process waits for the session to rest."""
        return any(waiter.session_id == session_id for waiter in list(self._waiters))

    def values_changed(self, session_id: str) -> None:
        """An edit was made here: values read before are out of date."""
        with self._lock:
            self._versions[session_id] = self._versions.get(session_id, 0) + 1

    def values_version(self, session_id: str) -> int:
        """Changes whenever values at the session's stop may have changed."""
        return self._versions.get(session_id, 0)

    def newest(self, session_id: str) -> m.SessionInfo | None:
        return self._infos.get(session_id)

    def is_gone(self, session_id: str) -> bool:
        return session_id in self._gone

    def waiter(self, session_id: str) -> Waiter:
        """Start listening for a session; close the waiter afterwards."""
        made = Waiter(self, session_id)
        self._waiters.append(made)
        return made

    def _wake(self, session_id: str | None, event: m.Event | None) -> None:
        for waiter in list(self._waiters):
            if session_id is None or waiter.session_id == session_id:
                waiter.queue.put(event)
        self._tell()

    def _tell(self) -> None:
        for changed in list(self.listeners):
            changed()

    def forget(self, waiter: Waiter) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)


class Waiter:
    """What happens to one session from now on."""

    def __init__(self, mirror: Mirror, session_id: str) -> None:
        self.session_id = session_id
        self.queue: SimpleQueue[m.Event | None] = SimpleQueue()
        self._mirror = mirror

    def next(self, timeout_s: float) -> tuple[bool, m.Event | None]:
        """(something came, the event); no event means that the server should be asked."""
        try:
            return True, self.queue.get(timeout=timeout_s)
        except Empty:
            return False, None

    def __enter__(self) -> Waiter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mirror.forget(self)
