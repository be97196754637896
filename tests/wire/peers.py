"""A server process to attack and measure, and a peer that speaks rpyc's frames by hand."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

from rpyc.core import brine, consts

from kernel_server.wire import Address, dial, parse_address
from kernel_server.wire.handshake import join_server

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-for-tests-only"

_ECHO_SERVER = """
import sys, threading
{prepare}
from kernel_server.service import Limits, Service
service = Service(lambda owner, connection, payload: payload, {{"me": {token!r}}},
                  "127.0.0.1:0", limits=Limits({limits})).start()
print(service.address, flush=True)
sys.stdin.read()
service.close()
"""


class ServerProcess:
    """An echo server in a process of its own."""

    def __init__(self, prepare: str = "", limits: str = "") -> None:
        code = _ECHO_SERVER.format(prepare=prepare, token=TOKEN, limits=limits)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = parse_address(self.process.stdout.readline())

    @property
    def peak_mib(self) -> float:
        """Peak resident memory so far, MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Attacker:
    """A peer that is let in and then sends whatever it likes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(60)

    @classmethod
    def logged_in(cls, address: Address) -> Attacker:
        sock = dial(address)
        join_server(sock, TOKEN, str(address))
        return cls(sock)

    def send_frame(self, body: bytes, compressed: int = 0, length: int | None = None) -> None:
        header = brine.I4.pack(len(body) if length is None else length) + bytes([compressed])
        self.sock.sendall(header + body + b"\n")

    def send(self, message: int, sequence: int, value: object) -> None:
        self.send_frame(bytes([message]) + brine.dump((sequence, value)))

    def receive(self) -> tuple[int, int, object]:
        """The next message, read by stock brine; EOFError when the peer has closed."""
        length = brine.I4.unpack(self._read(5)[:4])[0]
        body = self._read(length + 1)[:-1]
        sequence, value = brine.load(body[1:])
        return body[0], sequence, value

    def ask(
        self, handler: int, args: object, label: int = consts.LABEL_VALUE
    ) -> tuple[int, object]:
        """Send one request; answer the kind and content of what comes back."""
        self.send(consts.MSG_REQUEST, 77, (handler, (label, args)))
        message, _, value = self.receive()
        return message, value

    def is_dropped(self) -> bool:
        """Whether the peer closes without another word."""
        try:
            return self.sock.recv(1) == b""
        except (ConnectionResetError, BrokenPipeError):
            return True

    def close(self) -> None:
        self.sock.close()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise EOFError("closed")
            data += more
        return data
