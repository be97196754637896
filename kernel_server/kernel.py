"""One loaded model made ready to debug: pages, engine, state, loop and gateway, put together.

Only wiring. A kernel needs no sockets: `gateway.handle` answers the bytes of one request, which is
how the service uses it and how tests and notebooks run one inside their own process.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable

import torch
import transformers

import kernel_server.version as version
from kernel_server.config import SWITCH_INTERVAL_S, Quotas, ServerConfig, no_lease
from kernel_server.engine.engine import Engine
from kernel_server.engine.loading import Served as Ready
from kernel_server.engine.loading import serve
from kernel_server.engine.reads import TensorSource
from kernel_server.engine.segments import KEPT_MASK_BYTES
from kernel_server.event_log import EventLog
from kernel_server.gateway import Gateway, Served
from kernel_server.journal import Journal
from kernel_server.loop import Loop
from kernel_server.models import registry
from kernel_server.models.registry import LoadedModel, open_model
from kernel_server.models.resumable import ResumableModel
from kernel_server.models.vocabulary import Vocabulary
from kernel_server.protocol.messages import ModelInfo
from kernel_server.state.events import DurabilityChanged, JournalRead, Ticked
from kernel_server.state.server_state import ServerState
from kernel_server.state.sessions import Session
from kernel_server.state.shape import Limits, ModelShape
from kernel_server.telemetry import Row, device_rows, host_rows, untouched_bytes
from kernel_server.tiers import Tiers, free_note, require_space

log = logging.getLogger(__name__)

#: Told how far loading is: (text, 0 to 1).
Progress = Callable[[str, float], None]

CPU_PREFILL_CHUNK = 512
GPU_PREFILL_CHUNK = 2048
#: For tensors of stops, unless something else is said: this much, or one part of a cap in so many.
_KEPT_BYTES, _KEPT_PART = 1 << 30, 16


def load(config: ServerConfig, progress: Progress) -> LoadedModel:
    """Read the weights `config` names.

    Raises ModelNotFound, BrokenModel, UnsupportedModel, BadArgument, OutOfDeviceMemory.
    """
    require_space(config)  # first: weights may take minutes to read
    torch.set_num_threads(config.threads)
    wanted = config.model
    progress("reading weights", 0.0)
    return open_model(
        wanted.model,
        geometry=wanted.geometry,
        seed=wanted.seed,
        dtype=wanted.dtype,
        device=wanted.device,
        trust_remote_code=wanted.trust_remote_code,
        progress=lambda done, total, text: progress(text, 0.9 * done / max(total, 1)),
    )


class Kernel:
    """A model's engine thread with everything that decides for it.

    owners: how many there are; one alone may fill the page pool. journal: sessions are made durable
    there, and those it holds come back.

    Raises UnsupportedModel when the model fails the load check, OutOfDeviceMemory, and BadArgument
    for a lease without a journal.

        kernel = Kernel(load(config, print), config).start()
        answer = kernel.gateway.handle("me", "here", request_bytes)
        kernel.close()
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: ServerConfig,
        gateway: Gateway | None = None,
        progress: Progress | None = None,
        owners: int = 1,
        journal: Journal | None = None,
    ) -> None:
        if config.lease_s is not None and journal is None:
            raise no_lease()
        self.loaded = loaded
        self.config = config
        self.gateway = gateway or Gateway(
            secrets.token_hex(4), version.VERSION, EventLog(), debug=config.debug
        )
        if progress is not None:
            progress("comparing with stock transformers", 0.92)
        default = GPU_PREFILL_CHUNK if loaded.device.type == "cuda" else CPU_PREFILL_CHUNK
        chunk = config.prefill_chunk or default
        kept = _kept_bytes(config)
        self.ready: Ready = serve(
            loaded.model,
            kv_memory_bytes=config.kv_memory_bytes,
            device_memory_bytes=config.device_memory_bytes,
            kept_memory_bytes=kept,
            prefill_chunk=chunk,
            cuda_graphs=config.cuda_graphs,
        )
        self.info: ModelInfo = _describe(loaded, self.ready, config)
        # a model may have rows without a token: its vocabulary is as wide as its logits
        self.words = (
            Vocabulary(loaded.tokenizer, self.info.vocab_size) if loaded.tokenizer else None
        )
        self.tiers = Tiers(config, self.ready.cache)
        shape = self.tiers.widen(_shape(self.info, self.ready))
        limits = dataclasses.replace(
            _limits(config.quotas, shape, owners),
            idle_after_s=config.idle_after_s,
            lease_s=config.lease_s,
            kept_bytes=kept,
            tensor_bytes=self.ready.tensor_bytes,
            owners=owners,
        )
        self.state = ServerState(
            shape,
            limits,
            check=config.check,
            host_ready=self.tiers.host_ready,
            fingerprint=self.info.fingerprint,
            journal=journal is not None,
        )
        self.journal = journal
        self.loop = Loop(
            self.state,
            self.gateway.events,
            debug=config.debug,
            journal=journal,
            pacer=self.gateway.pacer,
        )
        self.engine = Engine(
            self.ready.segments,
            self.ready.cache,
            post=self.loop.dispatch,
            reply=self.loop.reply,
            offer=self._offer,
            texts=self.words.text if self.words is not None else None,
            copier=self.tiers.open(self.loop.dispatch, self.loop.copy_begun),
            debug=config.debug,
            errand_done=self.loop.errand_done,
        )
        self.loop.attach(self.engine)
        self._thread = threading.Thread(target=self.engine.run, name="engine", daemon=True)

    def start(self) -> Kernel:
        """Start the engine thread and answer requests from now on."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._thread.start()
        if self.journal is not None:
            self._take_up(self.journal)
        self.tiers.start(self.loop.dispatch, always=self.journal is not None)
        self.gateway.ready(
            Served(loop=self.loop, model=self.info, words=self.words, memory=self.memory)
        )
        return self

    def close(self) -> None:
        """End the engine thread at its next layer boundary."""
        self.gateway.events.close()
        self.engine.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=30.0)
        self.tiers.close()
        if self.journal is not None:
            # where those that ran have come to
            self.loop.dispatch(Ticked(now=time.monotonic()))
            self.journal.close()

    def _take_up(self, journal: Journal) -> None:
        """Let the sessions of the server before this one come back, and record from now on."""
        found = journal.contents
        journal.start(
            lambda text: self.loop.dispatch(DurabilityChanged(text=text)), self.loop.taken_for
        )
        sessions = tuple((record, arrays) for record, arrays, *_ in found.sessions.values())
        self.loop.dispatch(
            JournalRead(
                number=found.number,
                sessions=sessions,
                damaged=found.doubtful,
                unreadable=found.unreadable,
                now=time.monotonic(),
            )
        )
        for _, error in self.state.unread.values():
            log.error("%s: %s", journal.path, error.message)
        count = len(sessions) + len(found.unreadable) - len(self.state.unread)
        if count:
            print(f"{count} sessions came back from {journal.path}", flush=True)

    def has_unfinished_sessions(self) -> bool:
        """Whether somebody may want to come back to a session."""
        sessions = list(self.state.sessions.values())
        # those that came back or rest, and that nobody has asked for, are safe on disk; records of
        # logpoints are not
        statuses = [s.status for s in sessions if not (s.branch or _is_on_disk(s))]
        return any(status in ("waiting", "running", "stopped") for status in statuses)

    def memory(self) -> tuple[Row, ...]:
        """Where the bytes are, as (kind, bytes, note)."""
        cache, info = self.ready.cache, self.info
        slots, absent = self.state.residency.slots, self.state.residency.num_absent
        used, page = slots["device"].used, cache.page_bytes
        clean = used - len(self.state.residency.dirty)
        weights = sum(p.nbytes for p in self.loaded.model.parameters())
        standing, kept = self.engine.nbytes()
        limits = self.state.limits
        device: list[Row] = [
            ("weights", weights, info.name + " · random weights" * info.random_weights),
            (
                "KV pages in use", used * page,
                f"{used} of {cache.num_pages} pages, {clean} with a copy below",
            ),
            (
                "KV pages free", (cache.num_pages - used) * page,
                f"{free_note(slots['device'])}, {page} bytes a page",
            ),
            ("activations", standing, self._standing_note()),
            (
                "kept stops", kept,
                f"of stops that sessions left; {limits.kept_bytes:,} bytes at most",
            ),
        ]  # fmt: skip
        logs = sum(s.breakpoints.log_bytes() for s in list(self.state.sessions.values()))
        transfers = self.gateway.transfers.bytes_open()
        host: list[Row] = [
            *self.tiers.host_rows(slots["host"], absent),
            ("logs", logs, "records of logpoints"),
            ("transfers", transfers, "tensors on their way to clients"),
        ]
        untouched = self.tiers.untouched_bytes()
        if self.ready.cache.device.type == "cuda":
            rows = [*device_rows(info.device, device), *host_rows(host, untouched)]
        else:
            pool = cache.pool
            untouched += untouched_bytes(pool.data_ptr(), pool.nbytes)
            rows = host_rows([*device, *host], untouched)
        return (*rows, *self.tiers.disk_rows(slots["disk"]), *self._journal_rows())

    def _standing_note(self) -> str:
        most = self.state.limits.tensor_bytes
        if most is None:
            return "held by stopped and running sessions"
        need = self.state.standing_bytes()
        return f"held by sessions, which may come to {need:,} of {most:,} bytes as they go on"

    def _journal_rows(self) -> list[Row]:
        if self.journal is None:
            return []
        return [("journal (disk)", self.journal.nbytes, self.journal.trouble or "in a file")]

    def _offer(self, owner: str, source: TensorSource) -> str:
        """Open a download for an owner."""
        return self.gateway.transfers.offer(owner, source)


def _is_on_disk(session: Session) -> bool:
    """Whether all of a session is in the journal."""
    return session.dormant and not session.breakpoints.log_bytes()


def _kept_bytes(config: ServerConfig) -> int:
    """What tensors of stops may take."""
    if config.kept_memory_bytes is not None:
        return config.kept_memory_bytes
    cap = config.device_memory_bytes
    return _KEPT_BYTES if cap is None else min(_KEPT_BYTES, cap // _KEPT_PART)


def _limits(quotas: Quotas, shape: ModelShape, owners: int) -> Limits:
    kv_bytes = quotas.kv_bytes
    if kv_bytes is None and owners > 1:
        kv_bytes = shape.num_pages * shape.page_bytes // 2
    return Limits(
        sessions_per_owner=quotas.sessions,
        kv_bytes_per_owner=kv_bytes,
        edit_bytes_per_owner=quotas.edit_bytes,
        capture_bytes_per_owner=quotas.capture_bytes,
        copies_from_ticks=True,
    )


def _describe(loaded: LoadedModel, ready: Ready, config: ServerConfig) -> ModelInfo:
    model, stock = ready.model, loaded.model
    vocab_size, hidden = stock.get_output_embeddings().weight.shape[0], model.config.hidden_size
    device = str(loaded.device)
    fingerprint = {
        "weights": loaded.weights_hash,
        "djinn": version.VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": _device_name(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prefill_chunk": ready.segments.prefill_chunk,
        "decode_bucket": config.decode_bucket,
        "page_tokens": ready.cache.shape.page_tokens,
        "attention": model.route.name,
        "mode": "exact",
    }
    if loaded.device.type == "cuda":
        # fixed by kernel_server.models: other workspaces may choose other kernels
        fingerprint["cublas_workspace"] = os.environ["CUBLAS_WORKSPACE_CONFIG"]
        fingerprint["cuda"] = torch.version.cuda
    return ModelInfo(
        name=loaded.name,
        architecture=type(stock).__name__,
        random_weights=loaded.random_weights,
        num_layers=model.num_layers,
        hidden_size=hidden,
        vocab_size=vocab_size,
        max_context=registry.max_context(stock),
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=device,
        num_parameters=sum(p.numel() for p in stock.parameters()),
        has_tokenizer=loaded.tokenizer is not None,
        eos_token_ids=registry.eos_token_ids(stock),
        fingerprint=fingerprint,
        config=registry.describe_config(stock),
        modules=registry.module_tree(stock),
        load_check=ready.report.as_dict(),
        sites=ready.sites,
        sites_off=_sites_off(model),
        max_prompt=ready.max_prompt,
    )


def _sites_off(model: ResumableModel) -> dict[str, str]:
    """Site -> why it is missing, in the first layer that misses it."""
    reasons: dict[str, str] = {}
    for layer in model.sites:
        for site, reason in layer.off.items():
            reasons.setdefault(site, reason)
    return reasons


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _shape(info: ModelInfo, ready: Ready) -> ModelShape:
    pages = ready.cache.shape
    return ModelShape(
        num_layers=info.num_layers,
        hidden_size=info.hidden_size,
        norm_size=ready.model.model.get_output_embeddings().weight.shape[1],
        vocab_size=info.vocab_size,
        layers_per_group=pages.group_layers,
        page_tokens=pages.page_tokens,
        num_pages=ready.cache.num_pages,
        page_bytes=pages.page_bytes,
        max_context=info.max_context,
        max_prompt=info.max_prompt,
        eos_token_ids=info.eos_token_ids,
        prefill_chunk=ready.segments.prefill_chunk,
        element_bytes=ready.model.dtype.itemsize,
        recorded_token_bytes=ready.model.token_bytes[0],
        embedded_token_bytes=ready.model.token_bytes[1],
        pair_bytes=ready.model.pair_bytes,
        kept_mask_bytes=KEPT_MASK_BYTES,
        sites=info.sites,
        sites_off=info.sites_off,
    )
