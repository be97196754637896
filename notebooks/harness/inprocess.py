"""A kernel in this process, reached through the client's own API without sockets.

Evaluation notebooks hook the stock modules and plant faults, which takes the engine's objects in
reach; what they ask of it goes through the same messages as any client's, byte for byte.
"""

from __future__ import annotations

import contextlib
import gc
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from djinn_nb.client import Client
from djinn_nb.server import Server
from djinn_nb.transport import Transport
from kernel_server.config import ModelConfig, Quotas, ServerConfig
from kernel_server.engine.kv_cache import KVCache
from kernel_server.engine.segments import Segments
from kernel_server.event_log import EventLog
from kernel_server.gateway import Gateway
from kernel_server.journal import Journal
from kernel_server.kernel import Kernel, load
from kernel_server.models.resumable import ResumableModel
from kernel_server.vectors import Vectors
from kernel_server.version import VERSION
from kernel_server.wire import PlainConnection

OWNER = "evaluation"


class InProcessTransport:
    """The calls of the client's `Transport`, answered by a gateway of this process."""

    address = "this process"

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._ended = threading.Event()

    def request(
        self,
        payload: bytes,
        kind: Literal["control", "bulk"] = "control",
        timeout: float = 30.0,
        on_answer: Callable[[bytes], None] | None = None,
        before: Callable[[], None] | None = None,
    ) -> bytes:
        """The gateway's answer; the deadlines are its own."""
        if before is not None:
            before()
        answer = self._gateway.handle(OWNER, kind, payload)
        if on_answer is not None:
            on_answer(answer)
        return answer

    def greet(self, greeting: Callable[[PlainConnection], None]) -> None:
        """Nothing is dialled here, so nothing is greeted."""

    def listen(
        self,
        poll_payload: Callable[[int], bytes],
        on_answer: Callable[[bytes], int],
        *,
        after: int = 0,
        on_trouble: Callable[[Exception | None], None] | None = None,
    ) -> None:
        """Poll for events from sequence number `after` on, on a thread, until closed."""

        def poll() -> None:
            last = after
            while not self._ended.is_set():
                last = on_answer(self._gateway.handle(OWNER, "events", poll_payload(last)))

        threading.Thread(target=poll, name="in-process-events", daemon=True).start()

    @property
    def closed(self) -> bool:
        return self._ended.is_set()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop polling; a poll under way ends when the kernel is closed."""
        self._ended.set()


@dataclass(frozen=True, slots=True)
class Local:
    """A kernel of this process and the client's view of it."""

    kernel: Kernel
    server: Server

    @property
    def model(self) -> ResumableModel:
        """The stock model, made resumable, that the kernel runs."""
        return self.segments.model

    @property
    def segments(self) -> Segments:
        return self.kernel.ready.segments

    @property
    def cache(self) -> KVCache:
        return self.kernel.ready.cache

    @property
    def num_layers(self) -> int:
        return self.model.num_layers


@contextlib.contextmanager
def local_kernel(
    *,
    model: str | Path | None = None,
    geometry: str | None = None,
    seed: int = 0,
    dtype: str,
    device: str,
    prefill_chunk: int,
    kv_memory_bytes: int = 64 << 20,
    host_memory_bytes: int = 0,
    disk_memory_bytes: int = 0,
    idle_after_s: float | None = None,
    lease_s: float | None = None,
    sessions: int = 64,
    check: bool = True,
    cuda_graphs: bool = True,
    state_dir: Path | None = None,
) -> Iterator[Local]:
    """Load a model and serve it inside this process, on one thread.

    model: a folder. geometry: random weights at a known geometry. Neither: the bundled model.
    sessions: how many there may be. check: judge every invariant of the state at every event;
    benchmarks do without. Named vectors are kept as long as the kernel. state_dir: of
    a journal, from which sessions come back; None: there is none. lease_s: needs one.

        with local_kernel(dtype="float32", device="cpu", prefill_chunk=16) as local:
            session = local.server.launch("When Mary and John", max_new_tokens=4)
    """
    config = ServerConfig(
        model=ModelConfig(
            model=None if model is None else str(model),
            geometry=geometry,
            seed=seed,
            dtype=dtype,
            device=device,
        ),
        prefill_chunk=prefill_chunk,
        kv_memory_bytes=kv_memory_bytes,
        host_memory_bytes=host_memory_bytes,
        disk_memory_bytes=disk_memory_bytes,
        idle_after_s=idle_after_s,
        cuda_graphs=cuda_graphs,
        lease_s=lease_s,
        quotas=Quotas(sessions=sessions),
        check=check,
    )
    kept = tempfile.TemporaryDirectory(prefix="djinn-vectors-")
    vectors = Vectors(Path(kept.name))
    gateway = Gateway(secrets.token_hex(4), VERSION, EventLog(), vectors=vectors)
    journal = None if state_dir is None else Journal(state_dir)
    gateway.keep(journal)
    kernel = Kernel(load(config, _quiet), config, gateway, journal=journal).start()
    transport = cast(Transport, InProcessTransport(kernel.gateway))
    server = Server(Client(transport, "evaluation"))
    try:
        yield Local(kernel, server)
    finally:
        server.close()
        kernel.close()
        kept.cleanup()
        # The next model needs the room, and modules refer to each other in circles.
        del server, transport, kernel, gateway
        gc.collect()
        torch.cuda.empty_cache()


def _quiet(*progress: Any) -> None:
    """Loading is not what these notebooks are about."""
