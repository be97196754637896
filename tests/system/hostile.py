"""Hostile clients: each does one thing as hard as it can until it is killed.

    python -m tests.system.hostile ATTACK ADDRESS SESSION_ID TIMES

TIMES is how many of each of its connections it has: 1 is the attack as it stands below. They hold a
token of their own (read from standard input, with a recorded handshake) and speak the wire by hand,
so that a call costs them less than it costs the server.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from rpyc.core import brine, consts

from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from kernel_server.wire import FRAME_CAP, Address, dial, parse_address, plain
from kernel_server.wire.handshake import join_server

#: How many frames go out in one write, so that the attacker's own Python is not what limits it.
AT_ONCE = 32
PROMPT = tuple(range(5, 260))


class Target:
    """The server under attack, as its attacker knows it."""

    def __init__(self, address: str, session_id: str, token: str, recorded: bytes) -> None:
        self.address: Address = parse_address(address)
        self.session_id = session_id
        self.token = token
        self.recorded = recorded

    def log_in(self) -> socket.socket:
        sock = dial(self.address)
        join_server(sock, self.token, str(self.address))
        sock.settimeout(120)  # who has used much has their next call begun late
        return sock

    def ask(self, sock: socket.socket, message: object) -> object:
        """One honest call."""
        sock.sendall(frame(codec.encode(message)))
        answer = _receive(sock)
        return codec.decode(plain.load(memoryview(answer))[2][1])


def frame(payload: bytes) -> bytes:
    """The bytes of one call that carries `payload`."""
    call = (consts.HANDLE_CALL, (consts.LABEL_VALUE, (payload,)))
    body = b"".join(plain.dump(consts.MSG_REQUEST, 7, call))
    return brine.I4.pack(len(body)) + b"\0" + body + b"\n"


def _receive(sock: socket.socket) -> bytes:
    length = brine.I4.unpack(_exactly(sock, 5)[:4])[0]
    return _exactly(sock, length + 1)[:-1]


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError("closed")
        data += more
    return data


def _drain(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(1 << 20):
            continue


def _pour(target: Target, frames: Callable[[], Iterator[bytes]], *, reads: bool = True) -> None:
    """Send frames without end on one connection, and begin anew when it is taken away."""
    while True:
        try:
            with target.log_in() as sock:
                if reads:
                    threading.Thread(target=_drain, args=(sock,), daemon=True).start()
                for data in frames():
                    sock.sendall(data)
        except (OSError, EOFError):
            time.sleep(0.01)


def _same(*messages: object) -> Callable[[], Iterator[bytes]]:
    block = b"".join(frame(codec.encode(message)) for message in messages)
    block *= max(1, AT_ONCE // len(messages))
    return lambda: itertools.repeat(block)


def _flood(target: Target) -> list[Callable[[], None]]:
    calls = _same(m.ListSessions(), m.DescribeModel(), m.DescribeMemory())
    return [lambda: _pour(target, calls)] * 8


def _unread(target: Target) -> list[Callable[[], None]]:
    """Asks for events and large answers, and takes none of them."""
    calls = _same(m.PollEvents(after=0, timeout_s=0), m.DescribeModel())
    return [lambda: _pour(target, calls, reads=False)] * 16


def _huge(target: Target) -> list[Callable[[], None]]:
    most = FRAME_CAP - 4096
    text = b'{"type":"Tokenize","body":{"text":"' + b"x" * (4_000_000) + b'"}}'
    numbers = b'{"type":"TokenTexts","body":{"token_ids":[' + b"1," * 2_000_000 + b"1]}}"
    too_long = b'{"type":"Tokenize","body":{"text":"' + b"x" * (most - 100) + b'"}}'
    made = [_message(header) for header in (text, numbers, too_long)]
    made.append(frame(b"\xff" * most))
    lies = [brine.I4.pack(2**32 - 1) + b"\0" + bytes(1 << 20)]
    return [
        *(lambda data=data: _pour(target, lambda: itertools.repeat(data)) for data in made),
        lambda: _pour(target, lambda: itertools.repeat(lies[0])),
    ]


def _message(header: bytes) -> bytes:
    return frame(b"DJN1" + len(header).to_bytes(4, "little") + header)


def _half_open(target: Target) -> list[Callable[[], None]]:
    """Dials and says nothing, or begins a frame and leaves it."""

    def silent() -> None:
        held: list[socket.socket] = []
        while True:
            with contextlib.suppress(OSError):
                held.append(dial(target.address, 1.0))
            if len(held) > 200:
                for sock in held[:100]:
                    sock.close()
                del held[:100]

    def begun() -> None:
        held: list[socket.socket] = []
        while True:
            with contextlib.suppress(Exception):
                sock = target.log_in()
                sock.sendall(brine.I4.pack(FRAME_CAP) + b"\0half of")
                held.append(sock)
            if len(held) > 80:
                for sock in held:
                    sock.close()
                held.clear()

    return [silent, silent, begun]


def _replay(target: Target) -> list[Callable[[], None]]:
    """Answers every challenge with what an honest client once answered to another."""

    def again() -> None:
        while True:
            with contextlib.suppress(OSError), dial(target.address, 1.0) as sock:
                sock.recv(100)
                sock.sendall(target.recorded)
                sock.recv(100)

    return [again] * 4


def _strangers(target: Target) -> list[Callable[[], None]]:
    """Names sessions and transfers that belong to somebody else."""
    theirs = target.session_id
    messages = [
        m.Describe(session_id=theirs),
        m.Terminate(session_id=theirs),
        m.Pause(session_id=theirs),
        *(m.Next(session_id=theirs, seen=seen) for seen in range(4)),
        m.Fork(session_id=theirs),
        m.ReadValue(session_id=theirs, seen=1, what="tensor"),
        m.ReadLens(session_id=theirs, seen=1),
        m.ReadStory(session_id=theirs),
        m.ReadChunk(transfer_id="0" * 16, offset=0, length=1 << 20),
        *(m.Terminate(session_id=f"s{number}") for number in range(1, 20)),
    ]
    return [lambda: _pour(target, _same(*messages))] * 8


def _reads(target: Target) -> list[Callable[[], None]]:
    """Has the engine read whatever it can of a session of their own."""
    with target.log_in() as sock:
        had = target.ask(sock, m.ListSessions())  # of those that were killed before: they add up
        assert isinstance(had, m.Sessions), had
        for info in had.sessions:
            target.ask(sock, m.Terminate(session_id=info.id))
        launched = target.ask(
            sock, m.Launch(token_ids=PROMPT, max_new_tokens=1, stop_on_entry=True)
        )
        assert isinstance(launched, m.SessionReply), launched
        own = launched.session.id
        target.ask(sock, m.RunTo(session_id=own, seen=launched.session.stop_number, location="5"))
        while True:  # until it stands there
            found = target.ask(sock, m.Describe(session_id=own))
            assert isinstance(found, m.SessionReply), found
            if found.session.status != "running":
                break
            time.sleep(0.05)
    assert found.session.status == "stopped", found
    seen = found.session.stop_number
    calls = _same(
        m.ReadLens(session_id=own, seen=seen, top_k=1000),
        m.ReadValue(session_id=own, seen=seen, what="tensor"),
        m.ReadValue(session_id=own, seen=seen),
        m.ReadCapture(session_id=own, span="session"),
    )
    return [lambda: _pour(target, calls)] * 8


def _quotas(target: Target) -> list[Callable[[], None]]:
    """Takes of everything until it is refused, and goes on asking."""
    calls = _same(
        m.Launch(token_ids=PROMPT, max_new_tokens=100),
        m.BeginUpload(dtype="float64", shape=(1 << 20,)),
        m.Launch(token_ids=tuple(range(300)) * 20, max_new_tokens=1),
    )
    return [lambda: _pour(target, calls)] * 8


ATTACKS: dict[str, Callable[[Target], list[Callable[[], None]]]] = {
    "a flood of calls": _flood,
    "answers that are not read": _unread,
    "huge frames": _huge,
    "half-open connections": _half_open,
    "replayed handshakes": _replay,
    "other owners' ids": _strangers,
    "reads in the engine": _reads,
    "everything until refused": _quotas,
}


def attack(name: str, target: Target, times: int) -> NoReturn:
    """Do one thing until killed; says `ready` once it is under way."""
    for work in ATTACKS[name](target) * times:
        threading.Thread(target=work, daemon=True).start()
    print("ready", flush=True)
    while True:
        time.sleep(60)


def main() -> None:
    """Begin and end the attack as the lines `on` and `off` come.

    Each time by a process of its own that is killed: one that is only stopped would leave its calls
    in the server's buffers, which works them off while the others believe themselves alone.
    """
    name, address, session_id, times = sys.argv[1:]
    secrets = json.loads(sys.stdin.readline())
    target = Target(address, session_id, secrets["token"], bytes.fromhex(secrets["recorded"]))
    print("ready", flush=True)
    child = 0
    for line in sys.stdin:
        if line == "on\n":
            child = os.fork()
            if child == 0:
                try:
                    attack(name, target, int(times))
                except BaseException as error:
                    print(f"not under way: {error!r}", flush=True)  # instead of `ready`
                    os._exit(1)
            continue
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            child = 0
        print("off", flush=True)
    if child:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
