"""A server that is not ours, or has turned hostile, gets nothing out of a client."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import psutil
import pytest
from rpyc.core import brine, consts, vinegar

from djinn_nb.transport import Transport
from kernel_server.protocol.errors import (
    AccessDenied,
    ConnectionLost,
    DjinnError,
    NoServer,
    ServerFault,
)
from kernel_server.wire.handshake import MAGIC, admit_client
from tests.wire.peers import Attacker
from tests.wire.test_attacks import REQUESTS

TOKEN = "a-token-for-tests-only"
V = consts.LABEL_VALUE

Play = Callable[[Attacker], None]
StartServer = Callable[[Play], str]


@pytest.fixture
def hostile() -> Iterator[Callable[..., str]]:
    """Start a server that plays a part on each connection; answers its address."""
    with contextlib.ExitStack() as stack:

        def start(play: Play, *, knows_token: bool = True) -> str:
            listener = socket.create_server(("127.0.0.1", 0))

            def run() -> None:
                while True:
                    try:
                        sock, _ = listener.accept()
                    except OSError:
                        return
                    with sock, contextlib.suppress(OSError, EOFError):
                        if knows_token:
                            admit_client(sock, {"me": TOKEN}, lambda owner: True)
                        play(Attacker(sock))

            thread = threading.Thread(target=run)
            thread.start()
            stack.callback(thread.join, 60)
            stack.callback(listener.close)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return f"127.0.0.1:{listener.getsockname()[1]}"

        yield start


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def _call(hostile: StartServer, play: Play, timeout: float = 30) -> bytes:
    with Transport(hostile(play), TOKEN) as transport:
        return transport.request(b"question", timeout=timeout)


def _answers(message: int, value: object) -> Play:
    def play(client: Attacker) -> None:
        _, sequence, _ = client.receive()
        client.send(message, sequence, value)
        client.receive()

    return play


def test_control_an_honest_part_is_believed(hostile: StartServer) -> None:
    assert _call(hostile, _answers(consts.MSG_REPLY, (V, b"yes"))) == b"yes"


@pytest.mark.parametrize(
    "value",
    [
        (consts.LABEL_REMOTE_REF, ("builtins.bytes", 1, 2)),
        (consts.LABEL_LOCAL_REF, ("x", 1, 2)),
        (consts.LABEL_TUPLE, ((V, b"x"),)),
        (V, "text"),
        (V, (b"x",)),
        (V, None),
        b"no label",
        7,
    ],
)
def test_an_answer_that_is_not_bytes_ends_the_connection(
    value: object, hostile: StartServer
) -> None:
    with pytest.raises(ConnectionLost):
        _call(hostile, _answers(consts.MSG_REPLY, value))


@pytest.mark.parametrize(
    "name", ["SystemExit", "KeyboardInterrupt", "builtins.SystemExit", "x" * 9]
)
def test_an_error_by_an_invented_name_is_the_servers_fault(name: str, hostile: StartServer) -> None:
    with pytest.raises(ServerFault, match="said the server"):
        _call(hostile, _answers(consts.MSG_EXCEPTION, (name, "said the server")))


@pytest.mark.parametrize(
    "value",
    [
        (("builtins", "SystemExit"), (), (), "trace"),
        (("os", "system"), ("id",)),
        ("AccessDenied",),
        (1, 2),
        consts.EXC_STOP_ITERATION,
    ],
)
def test_an_error_in_rpycs_own_form_builds_no_exception(
    value: object, hostile: StartServer
) -> None:
    with pytest.raises(ConnectionLost):
        _call(hostile, _answers(consts.MSG_EXCEPTION, value))


def test_a_server_may_not_ask_the_client_for_anything(hostile: StartServer) -> None:
    heard: dict[str, tuple[int, object]] = {}
    requests = REQUESTS | {"the one call": (consts.HANDLE_CALL, (b"x",))}

    def play(client: Attacker) -> None:
        _, question, _ = client.receive()
        for name, request in requests.items():
            heard[name] = client.ask(*request)
        client.send(consts.MSG_REPLY, question, (V, b"after all"))
        client.receive()

    assert _call(hostile, play) == b"after all"
    assert {name: kind for name, (kind, _) in heard.items()} == dict.fromkeys(
        requests, consts.MSG_EXCEPTION
    )


@pytest.mark.parametrize(
    ("label", "package"),
    [
        (consts.LABEL_REMOTE_REF, ("builtins.str", 1, 2)),
        (consts.LABEL_REMOTE_REF, ("numpy.ndarray", 1, 2)),
        (consts.LABEL_REMOTE_REF, ("concurrent.futures.process.BrokenProcessPool", 1, 2)),
        (consts.LABEL_TUPLE, ((consts.LABEL_REMOTE_REF, ("evil.Evil", 1, 2)),)),
    ],
)
def test_a_reference_in_a_servers_request_is_refused_and_imports_nothing(
    label: int, package: object, hostile: StartServer
) -> None:
    lazy = "concurrent.futures.process"
    was_there = sys.modules.pop(lazy, None)
    heard: list[tuple[int, object]] = []

    def play(client: Attacker) -> None:
        _, question, _ = client.receive()
        heard.append(client.ask(consts.HANDLE_CALL, package, label))
        client.send(consts.MSG_REPLY, question, (V, b"after all"))
        client.receive()

    try:
        assert _call(hostile, play) == b"after all"
        assert heard[0][0] == consts.MSG_EXCEPTION
        assert lazy not in sys.modules
    finally:
        if was_there is not None:
            sys.modules[lazy] = was_there


def test_invented_names_of_errors_leave_nothing_behind(hostile: StartServer) -> None:
    before = len(vinegar._generic_exceptions_cache)
    for number in range(3):
        with pytest.raises(ServerFault):
            _call(hostile, _answers(consts.MSG_EXCEPTION, (f"Invented{number}", "text")))

    assert len(vinegar._generic_exceptions_cache) == before


def test_control_stock_rpyc_keeps_every_invented_name() -> None:
    before = len(vinegar._generic_exceptions_cache)
    vinegar.load((("nowhere", "Invented"), (), (), "trace"), False, False, False)

    assert len(vinegar._generic_exceptions_cache) == before + 1
    vinegar._generic_exceptions_cache.popitem()


def test_a_header_of_4_gib_takes_no_memory_of_the_client(hostile: StartServer) -> None:
    def play(client: Attacker) -> None:
        client.receive()
        client.send_frame(b"", length=2**32 - 1)
        with contextlib.suppress(OSError):
            for _ in range(64):
                client.sock.sendall(bytes(2**20))

    before = psutil.Process().memory_info().rss
    with pytest.raises(ConnectionLost):
        _call(hostile, play)

    assert psutil.Process().memory_info().rss - before < 16 << 20


@pytest.mark.parametrize(
    "frame",
    [
        {"body": zlib.compress(bytes(2**26)), "compressed": 1},
        {"body": b"", "length": 2**32 - 1},
        {"body": bytes([consts.MSG_REPLY]) + brine.TAG_TUP_L4 + brine.I4.pack(2**31)},
        {"body": bytes([9]) + brine.dump((0, (V, b"x")))},
        {"body": b"\xff" * 100},
    ],
    ids=["compressed", "4 GiB", "items", "kind", "noise"],
)
def test_a_malformed_answer_ends_the_connection(
    frame: dict[str, object], hostile: StartServer
) -> None:
    def play(client: Attacker) -> None:
        client.receive()
        client.send_frame(**frame)  # type: ignore[arg-type]
        client.receive()

    with pytest.raises(ConnectionLost):
        _call(hostile, play)


def test_an_answer_to_another_question_is_not_taken(hostile: StartServer) -> None:
    def play(client: Attacker) -> None:
        _, sequence, _ = client.receive()
        client.send(consts.MSG_REPLY, sequence + 1000, (V, b"wrong"))
        client.send(consts.MSG_REPLY, sequence, (V, b"right"))
        client.receive()

    assert _call(hostile, play) == b"right"


@pytest.mark.parametrize("half", [b"", brine.I4.pack(1000) + b"\x00half of an answer"])
def test_a_server_that_falls_silent_costs_the_timeout_only(
    half: bytes, hostile: StartServer
) -> None:
    def play(client: Attacker) -> None:
        client.receive()
        client.sock.sendall(half)
        client.receive()

    began = time.monotonic()
    with pytest.raises(ConnectionLost):
        _call(hostile, play, timeout=0.5)

    assert time.monotonic() - began < 30  # the peer would hold it for ever


def test_a_server_that_floods_pings_cannot_hold_a_call(hostile: StartServer) -> None:
    def play(client: Attacker) -> None:
        client.receive()
        while True:
            client.ask(consts.HANDLE_PING, ("x",))

    began = time.monotonic()
    with pytest.raises(ConnectionLost):
        _call(hostile, play, timeout=0.5)

    assert time.monotonic() - began < 30  # the peer would hold it for ever


def test_a_server_without_the_token_is_told_nothing(hostile: Callable[..., str]) -> None:
    heard: list[bytes] = []
    over = threading.Event()

    def play(client: Attacker) -> None:
        client.sock.sendall(MAGIC + bytes(32))
        heard.append(client.sock.recv(1000))
        client.sock.sendall(b"+" + bytes(32))
        try:
            heard.append(client.sock.recv(1000))
        except ConnectionError:  # hung up on without a word
            heard.append(b"")
        over.set()

    with pytest.raises(AccessDenied, match="cannot prove"):
        Transport(hostile(play, knows_token=False), TOKEN)

    assert over.wait(60)  # the client is done before the server has heard it hang up
    assert len(heard[0]) == 72 and TOKEN.encode() not in heard[0]
    assert heard[1] == b""


def test_a_handshake_that_is_not_completed_is_begun_again(hostile: Callable[..., str]) -> None:
    """The server, or we, may have been kept from it for longer than the other side waits."""
    begun: list[int] = []

    def play(client: Attacker) -> None:
        begun.append(len(begun))
        if len(begun) > 2:
            admit_client(client.sock, {"me": TOKEN}, lambda owner: True)
            client.receive()

    with Transport(hostile(play, knows_token=False), TOKEN) as transport:
        assert transport.traffic["control"].connects == 1
    assert begun == [0, 1, 2]


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n" * 4, b"", MAGIC + b"short"])
def test_something_else_at_the_address_is_named(
    greeting: bytes, hostile: Callable[..., str]
) -> None:
    def play(client: Attacker) -> None:
        client.sock.sendall(greeting)
        if greeting:
            client.sock.recv(1000)

    began = time.monotonic()
    with pytest.raises(DjinnError) as caught:
        Transport(hostile(play, knows_token=False), TOKEN)

    assert isinstance(caught.value, NoServer) and "\n" not in str(caught.value)
    assert time.monotonic() - began < 30
