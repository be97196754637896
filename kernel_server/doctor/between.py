"""Bytes between two processes of this machine: shared memory, a raw socket, and our own wire.

The other process is started for the measurement and ends with it. It is told what to do by lines on
its standard input; the figures are taken here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kernel_server.service import Service
from kernel_server.wire import PAYLOAD_CAP, PlainConnection, connect, parse_address

SHARED = Path("/dev/shm")
#: Bytes of one measurement, at least.
AT_LEAST = 16 << 20
#: Largest chunk that crosses a socket here: more at once makes nothing faster.
SOCKET_MOST = 16 << 20
TIMEOUT_S = 60.0

Row = dict[str, Any]


def rows(chunks: Sequence[int], repetitions: int) -> tuple[list[Row], list[str]]:
    """The figures by chunk size, and what is absent and why."""
    found: list[Row] = []
    absent: list[str] = []
    if SHARED.is_dir() and os.access(SHARED, os.W_OK):
        found += _shared_memory(chunks, repetitions, absent)
    else:
        absent.append(f"shared memory: {SHARED} cannot be written")
    found += _raw_socket([c for c in chunks if c <= SOCKET_MOST], repetitions)
    found += _wire([c for c in chunks if c <= PAYLOAD_CAP], repetitions)
    return found, absent


def _timed(call: Callable[[], None], repetitions: int) -> list[float]:
    call()  # once for nothing: caches, buffers
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def _copies(chunk: int) -> int:
    return max(1, min(64, AT_LEAST // chunk))


def _row(name: str, chunk: int, moved: int, times: Sequence[float]) -> Row:
    from kernel_server.doctor.bandwidth import row

    return row(name, chunk, moved, times, "wall clock")


def _shared_memory(chunks: Sequence[int], repetitions: int, absent: list[str]) -> list[Row]:
    """Written by one process, read by the other, with a byte each way to say so."""
    found = []
    status = os.statvfs(SHARED)
    for chunk in chunks:
        if chunk > status.f_bavail * status.f_frsize // 2:
            absent.append(f"shared memory in chunks of {chunk} bytes: {SHARED} is too small")
            continue
        with tempfile.NamedTemporaryFile(dir=SHARED, prefix="djinn-doctor-") as file:
            file.truncate(chunk)
            with (
                mmap.mmap(file.fileno(), chunk) as shared,
                _peer("shared", file.name, str(chunk)) as (said, told),
            ):
                data = bytes(chunk)

                def move(data: bytes = data, shared: mmap.mmap = shared) -> None:
                    shared[:] = data
                    os.write(told, b".")
                    if os.read(said, 1) != b".":
                        raise ConnectionError("the other process ended")

                found.append(_row("shared memory", chunk, chunk, _timed(move, repetitions)))
    return found


def _raw_socket(chunks: Sequence[int], repetitions: int) -> list[Row]:
    """One way over loopback into a buffer that is there; the last byte is acknowledged."""
    found = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        with _peer("socket", str(listener.getsockname()[1])):
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(TIMEOUT_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for chunk in chunks:
                    data, copies = bytes(chunk), _copies(chunk)

                    def send(data: bytes = data, copies: int = copies) -> None:
                        sock.sendall((len(data) * copies).to_bytes(8, "little"))
                        for _ in range(copies):
                            sock.sendall(data)
                        if sock.recv(1) != b".":
                            raise ConnectionError("the other process ended")

                    times = _timed(send, repetitions)
                    found.append(_row("loopback, raw socket", chunk, chunk * copies, times))
    return found


def _wire(chunks: Sequence[int], repetitions: int) -> list[Row]:
    """Calls of our own wire, one after the other, with the payload in one direction."""
    found = []
    with _peer("wire") as (said, told):
        token = os.read(said, 200).decode().split()
        with contextlib.closing(connect(parse_address(token[0]), token[1])) as connection:
            for chunk in chunks:
                for name, payload in (
                    ("loopback, wire, to server", bytes(chunk)),
                    ("loopback, wire, to client", b"get %d" % chunk),
                ):
                    copies = _copies(chunk)

                    def call(
                        payload: bytes = payload,
                        copies: int = copies,
                        connection: PlainConnection = connection,
                    ) -> None:
                        for _ in range(copies):
                            connection.call(payload, TIMEOUT_S)

                    found.append(_row(name, chunk, chunk * copies, _timed(call, repetitions)))
        os.write(told, b".")
    return found


@contextlib.contextmanager
def _peer(*words: str) -> Iterator[tuple[int, int]]:
    """The other process; yields what it says and where it listens, as file descriptors."""
    command = [sys.executable, "-m", "kernel_server.doctor.between", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.fileno(), process.stdin.fileno()
        finally:
            process.kill()


def main(words: Sequence[str]) -> None:
    """What the other process does."""
    match words:
        case ["shared", name, chunk]:
            _read_shared(name, int(chunk))
        case ["socket", port]:
            _read_socket(int(port))
        case ["wire"]:
            _serve()


def _read_shared(name: str, chunk: int) -> None:
    target = memoryview(bytearray(chunk))  # written in place: a bytearray would make a copy first
    with open(name, "r+b") as file, mmap.mmap(file.fileno(), chunk) as shared:
        while os.read(0, 1):
            with memoryview(shared) as view:
                target[:] = view
            os.write(1, b".")


def _read_socket(port: int) -> None:
    buffer = bytearray(1 << 20)
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while header := sock.recv(8, socket.MSG_WAITALL):
            left = int.from_bytes(header, "little")
            while left:
                got = sock.recv_into(buffer, min(left, len(buffer)))
                if not got:
                    return
                left -= got
            sock.sendall(b".")


def _serve() -> None:
    token = secrets.token_urlsafe(24)

    def handle(owner: str, connection: str, payload: bytes) -> bytes:
        return bytes(int(payload[4:])) if payload.startswith(b"get ") else b""

    with Service(handle, {"doctor": token}, "127.0.0.1:0") as service:
        os.write(1, f"{service.address} {token}\n".encode())
        os.read(0, 1)


if __name__ == "__main__":
    main(sys.argv[1:])
