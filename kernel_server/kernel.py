"""One loaded model made ready to debug: pages, engine, state, loop and gateway, put together.

Only wiring. A kernel needs no sockets: `handle` answers the bytes of one request, which is how the
service uses it and how tests and notebooks run one inside their own process.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import kernel_server.version as version
from kernel_server.config import ServerConfig
from kernel_server.engine.engine import Engine
from kernel_server.engine.kv_cache import KVCache, PageShape
from kernel_server.engine.reads import TensorSource
from kernel_server.engine.segments import Segments
from kernel_server.event_log import EventLog
from kernel_server.gateway import Gateway, Served
from kernel_server.loop import Loop
from kernel_server.models.registry import LoadedModel, load_model
from kernel_server.protocol.errors import OutOfDeviceMemory
from kernel_server.protocol.messages import ModelInfo
from kernel_server.state.server_state import ServerState
from kernel_server.state.shape import Limits, ModelShape
from kernel_server.telemetry import Row, process_rows

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]

#: Pool when --kv-memory is not given: on a CPU this much, on a GPU this share of what is free.
CPU_KV_BYTES = 1 << 30
GPU_KV_SHARE = 0.8
CPU_PREFILL_CHUNK = 512
GPU_PREFILL_CHUNK = 2048


def load(config: ServerConfig, progress: Progress) -> LoadedModel:
    """Load the model of `config` and compare it with stock transformers.

    Raises ModelNotFound, BrokenModel, UnsupportedModel, OutOfDeviceMemory.
    """
    torch.set_num_threads(config.threads)
    return load_model(config.model, progress=progress)


class Kernel:
    """A model's engine thread with everything that decides for it.

    kernel = Kernel(load(config, print), config).start()
    answer = kernel.gateway.handle("me", "here", request_bytes)
    kernel.close()
    """

    def __init__(
        self, loaded: LoadedModel, config: ServerConfig, gateway: Gateway | None = None
    ) -> None:
        self.loaded = loaded
        self.config = config
        self.gateway = gateway or Gateway(
            secrets.token_hex(4), version.VERSION, EventLog(), debug=config.debug
        )
        model = loaded.model
        on_gpu = model.device.type == "cuda"
        chunk = config.prefill_chunk or (GPU_PREFILL_CHUNK if on_gpu else CPU_PREFILL_CHUNK)
        shape = loaded.page_shape
        num_pages = self._num_pages(shape, model.device)
        self.cache = KVCache(shape, num_pages, model.device)
        self.segments = Segments(model, self.cache, prefill_chunk=chunk)
        self.info: ModelInfo = replace(
            loaded.info,
            fingerprint=loaded.info.fingerprint
            | {
                "prefill_chunk": chunk,
                "decode_bucket": config.decode_bucket,
                "threads": torch.get_num_threads(),
                "mode": "exact",
            },
        )
        self.state = ServerState(self._shape(shape, num_pages, chunk), Limits(), check=config.check)
        self.loop = Loop(self.state, self.gateway.events, debug=config.debug)
        self.engine = Engine(
            self.segments,
            self.cache,
            post=self.loop.dispatch,
            reply=self.loop.reply,
            offer=self._offer,
            texts=loaded.vocabulary.text if loaded.vocabulary is not None else None,
            debug=config.debug,
        )
        self.loop.attach(self.engine)
        self._thread = threading.Thread(target=self.engine.run, name="engine", daemon=True)

    def start(self) -> Kernel:
        """Start the engine thread and answer requests from now on."""
        self._thread.start()
        self.gateway.ready(
            Served(
                loop=self.loop, model=self.info, words=self.loaded.vocabulary, memory=self.memory
            )
        )
        return self

    def close(self) -> None:
        """End the engine thread at its next layer boundary."""
        self.gateway.events.close()
        self.engine.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=30.0)

    def has_unfinished_sessions(self) -> bool:
        """Whether somebody may want to come back to a session."""
        statuses = [session.status for session in list(self.state.sessions.values())]
        return any(status in ("waiting", "running", "stopped") for status in statuses)

    def memory(self) -> tuple[Row, ...]:
        """Where the bytes are, as (kind, bytes, note)."""
        used = self.cache.num_pages - self.state.pool.num_free
        page = self.cache.page_bytes
        held = self.engine.nbytes()
        return (
            ("weights", self.loaded.weights_bytes, self.info.name),
            ("KV pages in use", used * page, f"{used} of {self.cache.num_pages} pages"),
            ("KV pages free", (self.cache.num_pages - used) * page, f"{page} bytes a page"),
            ("residual streams", held, "activations of stopped and running sessions"),
            *process_rows(self.info.device),
        )

    # -- sizes --------------------------------------------------------------------------------

    def _num_pages(self, shape: PageShape, device: torch.device) -> int:
        wanted = self.config.kv_memory_bytes
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if wanted is None:
                wanted = int(free * GPU_KV_SHARE)
            elif wanted > free:
                raise OutOfDeviceMemory(
                    f"--kv-memory asks for {wanted} bytes, {free} are free on {device} beside the"
                    " weights: ask for less"
                )
        elif wanted is None:
            wanted = CPU_KV_BYTES
        if wanted < shape.page_bytes * shape.num_groups:
            raise OutOfDeviceMemory(
                f"--kv-memory of {wanted} bytes does not hold one page per page group"
                f" ({shape.num_groups} of {shape.page_bytes} bytes): ask for more"
            )
        return wanted // shape.page_bytes

    def _shape(self, pages: PageShape, num_pages: int, chunk: int) -> ModelShape:
        info = self.info
        return ModelShape(
            num_layers=info.num_layers,
            hidden_size=info.hidden_size,
            norm_size=self.loaded.norm_size,
            vocab_size=info.vocab_size,
            layers_per_group=pages.group_layers,
            page_tokens=pages.page_tokens,
            num_pages=num_pages,
            page_bytes=pages.page_bytes,
            max_context=info.max_context,
            eos_token_ids=info.eos_token_ids,
            prefill_chunk=chunk,
        )

    def _offer(self, session_id: str, source: TensorSource) -> str:
        """Open a download for the session's owner."""
        owner: Any = self.state.sessions[session_id].owner
        return self.gateway.transfers.offer(str(owner), source)
