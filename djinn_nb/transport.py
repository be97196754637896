"""The client's way to the server: I/O threads own the connections, callers wait for answers.

Three connections, each with its thread: `control` for short calls, `bulk` for tensors in chunks,
`events` for the long-poll by sequence number. A caller, often the main thread of a notebook
kernel, never touches a socket: it hands over a payload and waits. So an interrupt (Ctrl-C at any
moment) ends the waiting and nothing else; the thread finishes the exchange and throws the answer
away. A call that is not answered in time has its connection dropped, and the next one dials again.

What the payloads mean is left to the session layer, as is what to do about a call whose fate is
unknown: nothing is ever sent twice.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Literal

from kernel_server.protocol.errors import (
    BadArgument,
    ConnectionFailed,
    ConnectionLost,
    DjinnError,
    NoServer,
)
from kernel_server.wire import PAYLOAD_CAP, Address, PlainConnection, connect, parse_address

Kind = Literal["control", "bulk", "events"]

#: Reconnecting: first pause, longest pause, and how long a call waits for a server, seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S, PATIENCE_S = 0.05, 5.0, 2.0
#: What to do where no server answers.
START = "start one with `python -m kernel_server serve`"
#: How long an event poll may take; the server answers an empty one well before.
POLL_S = 60.0
#: One dial and one handshake end well before this, whatever the network does, seconds.
_FIRST_DIAL_S = 30.0
#: Handshakes that are begun before a server that lets connections in and does not complete them is
#: none: it, or we, may be kept from going on for longer than the other side waits.
_HANDSHAKES = 3
#: A waiting caller gives its I/O thread this long beyond the deadline to say what happened.
_GRACE_S = 2.0


@dataclass(slots=True)
class Traffic:
    """What one connection has carried since the transport was opened, payload bytes."""

    calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    connects: int = 0


class Transport:
    """An authenticated way to the server at `address`; raises at once if there is none.

    advice: what to do when there is none any more. Raises NoServer, AccessDenied, QuotaExceeded;
    BadArgument for a malformed address.

        transport = Transport("127.0.0.1:5556", token)
        answer = transport.request(payload, timeout=10)
        transport.close()
    """

    def __init__(
        self,
        address: str | Address,
        token: str,
        *,
        patience_s: float = PATIENCE_S,
        advice: str = START,
    ) -> None:
        self.address = parse_address(address)
        self._stop = _Gate()
        lines = [
            _Line(name, self.address, token, patience_s, advice, self._stop) for name in _KINDS
        ]
        self._control, self._bulk, self._events = lines
        self._lines: dict[str, _Line] = dict(zip(_KINDS, lines, strict=True))
        self._listen_orders: SimpleQueue[_Listening | None] = SimpleQueue()
        # All threads start here: starting one is the only step that an interrupt could break.
        self._threads = [
            threading.Thread(target=self._control.run, name="djinn-control", daemon=True),
            threading.Thread(target=self._bulk.run, name="djinn-bulk", daemon=True),
            threading.Thread(target=self._run_events, name="djinn-events", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        try:
            self._wait(self._control, _Call(None, time.monotonic() + _FIRST_DIAL_S))
        except BaseException:
            self.close()
            raise

    def request(
        self,
        payload: bytes,
        kind: Literal["control", "bulk"] = "control",
        timeout: float = 30.0,
        on_answer: Callable[[bytes], None] | None = None,
        before: Callable[[], None] | None = None,
    ) -> bytes:
        """Send `payload`, wait at most `timeout` seconds, and return the answer.

        on_answer: told the answer on the I/O thread, also when nobody waits for it any more.
        before: called there when a connection stands; nothing is sent if it raises.

        Raises what the server raised; ConnectionLost when the connection broke or the answer did
        not come in time (the call may have been carried out); NoServer when nothing was sent.
        """
        if kind not in ("control", "bulk"):
            raise BadArgument(f"{kind!r} is no kind of call; use 'control' or 'bulk'")
        if type(payload) is not bytes:
            raise BadArgument(f"a payload is bytes, not {type(payload).__name__}")
        if len(payload) > PAYLOAD_CAP:
            raise BadArgument(
                f"the call has {len(payload)} bytes, a frame holds {PAYLOAD_CAP}; send chunks"
            )
        call = _Call(payload, time.monotonic() + timeout, on_answer, before)
        return self._wait(self._lines[kind], call)

    def listen(
        self,
        poll_payload: Callable[[int], bytes],
        on_answer: Callable[[bytes], int],
        *,
        after: int = 0,
        on_trouble: Callable[[Exception | None], None] | None = None,
    ) -> None:
        """Poll for events from sequence number `after` on, until `close()`; returns at once.

        poll_payload: sequence number of the last event seen → the payload that asks for more.
        on_answer: takes an answer, returns the last sequence number it held (or the old one).
        on_trouble: told the error when polling fails, and None once it works again, which for a
            lost connection is as soon as there is a new one, before anything is polled on it.
        All three run on the events thread. A later call takes the place of this one.
        """
        self._listen_orders.put(_Listening(poll_payload, on_answer, after, on_trouble))

    def greet(self, greeting: Callable[[PlainConnection], None]) -> None:
        """Let `greeting` have every connection dialled from now on first, on its I/O thread."""
        for line in self._lines.values():
            line.greeting = greeting

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Calls and payload bytes by kind of connection."""
        return {name: line.traffic for name, line in self._lines.items()}

    @property
    def closed(self) -> bool:
        return self._stop.is_open

    def close(self, timeout_s: float = 5.0) -> None:
        """End the connections and their threads; calls under way get ConnectionLost. Idempotent."""
        self._stop.open()
        self._control.calls.put(None)
        self._bulk.calls.put(None)
        self._listen_orders.put(None)
        for line in self._lines.values():
            line.interrupt()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self, line: _Line, call: _Call) -> bytes:
        if self._stop.is_open:
            raise _closed_error(self.address)
        line.calls.put(call)
        try:
            done = call.done.wait(max(0.0, call.deadline - time.monotonic()) + _GRACE_S)
        except BaseException:
            call.abandoned = True  # if it has not been sent yet, it need not be
            raise
        if not done:
            call.abandoned = True
            raise ConnectionLost(
                f"no answer from {self.address} in time, and calls before it are still waiting; "
                "look at what the server is doing, then call again"
            )
        if call.error is not None:
            raise call.error
        return call.answer

    def _run_events(self) -> None:
        order = self._listen_orders.get()
        pause_s = FIRST_PAUSE_S
        trouble: Exception | None = None
        while order is not None and not self._stop.is_open:
            try:
                if isinstance(trouble, ConnectionFailed):
                    # Told before the poll: another server may have come, which counts anew.
                    self._events.stand(time.monotonic() + POLL_S)
                    order.tell(None)
                    trouble = None
                newest = self._newest_order(order)
                if newest is None:
                    break
                order = newest
                answer = self._events.exchange(
                    order.poll_payload(order.after), time.monotonic() + POLL_S
                )
                order.after = order.on_answer(answer)
                if trouble is not None:
                    order.tell(None)
                    trouble = None
                pause_s = FIRST_PAUSE_S
            except Exception as error:  # a callback's too: the thread outlives both
                trouble = error
                if not self._stop.is_open:
                    with contextlib.suppress(Exception):  # the one to report it to is broken
                        order.tell(error)
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._events.drop()

    def _newest_order(self, order: _Listening) -> _Listening | None:
        newest: _Listening | None = order
        while newest is not None and not self._listen_orders.empty():
            newest = self._listen_orders.get()
        return newest


class _Line:
    """One connection, dialled when needed; everything but `calls` belongs to its thread."""

    def __init__(
        self,
        name: str,
        address: Address,
        token: str,
        patience_s: float,
        advice: str,
        stop: _Gate,
    ) -> None:
        self.calls: SimpleQueue[_Call | None] = SimpleQueue()
        self.traffic = Traffic()
        self.greeting: Callable[[PlainConnection], None] | None = None
        self._name = name
        self._address = address
        self._token = token
        self._patience_s = patience_s
        self._advice = advice
        self._stop = stop
        self._connection: PlainConnection | None = None

    def run(self) -> None:
        """Carry out calls one by one until None comes."""
        while (call := self.calls.get()) is not None:
            if call.abandoned:
                continue
            try:
                if call.payload is None:
                    self._connected(call.deadline, patience_s=0.0)
                else:
                    call.answer = self.exchange(call.payload, call.deadline, call.before)
                    if call.on_answer is not None:
                        call.on_answer(call.answer)
            except Exception as error:
                call.error = error
            call.done.open()
            del call  # a large answer is not kept until the next call
        self.drop()
        while not self.calls.empty():
            late = self.calls.get()
            if late is not None:
                late.error = _closed_error(self._address)
                late.done.open()

    def stand(self, deadline: float) -> None:
        """Have a connection, or raise why there is none."""
        self._connected(deadline, self._patience_s)

    def exchange(
        self, payload: bytes, deadline: float, before: Callable[[], None] | None = None
    ) -> bytes:
        """Send and receive once, on the line's own thread."""
        connection = self._connected(deadline, self._patience_s)
        if before is not None:
            before()
        try:
            self.traffic.calls += 1
            self.traffic.bytes_sent += len(payload)
            answer = connection.call(payload, max(0.0, deadline - time.monotonic()))
        except DjinnError:
            raise
        except TimeoutError as error:
            self.drop()
            raise ConnectionLost(
                f"no answer from {self._address} in time; the call may have been carried out: "
                "look at session.status, then call again"
            ) from error
        except (OSError, EOFError) as error:
            self.drop()
            if self._stop.is_open:
                raise _closed_error(self._address) from error
            raise ConnectionLost(
                f"the connection to {self._address} broke during a call ({error}); it may have "
                "been carried out: look at session.status, then call again"
            ) from error
        self.traffic.bytes_received += len(answer)
        return answer

    def interrupt(self) -> None:
        """Wake the line's thread from any other."""
        connection = self._connection
        if connection is not None:
            connection.interrupt()

    def drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self, deadline: float, patience_s: float) -> PlainConnection:
        """The connection, dialled anew when the server has gone since the last call."""
        if self._connection is not None and self._connection.idle_and_open:
            return self._connection
        self.drop()
        began = time.monotonic()
        pause_s = FIRST_PAUSE_S
        handshakes = 0
        while True:
            if self._stop.is_open:
                raise _closed_error(self._address)
            try:
                self._connection = connect(self._address, self._token)
            except OSError as error:
                if isinstance(error, DjinnError) and not isinstance(error, NoServer):
                    raise
                waited_s = time.monotonic() - began
                if _was_let_in(error):
                    handshakes += 1
                    if handshakes < _HANDSHAKES and began + waited_s + pause_s < deadline:
                        self._stop.wait(pause_s)
                        continue
                if waited_s + pause_s > min(patience_s, deadline - began):
                    if isinstance(error, NoServer):
                        raise
                    raise _no_server(self._address, error, waited_s, self._advice) from error
                self._stop.wait(pause_s)
                pause_s *= 2
            else:
                self.traffic.connects += 1
                if self._stop.is_open:  # close() may have looked before there was a connection
                    self.drop()
                    raise _closed_error(self._address)
                self._greet(self._connection)
                return self._connection

    def _greet(self, connection: PlainConnection) -> None:
        if self.greeting is None:
            return
        try:
            self.greeting(connection)
        except (OSError, EOFError) as error:
            self.drop()
            if isinstance(error, DjinnError):
                raise
            raise ConnectionLost(
                f"the connection to {self._address} broke before the call ({error}): call again"
            ) from error


def _was_let_in(error: OSError) -> bool:
    """Whether something listens there, and the handshake with it was not completed in time."""
    if isinstance(error, NoServer):
        return isinstance(error.__cause__, TimeoutError)
    return isinstance(error, (ConnectionResetError, BrokenPipeError))


class _Gate:
    """Opens once, and can be waited for.

    One lock of the interpreter's own, because an interrupt inside threading.Event or
    concurrent.futures.Future can leave their inner lock held, and the I/O thread would hang on it.
    """

    __slots__ = ("_lock", "is_open")

    def __init__(self) -> None:
        self.is_open = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        self.is_open = True
        with contextlib.suppress(RuntimeError):  # open already
            self._lock.release()

    def wait(self, timeout_s: float) -> bool:
        if not self.is_open and self._lock.acquire(timeout=timeout_s):
            self.open()  # the next waiter passes too
        return self.is_open


class _Call:
    """One payload on its way; None only asks for a connection."""

    __slots__ = (
        "abandoned", "answer", "before", "deadline", "done", "error", "on_answer", "payload",
    )  # fmt: skip

    def __init__(
        self,
        payload: bytes | None,
        deadline: float,
        on_answer: Callable[[bytes], None] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.payload = payload
        self.deadline = deadline
        self.on_answer = on_answer
        self.before = before
        self.done = _Gate()
        self.answer = b""
        self.error: Exception | None = None
        self.abandoned = False


@dataclass(slots=True)
class _Listening:
    poll_payload: Callable[[int], bytes]
    on_answer: Callable[[bytes], int]
    after: int
    on_trouble: Callable[[Exception | None], None] | None

    def tell(self, error: Exception | None) -> None:
        if self.on_trouble is not None:
            self.on_trouble(error)


_KINDS: tuple[Kind, Kind, Kind] = ("control", "bulk", "events")


def _closed_error(address: Address) -> ConnectionLost:
    return ConnectionLost(f"this connection to {address} was closed; connect() again")


def _no_server(address: Address, error: OSError, waited_s: float, advice: str) -> NoServer:
    if address.path is None and address.host not in ("127.0.0.1", "::1", "localhost"):
        advice = (
            f"a server listens on its own machine only: `ssh -L {address.port}:localhost:"
            f"{address.port} {address.host}`, then connect to localhost:{address.port}"
        )
    tried = f", tried for {waited_s:.1f} s" if waited_s >= 0.1 else ""
    reason = error.strerror or str(error) or type(error).__name__
    return NoServer(f"no server answers at {address} ({reason}{tried}); {advice}")
