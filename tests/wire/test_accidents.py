"""What happens to honest peers: they are stopped, killed, slow, or send what does not cross."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from rpyc.core import consts
from rpyc.core.protocol import DEFAULT_CONFIG

from djinn_nb.transport import Transport
from kernel_server.service import Limits, Service
from kernel_server.wire import connect
from kernel_server.wire.connection import STRICT_CONFIG
from tests.wire.peers import ROOT, TOKEN, Attacker, ServerProcess

_CLIENT = """
import sys
from kernel_server.wire import connect, parse_address
connection = connect(parse_address(sys.argv[1]), {token!r})
connection.call(b"x", 30)
print("ready", flush=True)
{then}
"""


def _client(address: object, then: str) -> subprocess.Popen[str]:
    code = _CLIENT.format(token=TOKEN, then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(address)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _soon(holds: Callable[[], bool], within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def _service(
    handler: Callable[[str, str, bytes], bytes] | None = None, **options: object
) -> Service:
    handle = handler or (lambda owner, connection, payload: payload)
    return Service(handle, {"me": TOKEN}, "127.0.0.1:0", **options)  # type: ignore[arg-type]


def test_a_client_that_is_stopped_amid_its_calls_costs_the_others_nothing() -> None:
    with _service(limits=Limits(frame_s=0.5)) as service:
        # answers of 4 MiB: once it is stopped, no socket buffer takes one
        stopped = _client(service.address, "while True: connection.call(bytes(4 << 20), 60)")
        assert len(service.connections()) == 1
        stopped.send_signal(signal.SIGSTOP)
        with Transport(service.address, TOKEN) as other:
            slowest_s = 0.0
            for _ in range(100):
                began = time.monotonic()
                other.request(b"x")
                slowest_s = max(slowest_s, time.monotonic() - began)

        # a call held by the stopped one would wait for its deadline: a second per 64 KiB, 64 s
        assert slowest_s < 16
        _end(stopped)
        assert _soon(lambda: service.connections() == [])


def test_a_stopped_client_that_does_not_take_a_small_answer_stays_and_goes_on() -> None:
    with _service(limits=Limits(frame_s=0.2)) as service:
        idle = _client(service.address, "import time\ntime.sleep(60)")
        idle.send_signal(signal.SIGSTOP)
        time.sleep(0.6)

        assert len(service.connections()) == 1
        _end(idle)
        assert _soon(lambda: service.connections() == [])


def test_a_client_killed_in_its_own_call_is_noticed_when_the_call_ends() -> None:
    entered, release = threading.Event(), threading.Event()
    went: list[str] = []

    def handle(owner: str, connection: str, payload: bytes) -> bytes:
        if payload == b"slow":
            entered.set()
            release.wait(60)
        return payload

    with _service(handle, on_disconnect=lambda owner, connection: went.append(owner)) as service:
        killed = _client(service.address, "connection.call(b'slow', 60)")
        assert entered.wait(60)
        _end(killed)
        with Transport(service.address, TOKEN) as other:
            assert other.request(b"meanwhile") == b"meanwhile"
        gone_before = list(went)
        release.set()

        assert _soon(lambda: len(went) > len(gone_before))


def test_an_accepted_socket_sends_at_once_and_notices_a_vanished_peer() -> None:
    with _service() as service:
        connection = connect(service.address, TOKEN)
        connection.call(b"x", 30)
        [(_, served)] = service._connections.values()
        sock = served._channel.stream.sock

        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        connection.close()


def test_answers_beyond_a_segment_do_not_wait_for_an_acknowledgement(server: ServerProcess) -> None:
    payload = bytes(200_000)
    took = []
    with Transport(server.address, TOKEN) as transport:
        # 44 ms with Nagle's algorithm, every time; without it, more only where others are busy
        until = time.monotonic() + 90
        while len(took) < 15 or (time.monotonic() < until and min(took) >= 0.02):
            began = time.monotonic()
            transport.request(payload)
            took.append(time.monotonic() - began)

    assert min(took) < 0.02


@pytest.mark.parametrize(
    "value",
    [
        bytearray(b"x"),
        memoryview(b"x"),
        np.float64(1),
        np.int64(1),
        np.zeros(3),
        [1],
        {1: 2},
        print,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stock_rpyc_would_send_as_a_reference_is_a_type_error(
    value: object, server: ServerProcess
) -> None:
    connection = connect(server.address, TOKEN)

    with pytest.raises(TypeError, match="only plain values cross"):
        connection.async_request(consts.HANDLE_CALL, value)
    connection.close()


def test_every_permission_of_rpyc_is_off_on_both_sides(server: ServerProcess) -> None:
    connection = connect(server.address, TOKEN)
    permissions = {key for key in DEFAULT_CONFIG if key.startswith(("allow", "import", "instan"))}
    permissions |= {"include_local_traceback", "include_local_version"}

    assert {key for key in permissions if DEFAULT_CONFIG[key]} <= set(STRICT_CONFIG)
    assert not any(connection._config[key] for key in permissions)
    assert set(connection._HANDLERS) == {consts.HANDLE_PING, consts.HANDLE_CALL}
    connection.close()


def test_a_descriptor_freed_by_a_dead_peer_is_used_again(
    start_server: Callable[..., ServerProcess],
) -> None:
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))"
    server = start_server(prepare=few)
    for _ in range(60):
        attacker = Attacker.logged_in(server.address)
        attacker.close()

    with Transport(server.address, TOKEN, patience_s=30) as transport:
        assert transport.request(b"served") == b"served"
