"""The door of the server: accepts, authenticates and serves connections; knows no message.

A payload goes to `handler(owner, connection_id, payload)` and its answer goes back. Control calls,
event long-polls and bulk transfers are the same to this file; a client uses a connection for each,
because one connection serves one request at a time. What the payloads mean, what an owner may do
and what happens to sessions when a connection ends is left to the handler and the callbacks.

Hostile and broken peers are ordinary here: handshakes have a deadline, a rate and a cap of their
own (the oldest gives way, an honest one takes milliseconds), owners have a cap and a pace, and
running out of descriptors pauses accepting instead of ending the server.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from kernel_server.pacing import Pacer
from kernel_server.wire import FrameChannel, GuardedStream, PlainConnection, listen, parse_address
from kernel_server.wire.address import Address, remove_socket_file, tune
from kernel_server.wire.frames import FRAME_S
from kernel_server.wire.handshake import HANDSHAKE_S, HandshakeFailed, admit_client
from kernel_server.wire.tokens import check_tokens

log = logging.getLogger(__name__)

Handler = Callable[[str, str, bytes], bytes]
Watcher = Callable[[str, str], None]

#: What accept() answers when this process or machine is out of something.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
#: How long accepting pauses then, seconds.
_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """What peers may take of the server. A notebook uses three connections."""

    handshakes: int = 32
    #: new connections a second, after as many at once as twice the pending handshakes
    handshakes_per_s: float = 200.0
    connections: int = 192
    connections_per_owner: int = 96
    handshake_s: float = HANDSHAKE_S
    #: How long a frame that has begun may take, besides a second per 64 KiB of it.
    frame_s: float = FRAME_S


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """One authenticated connection, for status displays."""

    id: str
    owner: str
    since: float


class Service:
    """Listens on `address` from construction, serves from `start()` until `close()`.

    handler: (owner, connection id, payload) → answer; called on the connection's own thread.
    tokens: {owner: token}.
    on_connect, on_disconnect: (owner, connection id); detach work only, on the same thread.
    pacer: says which owners have to wait; None: nobody has.
    Raises PortInUse, AddressRefused, or BadArgument for unfit tokens.

        service = Service(handler, {"me": new_token()}, "127.0.0.1:0").start()
        print(service.address)
        service.close()
    """

    def __init__(
        self,
        handler: Handler,
        tokens: Mapping[str, str],
        address: str | Address = "127.0.0.1:5556",
        *,
        on_connect: Watcher | None = None,
        on_disconnect: Watcher | None = None,
        limits: Limits | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        check_tokens(tokens)
        self._handler = handler
        self._tokens = dict(tokens)
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._limits = limits or Limits()
        self._pacer = pacer
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._handshakes: dict[int, socket.socket] = {}  # in order of arrival
        self._connections: dict[str, tuple[ConnectionInfo, PlainConnection]] = {}
        self._per_owner: Counter[str] = Counter()
        self._threads: set[threading.Thread] = set()
        self._accepting: threading.Thread | None = None
        self._closing = False
        self._listener, self.address = listen(parse_address(address))
        self._listener.setblocking(False)
        self._wake_in, self._wake_out = socket.socketpair()

    def start(self) -> Service:
        """Begin to accept, on a thread of its own."""
        if self._accepting is None and not self._closing:
            self._accepting = threading.Thread(target=self._accept, name="accept", daemon=True)
            self._accepting.start()
        return self

    def connections(self) -> list[ConnectionInfo]:
        """The authenticated connections, oldest first."""
        with self._lock:
            return [info for info, _ in self._connections.values()]

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop listening, end every connection and wait for their threads; idempotent.

        A handler that is still waiting (a long-poll) must be ended by whoever it waits for; its
        thread is left behind after `timeout_s`, which the log says.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._ended.set()
        deadline = time.monotonic() + timeout_s
        self._wake_out.send(b".")
        if self._accepting is not None:
            self._accepting.join(timeout_s)
        self._listener.close()
        remove_socket_file(self.address)
        with self._lock:
            for sock in self._handshakes.values():
                _shut(sock)
            for _, connection in self._connections.values():
                connection.interrupt()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        left = [thread.name for thread in threads if thread.is_alive()]
        if left:
            log.warning("%d calls still run after %g s: %s", len(left), timeout_s, left)
        self._wake_in.close()
        self._wake_out.close()

    def __enter__(self) -> Service:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_in, selectors.EVENT_READ)
            rate = _Rate(self._limits.handshakes_per_s, 2 * self._limits.handshakes)
            while True:
                selector.select()
                if self._closing:
                    return
                try:
                    sock, _ = self._listener.accept()
                except OSError as error:
                    self._survive(error)
                    continue
                self._receive(sock)
                self._ended.wait(rate.wait_s())

    def _survive(self, error: OSError) -> None:
        """A failed accept never ends the server: its other clients are being served."""
        if error.errno in _EXHAUSTED:
            log.warning("cannot accept (%s): dropping pending handshakes", error.strerror)
            with self._lock:
                for sock in self._handshakes.values():
                    _shut(sock)
        elif error.errno not in {errno.EAGAIN, errno.EINTR, errno.ECONNABORTED}:
            log.warning("cannot accept: %s", error)
        else:
            return
        time.sleep(_PAUSE_S)  # the listener stays readable: without a pause this would spin

    def _receive(self, sock: socket.socket) -> None:
        with self._lock:
            crowd = list(self._handshakes.values())
            # Those told to go may need a moment; more than twice the cap never wait at once.
            too_many = len(crowd) >= 2 * self._limits.handshakes
            if not too_many:
                self._handshakes[id(sock)] = sock
        for oldest in crowd[: max(0, len(crowd) - self._limits.handshakes + 1)]:
            _shut(oldest)
        if too_many:
            sock.close()
            return
        thread = threading.Thread(target=self._meet, args=(sock,), name="handshake", daemon=True)
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:  # out of threads
            log.warning("cannot serve a new connection: %s", error)
            with self._lock:
                self._threads.discard(thread)
                self._handshakes.pop(id(sock), None)
            sock.close()

    def _meet(self, sock: socket.socket) -> None:
        admitted: list[str] = []
        try:
            try:
                tune(sock)
                owner = admit_client(
                    sock,
                    self._tokens,
                    partial(self._admit, admitted, sock),
                    self._limits.handshake_s,
                )
            finally:
                with self._lock:
                    self._handshakes.pop(id(sock), None)
            self._serve(owner, sock, admitted)
        except (HandshakeFailed, OSError) as error:
            log.info("a connection was not let in: %s", error)
        finally:
            sock.close()
            with self._lock:
                self._leave(admitted)
                self._threads.discard(threading.current_thread())

    def _admit(self, admitted: list[str], sock: socket.socket, owner: str) -> bool:
        with self._lock:
            # A zero is kept per owner, and owners are few.
            if self._closing or self._per_owner.total() >= self._limits.connections:
                return False
            if self._per_owner[owner] >= self._limits.connections_per_owner:
                return False
            self._per_owner[owner] += 1
            admitted.append(owner)
            # from now on no flood of others ends it: what it is told next is that it is in
            self._handshakes.pop(id(sock), None)
            return True

    def _leave(self, admitted: list[str]) -> None:
        """Give back the place that was taken; the lock is held."""
        self._per_owner.subtract(admitted)
        admitted.clear()

    def _serve(self, owner: str, sock: socket.socket, admitted: list[str]) -> None:
        info = ConnectionInfo(f"connection-{next(self._ids)}", owner, time.time())
        threading.current_thread().name = info.id
        channel = FrameChannel(GuardedStream(sock, self._limits.frame_s))
        connection = PlainConnection(channel, partial(self._handler, owner, info.id))
        with self._lock:
            self._connections[info.id] = (info, connection)
            if self._closing:
                connection.interrupt()
        try:
            self._tell(self._on_connect, info)
            self._answer_calls(owner, connection)
        except Exception:
            log.exception("%s of %s ended by a fault", info.id, owner)
        finally:
            connection.close()
            with self._lock:
                # at once: whoever no longer sees it listed finds its place free
                del self._connections[info.id]
                self._leave(admitted)
            self._tell(self._on_disconnect, info)

    def _answer_calls(self, owner: str, connection: PlainConnection) -> None:
        """Serve until the peer goes or is dropped, each call in its owner's time."""
        pacer = self._pacer
        try:
            while not connection.closed:
                if pacer is None:
                    connection.serve_one()
                    continue
                connection.wait_for_message()
                # before the call is read: what a peer sends meanwhile stays with the peer
                with pacer.queue(owner):  # one waits by the clock, an owner's others for that one
                    while (wait_s := pacer.wait_s(owner)) > 0 and not self._ended.wait(wait_s):
                        pass
                    begun, began = pacer.begin(owner), time.thread_time()
                try:
                    connection.serve_one()
                finally:
                    pacer.end(owner, begun, time.thread_time() - began)
        except (EOFError, OSError):  # the peer went, or was too slow
            return

    def _tell(self, watcher: Watcher | None, info: ConnectionInfo) -> None:
        if watcher is None:
            return
        try:
            watcher(info.owner, info.id)
        except Exception:
            log.exception("a callback failed for %s of %s", info.id, info.owner)


class _Rate:
    """How long to pause after an event so that no more than `per_s` come in the long run."""

    def __init__(self, per_s: float, at_once: int) -> None:
        self._gap_s = 1 / per_s
        self._slack_s = at_once * self._gap_s
        self._next = time.monotonic()

    def wait_s(self) -> float:
        """An event happens now: seconds to let pass before the next may."""
        now = time.monotonic()
        self._next = max(self._next, now - self._slack_s) + self._gap_s
        return max(0.0, self._next - now)


def _shut(sock: socket.socket) -> None:
    """Wake the thread that waits on `sock`; that thread closes it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
