"""The wire against bare rpyc: 20 MiB each way in 1 MiB chunks, and a small call.

Bare rpyc means compression off and TCP_NODELAY on, without our checks: the peer to be measured
against. Server and client are separate processes; the arms alternate within one run, so both meet
the same machine. `python -m tests.benchmarks.wire` prints the record as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import rpyc
from rpyc.core.channel import Channel
from rpyc.core.protocol import Connection
from rpyc.core.stream import SocketStream

from djinn_nb.transport import Transport
from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.service import Service
from kernel_server.transfers import Transfers
from kernel_server.wire import dial, parse_address

MIB = 2**20
CHUNK_BYTES = MIB
TENSOR_BYTES = 20 * MIB
TOKEN = "a-token-for-benchmarks"
REPETITIONS = 30

Arm = Callable[[], float]


def measure(repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Time every arm `repetitions` times, alternating; rates also as ratios to bare rpyc's."""
    with contextlib.ExitStack() as stack:
        arms = _arms(stack)
        for arm in arms.values():  # once for nothing: caches, buffers, branch of the allocator
            arm()
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(repetitions):
            for name, arm in arms.items():
                times[name].append(arm())
    record: dict[str, Any] = {"repetitions": repetitions, "tensor_bytes": TENSOR_BYTES}
    record["ms"] = {name: _spread([1e3 * t for t in each]) for name, each in times.items()}
    record["rate_to_bare_rpyc"] = {
        name: _spread([bare / ours for bare, ours in zip(times[peer], each, strict=True)])
        for name, each in times.items()
        if (peer := f"bare {name.split(' ', 1)[1]}") in times and not name.startswith("bare")
    }
    return record


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}


def _arms(stack: contextlib.ExitStack) -> dict[str, Arm]:
    ours = Transport(stack.enter_context(_process("ours")), TOKEN)
    stack.callback(ours.close)
    bare = _bare_client(stack.enter_context(_process("bare")))
    stack.callback(bare.close)
    put, get, echo = bare.root.put, bare.root.get, bare.root.echo
    tensor = os.urandom(TENSOR_BYTES)
    view = memoryview(tensor)
    offsets = range(0, TENSOR_BYTES, CHUNK_BYTES)

    def bare_fetch() -> None:
        into = bytearray(TENSOR_BYTES)
        for at in offsets:
            into[at : at + CHUNK_BYTES] = get()

    def bare_send() -> None:
        for at in offsets:
            put(bytes(view[at : at + CHUNK_BYTES]))

    def wire_fetch() -> None:
        into = bytearray(TENSOR_BYTES)
        for at in offsets:
            into[at : at + CHUNK_BYTES] = ours.request(b"get", "bulk")

    def wire_send() -> None:
        for at in offsets:
            ours.request(bytes(view[at : at + CHUNK_BYTES]), "bulk")

    def message(request: Any) -> Any:
        answer = codec.decode(ours.request(codec.encode(request), "bulk"))
        if isinstance(answer, m.ErrorReply):
            codec.raise_error(answer.error)
        return answer

    def chunks_fetch() -> None:
        transfer = message(m.BeginUpload(dtype="uint8", shape=(0,))).transfer_id
        into = bytearray(TENSOR_BYTES)
        for at in offsets:
            piece = message(m.ReadChunk(transfer_id=transfer, offset=at, length=CHUNK_BYTES))
            into[at : at + CHUNK_BYTES] = piece.data.data
        message(m.ReadChunk(transfer_id=transfer, offset=0, length=1, cancel=True))

    def chunks_send() -> None:
        begin = m.BeginUpload(dtype="uint8", shape=(TENSOR_BYTES,))
        transfer = message(begin).transfer_id
        for at in offsets:
            data = Array("uint8", (CHUNK_BYTES,), view[at : at + CHUNK_BYTES])
            message(m.WriteChunk(transfer_id=transfer, offset=at, data=data))

    def small(call: Callable[[bytes], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(100):
                call(b"small")

        return run

    return {
        name: _timed(arm)
        for name, arm in {
            "bare fetch": bare_fetch,
            "wire fetch": wire_fetch,
            "chunks fetch": chunks_fetch,
            "bare send": bare_send,
            "wire send": wire_send,
            "chunks send": chunks_send,
            "bare 100 small calls": small(echo),
            "wire 100 small calls": small(ours.request),
        }.items()
    }


def _timed(arm: Callable[[], None]) -> Arm:
    def run() -> float:
        began = time.perf_counter()
        arm()
        return time.perf_counter() - began

    return run


@contextlib.contextmanager
def _process(kind: str) -> Iterator[str]:
    """A server of one kind in its own process; yields its address."""
    command = [sys.executable, "-m", "tests.benchmarks.wire", "serve", kind]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(10)


def _bare_client(address: str) -> Connection:
    return Connection(
        rpyc.VoidService(), Channel(SocketStream(dial(parse_address(address))), compress=False)
    )


def _serve_bare() -> None:
    piece = os.urandom(CHUNK_BYTES)

    class Bare(rpyc.Service):
        def exposed_put(self, data: bytes) -> int:
            return len(data)

        def exposed_get(self) -> bytes:
            return piece

        def exposed_echo(self, data: bytes) -> bytes:
            return data

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    Connection(Bare(), Channel(SocketStream(sock), compress=False)).serve_all()


class _Random:
    """The tensor every download reads: random bytes of one chunk, again and again."""

    def __init__(self) -> None:
        self.dtype = "uint8"
        self.shape: tuple[int, ...] = (TENSOR_BYTES,)
        self.nbytes = TENSOR_BYTES
        self._data = os.urandom(CHUNK_BYTES)

    def read(self, offset: int, length: int) -> memoryview:
        return memoryview(self._data)[:length]


def _serve_ours() -> None:
    """Our service with the real codec and transfers, and nothing behind them."""
    transfers, source = Transfers(), _Random()
    piece = os.urandom(CHUNK_BYTES)

    def handle(owner: str, connection_id: str, payload: bytes) -> bytes:
        if payload == b"get":
            return piece
        if payload == b"small":
            return payload
        if payload[:4] != codec.MAGIC:
            return b"ok"
        return codec.encode(answer(owner, codec.decode(payload)))

    def answer(owner: str, request: Any) -> Any:
        if isinstance(request, m.BeginUpload):
            if request.shape == (0,):  # stands for the request that offers a download
                return m.UploadReply(transfer_id=transfers.offer(owner, source), received=0)
            key = transfers.begin(owner, request.dtype, request.shape)
            return m.UploadReply(transfer_id=key, received=0)
        if isinstance(request, m.ReadChunk) and request.cancel:
            transfers.cancel(owner, request.transfer_id)
            return m.Chunk(offset=0, data=Array("uint8", (0,), b""))
        if isinstance(request, m.ReadChunk):
            data = transfers.read(owner, request.transfer_id, request.offset, request.length)
            array = Array("uint8", (len(data),), data)
            return m.Chunk(offset=request.offset, data=array)
        key = request.transfer_id
        received = transfers.write(owner, key, request.offset, request.data.data)
        if received == TENSOR_BYTES:
            transfers.take(owner, key)
        return m.UploadReply(transfer_id=key, received=received)

    with Service(handle, {"me": TOKEN}, "127.0.0.1:0") as service:
        print(service.address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        _serve_bare() if sys.argv[2] == "bare" else _serve_ours()
    else:
        print(json.dumps(measure(), indent=2))
