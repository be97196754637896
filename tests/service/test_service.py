"""The service lets owners in, keeps their connections apart, and ends cleanly."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kernel_server import service as service_module
from kernel_server.pacing import Pacer
from kernel_server.protocol.errors import (
    AddressRefused,
    BadArgument,
    OutOfPages,
    PortInUse,
    QuotaExceeded,
    ServerFault,
)
from kernel_server.service import Limits, Service
from kernel_server.wire import PAYLOAD_CAP, PlainConnection, connect

ANN, BOB = "the-token-of-ann-here", "the-token-of-bob-here"
TOKENS = {"ann": ANN, "bob": BOB}


#: A call that is held has come, and may end.
_IS_HELD, _LET_GO = threading.Event(), threading.Event()


def _handle(owner: str, connection_id: str, payload: bytes) -> bytes:
    match payload:
        case b"who":
            return f"{owner} {connection_id}".encode()
        case b"typed":
            raise OutOfPages("needs 12 pages, 3 are free;\nterminate a session")
        case b"bug":
            raise ZeroDivisionError("a\nbug")
        case b"exit":
            sys.exit(3)
        case b"interrupt":
            raise KeyboardInterrupt
        case b"wrong":
            return "text"  # type: ignore[return-value]
        case b"large":
            return bytes(PAYLOAD_CAP + 1)
        case b"held":
            _IS_HELD.set()
            assert _LET_GO.wait(60)
    return payload


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture
def start() -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def _start(**options: object) -> Service:
        services.append(Service(_handle, TOKENS, "127.0.0.1:0", **options).start())  # type: ignore[arg-type]
        return services[-1]

    yield _start
    for service in services:
        service.close()


@pytest.fixture
def service(start: Callable[..., Service]) -> Service:
    return start()


@pytest.fixture
def open_one() -> Iterator[Callable[..., PlainConnection]]:
    opened: list[PlainConnection] = []

    def _open(service: Service, token: str = ANN) -> PlainConnection:
        opened.append(connect(service.address, token))
        return opened[-1]

    yield _open
    for connection in opened:
        connection.close()


Open = Callable[..., PlainConnection]


def _soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_call_carries_its_owner_and_its_connection(service: Service, open_one: Open) -> None:
    ann, bob, ann2 = open_one(service), open_one(service, BOB), open_one(service)

    answers = [each.call(b"who", 30).split() for each in (ann, bob, ann2)]

    assert [owner for owner, _ in answers] == [b"ann", b"bob", b"ann"]
    assert len({connection for _, connection in answers}) == 3
    assert {info.owner for info in service.connections()} == {"ann", "bob"}


@pytest.mark.parametrize(
    ("payload", "kind", "text"),
    [
        (b"typed", OutOfPages, "needs 12 pages, 3 are free; terminate a session"),
        (b"bug", ServerFault, "ZeroDivisionError: a bug"),
        (b"exit", ServerFault, "SystemExit: 3"),
        (b"interrupt", ServerFault, "KeyboardInterrupt"),
        (b"wrong", ServerFault, "not bytes"),
        (b"large", ServerFault, "ask in chunks"),
    ],
)
def test_a_failed_call_is_one_line_and_leaves_the_connection(
    payload: bytes, kind: type[Exception], text: str, service: Service, open_one: Open
) -> None:
    connection = open_one(service)

    with pytest.raises(kind) as caught:
        connection.call(payload, 30)

    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert connection.call(b"still here", 30) == b"still here"


def test_one_slow_connection_does_not_hold_another(service: Service, open_one: Open) -> None:
    slow, quick = open_one(service), open_one(service)
    _IS_HELD.clear()
    _LET_GO.clear()
    thread = threading.Thread(target=slow.call, args=(b"held", 60))
    thread.start()
    assert _IS_HELD.wait(30)

    assert quick.call(b"x", 30) == b"x"  # while the other one is still at its own
    _LET_GO.set()
    thread.join()


def test_comings_and_goings_are_told_once_each(
    start: Callable[..., Service], open_one: Open
) -> None:
    came: list[tuple[str, str]] = []
    went: list[tuple[str, str]] = []
    service = start(
        on_connect=lambda *who: came.append(who), on_disconnect=lambda *who: went.append(who)
    )
    connection = open_one(service, BOB)
    identity = connection.call(b"who", 30).decode().split()[1]
    connection.close()

    assert _soon(lambda: bool(went))
    assert came == went == [("bob", identity)]
    assert service.connections() == []


def test_a_failing_callback_costs_nothing(start: Callable[..., Service], open_one: Open) -> None:
    def fail(*_: str) -> None:
        raise RuntimeError("in a callback")

    service = start(on_connect=fail, on_disconnect=fail)
    connection = open_one(service)

    assert connection.call(b"fine", 30) == b"fine"
    connection.close()
    assert _soon(lambda: service.connections() == [])


def test_a_killed_client_is_noticed(start: Callable[..., Service]) -> None:
    went = threading.Event()
    service = start(on_disconnect=lambda *_: went.set())
    code = (
        "import os, signal; from kernel_server.wire import connect, parse_address\n"
        f"c = connect(parse_address('{service.address}'), '{ANN}'); c.call(b'x', 30)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False, timeout=90)

    assert went.wait(30)


def test_an_owner_has_a_cap_and_the_others_keep_their_places(
    start: Callable[..., Service], open_one: Open
) -> None:
    service = start(limits=Limits(connections_per_owner=2, connections=3))
    first, _ = open_one(service), open_one(service)

    with pytest.raises(QuotaExceeded):
        open_one(service)
    bob = open_one(service, BOB)
    with pytest.raises(QuotaExceeded):
        open_one(service, BOB)
    first.close()

    assert bob.call(b"fine", 30) == b"fine"
    assert _soon(lambda: len(service.connections()) == 2)
    assert open_one(service).call(b"a place again", 30) == b"a place again"


def test_who_is_no_longer_listed_has_given_back_the_place(
    start: Callable[..., Service], open_one: Open
) -> None:
    told, let_go = threading.Event(), threading.Event()

    def hold(*_: str) -> None:
        told.set()
        assert let_go.wait(60)

    service = start(limits=Limits(connections_per_owner=1), on_disconnect=hold)
    open_one(service).close()
    assert told.wait(60)

    # its thread is still at the callback, and may be there for long
    assert service.connections() == []
    try:
        assert open_one(service).call(b"the place", 30) == b"the place"
    finally:
        let_go.set()


def test_who_was_let_in_is_not_turned_out_by_those_who_come_after(
    start: Callable[..., Service], open_one: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit_client, goes_on = service_module.admit_client, threading.Event()
    slow = [True]

    def admit_slowly(*given: object) -> str:
        owner = admit_client(*given)  # type: ignore[arg-type]
        if slow.pop():
            assert goes_on.wait(60)  # a thread that is not run for a while
        return owner

    monkeypatch.setattr(service_module, "admit_client", admit_slowly)
    service = start(limits=Limits(handshakes=1))
    first = open_one(service)
    slow.append(False)
    second = open_one(service, BOB)  # one more than may be at the door at once
    goes_on.set()

    assert first.call(b"still in", 30) == b"still in"
    assert second.call(b"in too", 30) == b"in too"


def test_new_connections_come_at_a_rate_and_those_there_are_are_served(
    start: Callable[..., Service], open_one: Open
) -> None:
    service = start(limits=Limits(handshakes=2, handshakes_per_s=20))
    old = open_one(service)
    began = time.monotonic()
    for _ in range(24):
        connect(service.address, BOB).close()
    took_s = time.monotonic() - began

    # two times two at once, the others by the clock
    assert took_s > 0.8 * (24 - 4 - 2) / 20
    assert old.call(b"fine", 30) == b"fine"


def test_an_owner_who_used_much_waits_while_another_asks(
    start: Callable[..., Service], open_one: Open
) -> None:
    now = [100.0]  # a clock of the test's own: nobody's time passes before it says so
    pacer = Pacer(burst_s=0.01, active_s=60, clock=lambda: now[0])
    service = start(pacer=pacer)
    ann, bob = open_one(service), open_one(service, BOB)
    assert bob.call(b"x", 30) == ann.call(b"x", 30) == b"x"
    pacer.spend("ann", 5.0)  # a third of the time is hers: 15 s to wait, by that clock
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(ann.call(b"x", 120)))
    asking.start()

    for _ in range(20):
        assert bob.call(b"x", 30) == b"x"
    asking.join(0.3)
    assert answers == [] and asking.is_alive()
    now[0] += 20.0
    asking.join(60)
    assert answers == [b"x"]


def test_closing_ends_every_connection_and_frees_the_port(
    start: Callable[..., Service], open_one: Open
) -> None:
    service = start()
    connection = open_one(service)
    service.close()
    service.close()

    with pytest.raises((EOFError, OSError)):
        connection.call(b"x", 30)
    Service(_handle, TOKENS, service.address).close()


def test_a_port_in_use_starts_nothing(service: Service) -> None:
    with pytest.raises(PortInUse):
        Service(_handle, TOKENS, service.address)


def test_a_wide_address_starts_nothing() -> None:
    with pytest.raises(AddressRefused, match="ssh -L"):
        Service(_handle, TOKENS, "0.0.0.0:0")


@pytest.mark.parametrize("tokens", [{}, {"me": ""}, {"me": "short"}, {"a": ANN, "b": ANN}])
def test_without_good_tokens_no_server_starts(tokens: dict[str, str]) -> None:
    with pytest.raises(BadArgument):
        Service(_handle, tokens, "127.0.0.1:0")


def test_a_unix_socket_serves_and_is_taken_away(tmp_path, open_one: Open) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "run" / "djinn"
    with Service(_handle, TOKENS, f"unix:{path}") as service:
        assert open_one(service).call(b"who", 30).startswith(b"ann")

    assert not path.exists()
