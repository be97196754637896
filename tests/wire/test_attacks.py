"""A peer that holds the token, or pretends to, can break nothing but its own connection.

Where stock rpyc falls to the same bytes, a control shows that the attack is a real one.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import pytest
import rpyc
from rpyc.core import brine, consts
from rpyc.core.channel import Channel
from rpyc.core.stream import SocketStream
from rpyc.utils.server import ThreadedServer

from djinn_nb.transport import Transport
from kernel_server.protocol.errors import AccessDenied
from kernel_server.wire import FRAME_CAP, dial
from kernel_server.wire.frames import FRAME_S
from kernel_server.wire.handshake import HANDSHAKE_S, MAGIC, NONCE_BYTES, PROOF_BYTES
from tests.wire.peers import ROOT, TOKEN, Attacker, ServerProcess

V = consts.LABEL_VALUE

#: What a hostile client asks of rpyc, as (handler, arguments).
REQUESTS = {
    "the root object": (consts.HANDLE_GETROOT, ()),
    "an attribute": (consts.HANDLE_GETATTR, (7, "__add__")),
    "a private attribute": (consts.HANDLE_GETATTR, ("x", "__class__")),
    "an assignment": (consts.HANDLE_SETATTR, (7, "a", 1)),
    "a deletion": (consts.HANDLE_DELATTR, (7, "a")),
    "a long computation": (consts.HANDLE_CALLATTR, (7, "__pow__", (9,), ())),
    "a large allocation": (consts.HANDLE_CALLATTR, (b"a", "__mul__", (99,), ())),
    "a call of something else": (consts.HANDLE_CALL, ("print", ("x",), ())),
    "a call of two values": (consts.HANDLE_CALL, (b"x", b"y")),
    "a call of a text": (consts.HANDLE_CALL, ("x",)),
    "repr": (consts.HANDLE_REPR, (7,)),
    "str": (consts.HANDLE_STR, (7,)),
    "hash": (consts.HANDLE_HASH, (7,)),
    "a comparison": (consts.HANDLE_CMP, (7, 8, "__lt__")),
    "the list of names": (consts.HANDLE_DIR, (7,)),
    "a pickle": (consts.HANDLE_PICKLE, (7, 2)),
    "an iteration": (consts.HANDLE_BUFFITER, ("abc", 3)),
    "a slice": (consts.HANDLE_OLDSLICING, ("abc", "__getitem__", "x", 0)),
    "an inspection": (consts.HANDLE_INSPECT, (("builtins.str", 1, 2),)),
    "an instance check": (consts.HANDLE_INSTANCECHECK, (7, ("builtins.int", 1, 0))),
    "a context exit": (consts.HANDLE_CTXEXIT, (7, None)),
    "a release": (consts.HANDLE_DEL, (7,)),
    "an unknown handler": (99, ()),
}

#: Those that stock rpyc in its strictest configuration (no pickle) still carries out.
STOCK_OBEYS = ["the root object", "a long computation", "a large allocation", "the list of names"]


@pytest.fixture
def stock() -> Iterator[Attacker]:
    """A stock rpyc server without our connection, as the control."""
    server = ThreadedServer(rpyc.VoidService, hostname="127.0.0.1", port=0)
    thread = threading.Thread(target=server.start)
    thread.start()
    while not server.active:
        time.sleep(0.01)
    attacker = Attacker(socket.create_connection(("127.0.0.1", server.port)))
    yield attacker
    attacker.close()
    while server.clients:  # it would report a client that it closes itself as a fault
        time.sleep(0.01)
    server.close()
    thread.join(30)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_for_anything_but_the_call_is_refused(name: str, attacker: Attacker) -> None:
    handler, args = REQUESTS[name]

    message, answer = attacker.ask(handler, args)

    assert message == consts.MSG_EXCEPTION
    assert isinstance(answer, tuple) and answer[0] == "BadMessage"
    assert attacker.ask(consts.HANDLE_CALL, (b"still",)) == (consts.MSG_REPLY, (V, b"still"))


@pytest.mark.parametrize("name", STOCK_OBEYS)
def test_control_stock_rpyc_carries_out_the_same_request(name: str, stock: Attacker) -> None:
    handler, args = REQUESTS[name]

    message, _ = stock.ask(handler, args)

    assert message == consts.MSG_REPLY


@pytest.mark.parametrize(
    ("label", "package"),
    [
        (consts.LABEL_REMOTE_REF, ("builtins.str", 1, 2)),
        (consts.LABEL_REMOTE_REF, ("concurrent.futures.process.BrokenProcessPool", 1, 2)),
        (consts.LABEL_LOCAL_REF, ("x", 1, 2)),
        (consts.LABEL_TUPLE, ((consts.LABEL_REMOTE_REF, ("evil.Evil", 1, 2)),)),
        (9, ()),
    ],
)
def test_a_reference_is_refused_as_an_argument(
    label: int, package: object, attacker: Attacker
) -> None:
    message, answer = attacker.ask(consts.HANDLE_CALL, package, label)

    assert message == consts.MSG_EXCEPTION
    assert isinstance(answer, tuple) and "references do not cross" in answer[1]
    assert attacker.ask(consts.HANDLE_CALL, (b"still",)) == (consts.MSG_REPLY, (V, b"still"))


def test_control_stock_rpyc_asks_the_attacker_about_its_reference(stock: Attacker) -> None:
    evil = ((consts.LABEL_REMOTE_REF, ("evil.Evil", 1, 2)),)

    message, content = stock.ask(consts.HANDLE_STR, evil, consts.LABEL_TUPLE)

    assert message == consts.MSG_REQUEST
    assert isinstance(content, tuple) and content[0] == consts.HANDLE_INSPECT


def test_a_compressed_frame_is_not_decompressed(server: ServerProcess, attacker: Attacker) -> None:
    bomb = zlib.compress(bytes(2**28))
    before = server.peak_mib

    attacker.send_frame(bomb, compressed=1)

    assert attacker.is_dropped()
    assert server.peak_mib - before < 4


def test_control_a_stock_channel_decompresses_the_same_frame() -> None:
    ours, theirs = socket.socketpair()
    attacker, channel = Attacker(ours), Channel(SocketStream(theirs))

    attacker.send_frame(zlib.compress(bytes(2**24)), compressed=1)

    assert len(channel.recv()) == 2**24
    attacker.close()
    channel.close()


@pytest.mark.parametrize("length", [2**32 - 1, FRAME_CAP + 1])
def test_a_header_beyond_the_cap_keeps_no_byte_of_its_body(
    length: int, server: ServerProcess, attacker: Attacker
) -> None:
    before = server.peak_mib
    attacker.send_frame(b"", length=length)
    try:
        for _ in range(64):
            attacker.sock.sendall(bytes(2**20))
    except OSError:
        pass

    assert attacker.is_dropped()
    assert server.peak_mib - before < 4


def _items(count: int) -> bytes:
    return brine.TAG_TUP_L4 + brine.I4.pack(count) + brine.TAG_NONE * count


@pytest.mark.parametrize(
    "body",
    [
        _items(FRAME_CAP - 100),
        brine.TAG_TUP1 * (FRAME_CAP - 100),
        brine.TAG_TUP4 * (FRAME_CAP - 100),
        brine.TAG_INT_L4 + brine.I4.pack(4_000_000) + b"9" * 4_000_000,
        brine.TAG_STR_L4 + brine.I4.pack(2**32 - 1),
        brine.TAG_UNICODE * 1000,
        brine.TAG_FSET + brine.TAG_TUP1 + brine.TAG_NONE,
        brine.TAG_FLOAT + bytes(8),
        b"",
    ],
    ids=["items", "deep", "wide", "digits", "length", "texts", "set", "float", "nothing"],
)
def test_a_frame_that_describes_much_costs_its_own_length_only(
    body: bytes, server: ServerProcess, attacker: Attacker
) -> None:
    # A frame of the largest size that is accepted sets the mark.
    attacker.ask(consts.HANDLE_CALL, (bytes(FRAME_CAP - 300),))
    before = server.peak_mib

    attacker.send_frame(bytes([consts.MSG_REQUEST]) + body)

    assert attacker.is_dropped()
    assert server.peak_mib - before < 12


def test_control_stock_brine_builds_every_item() -> None:
    assert len(brine.load(_items(2**20))) == 2**20


def test_a_frame_that_ends_elsewhere_is_refused(attacker: Attacker) -> None:
    attacker.sock.sendall(brine.I4.pack(3) + b"\x00" + b"abcd")

    assert attacker.is_dropped()


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "dripping"])
def test_a_peer_that_does_not_finish_the_handshake_is_dropped_after_3_s(
    drip: bool, server: ServerProcess
) -> None:
    began = time.monotonic()
    sock = dial(server.address)
    sock.settimeout(0.2)
    got = b"."
    while got and time.monotonic() - began < 60:
        try:
            got = sock.recv(100)
            if drip:
                sock.sendall(b"x")
        except TimeoutError:
            if drip:
                sock.sendall(b"x")
        except OSError:
            got = b""
    waited_s = time.monotonic() - began
    sock.close()

    # for ever, were the deadline not there; for ever while it drips, were it one of each read
    assert HANDSHAKE_S <= waited_s < 30


def test_a_peer_that_stalls_inside_a_frame_is_dropped(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server(limits="frame_s=0.5")
    attacker, idle = Attacker.logged_in(server.address), Attacker.logged_in(server.address)
    began = time.monotonic()

    attacker.sock.sendall(brine.I4.pack(1000) + b"\x00" + b"only this")

    assert attacker.is_dropped()
    assert time.monotonic() - began < FRAME_S  # what it would have without this limit
    assert idle.ask(consts.HANDLE_CALL, (b"idle is fine",))[0] == consts.MSG_REPLY
    attacker.close()
    idle.close()


def test_a_peer_that_does_not_take_its_answers_is_dropped(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server(limits="frame_s=0.5")
    attacker = Attacker.logged_in(server.address)
    attacker.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    call = (consts.HANDLE_CALL, (V, (bytes(2**16),)))
    began = time.monotonic()
    # It never reads: the server's answers fill the buffers, then its deadline ends it.
    with pytest.raises(OSError):
        for sequence in itertools.count():
            attacker.sock.settimeout(60)
            attacker.send(consts.MSG_REQUEST, sequence, call)

    assert time.monotonic() - began < 60
    attacker.close()
    with Transport(server.address, TOKEN) as transport:
        assert transport.request(b"others are served") == b"others are served"


@pytest.mark.parametrize(
    "limits", ["", "handshakes=1000, handshake_s=60"], ids=["caps", "descriptors"]
)
def test_a_flood_of_silent_sockets_stops_neither_old_nor_new_clients(
    limits: str, start_server: Callable[..., ServerProcess]
) -> None:
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))"
    server = start_server(prepare=few, limits=limits)
    old = Transport(server.address, TOKEN)
    assert old.request(b"before") == b"before"
    flood = [dial(server.address) for _ in range(80)]
    time.sleep(0.3)

    assert old.request(b"during") == b"during"
    with Transport(server.address, TOKEN, patience_s=30) as new:
        assert new.request(b"new") == b"new"
    old.close()
    for sock in flood:
        sock.close()


def test_control_the_same_flood_ends_a_stock_server() -> None:
    code = (
        "import resource, rpyc, socket\n"
        "from rpyc.utils.server import ThreadedServer\n"
        "server = ThreadedServer(rpyc.VoidService, hostname='127.0.0.1', port=0)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))\n"
        "print(server.port, flush=True)\n"
        "server.start()\n"
    )
    flood: list[socket.socket] = []
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        listens = True
        deadline = time.monotonic() + 60
        while listens and time.monotonic() < deadline:
            try:
                sock = socket.create_connection(("127.0.0.1", port), 60)
            except OSError:
                listens = False
            else:
                # as many as ours has to stand; then it is given the time to fall
                if len(flood) < 80:
                    flood.append(sock)
                else:
                    sock.close()
                    time.sleep(0.05)
        process.kill()
    for sock in flood:
        sock.close()

    assert not listens


def test_a_wrong_token_is_denied_in_one_line(server: ServerProcess) -> None:
    with pytest.raises(AccessDenied) as caught:
        Transport(server.address, "another-token-entirely")

    assert "token" in str(caught.value) and "\n" not in str(caught.value)


class Wiretap:
    """Passes bytes between one client and the server, and keeps both sides' words."""

    def __init__(self, server: ServerProcess) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.said: dict[str, io.BytesIO] = {"client": io.BytesIO(), "server": io.BytesIO()}
        self.server = server
        self.threads = [threading.Thread(target=self._run)]
        self.threads[0].start()

    def _run(self) -> None:
        client, _ = self.listener.accept()
        upstream = dial(self.server.address)
        back = threading.Thread(target=self._pass, args=(upstream, client, "server"))
        self.threads.append(back)
        back.start()
        self._pass(client, upstream, "client")
        back.join()
        client.close()
        upstream.close()

    def _pass(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        source.settimeout(60)
        try:
            while data := source.recv(65536):
                self.said[name].write(data)
                sink.sendall(data)
        except OSError:
            pass
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()
        for thread in self.threads:
            thread.join(60)


def test_a_recorded_handshake_opens_nothing_and_holds_no_token(server: ServerProcess) -> None:
    tap = Wiretap(server)
    with Transport(tap.address, TOKEN) as transport:
        assert transport.request(b"recorded") == b"recorded"
    tap.close()
    recorded = tap.said["client"].getvalue()
    answer_bytes = len(MAGIC) + NONCE_BYTES + PROOF_BYTES
    sock = dial(server.address)
    sock.recv(100)

    sock.sendall(recorded[:answer_bytes])
    verdict = sock.recv(100)

    assert b"recorded" in recorded
    assert TOKEN.encode() not in recorded + tap.said["server"].getvalue()
    assert verdict == b"t" + bytes(PROOF_BYTES)
    sock.close()


def test_a_reflected_challenge_opens_nothing(server: ServerProcess) -> None:
    one, two = dial(server.address), dial(server.address)
    challenge = one.recv(100)
    # The second connection is given the first one's nonce, to have it proven by the server.
    two.recv(100)
    two.sendall(challenge + bytes(PROOF_BYTES))

    assert two.recv(100) == b"t" + bytes(PROOF_BYTES)
    one.close()
    two.close()


def test_the_door_holds_against_noise(server: ServerProcess) -> None:
    for noise in (b"GET / HTTP/1.1\r\n\r\n" * 8, bytes(200), MAGIC * 50, b"\xff" * 1000):
        sock = dial(server.address)
        sock.sendall(noise)
        sock.close()

    with Transport(server.address, TOKEN) as transport:
        assert transport.request(b"fine") == b"fine"
