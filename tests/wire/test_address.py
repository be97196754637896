"""A server listens where only its own machine reaches it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel_server.protocol.errors import AddressRefused, BadArgument, PortInUse
from kernel_server.wire import Address, dial, listen, parse_address


@pytest.fixture
def keep() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu-box:5557", Address("gpu-box", 5557)),
        ("gpu-box", Address("gpu-box", 5556)),
        (":7000", Address("127.0.0.1", 7000)),
        ("7000", Address("127.0.0.1", 7000)),
        ("", Address("127.0.0.1", 5556)),
        ("[::1]:7000", Address("::1", 7000)),
        ("unix:/run/me/djinn", Address("", 0, "/run/me/djinn")),
        ("/run/me/djinn", Address("", 0, "/run/me/djinn")),
    ],
)
def test_an_address_is_read_and_its_text_reads_back(text: str, expected: Address) -> None:
    assert parse_address(text) == expected
    assert parse_address(str(expected)) == expected


@pytest.mark.parametrize("text", ["a b", "host:99999", "http://x:1", "unix:relative", "::1", "a:b"])
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadArgument):
        parse_address(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "8.8.8.8"])
def test_listening_beyond_loopback_is_refused_with_the_way_to_do_it(host: str) -> None:
    with pytest.raises(AddressRefused, match="ssh -L 5556:localhost:5556"):
        listen(parse_address(f"{host}:5556"))


def test_a_port_in_use_is_said_so(keep: contextlib.ExitStack) -> None:
    sock, address = listen(Address(port=0))
    keep.callback(sock.close)

    with pytest.raises(PortInUse, match=str(address.port)):
        listen(address)


def test_localhost_is_loopback(keep: contextlib.ExitStack) -> None:
    sock, address = listen(parse_address("localhost:0"))
    keep.callback(sock.close)

    assert address.host == "127.0.0.1"


def test_a_unix_socket_lives_in_a_folder_of_its_own(
    tmp_path: Path, keep: contextlib.ExitStack
) -> None:
    path = tmp_path / "mine" / "djinn"
    sock, address = listen(parse_address(f"unix:{path}"))
    keep.callback(sock.close)
    keep.callback(dial(address).close)

    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_open_folder_is_refused_for_a_unix_socket(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)

    with pytest.raises(AddressRefused, match="chmod 700"):
        listen(parse_address(f"unix:{tmp_path}/djinn"))

    assert not (tmp_path / "djinn").exists()


def test_the_socket_of_a_dead_server_is_replaced_and_that_of_a_live_one_is_not(
    tmp_path: Path, keep: contextlib.ExitStack
) -> None:
    tmp_path.chmod(0o700)
    address = parse_address(f"unix:{tmp_path}/djinn")
    dead, _ = listen(address)
    dead.close()
    live, _ = listen(address)
    keep.callback(live.close)

    with pytest.raises(PortInUse):
        listen(address)
    dial(address).close()


def test_a_file_is_never_mistaken_for_a_stale_socket(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "djinn").write_text("precious")

    with pytest.raises(AddressRefused):
        listen(parse_address(f"unix:{tmp_path}/djinn"))

    assert (tmp_path / "djinn").read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AddressRefused, match="103"):
        listen(parse_address(f"unix:{tmp_path}/{'x' * 120}"))


def test_a_dialled_socket_sends_at_once_and_notices_a_vanished_peer(
    keep: contextlib.ExitStack,
) -> None:
    listener, address = listen(Address(port=0))
    keep.callback(listener.close)
    sock = dial(address)
    keep.callback(sock.close)

    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
