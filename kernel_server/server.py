"""The server process: sockets first, then the model, then whoever connects. Only wiring.

It listens before the model is loaded, so that a client can watch the loading; requests that need
the model get `ModelLoading` until then. It ends on SIGTERM or SIGINT, or, when it was started to
linger, once nobody needs it any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import kernel_server.version as version
from kernel_server.config import SWITCH_INTERVAL_S, ServerConfig
from kernel_server.event_log import EventLog
from kernel_server.gateway import Gateway
from kernel_server.journal import Journal
from kernel_server.pacing import Pacer
from kernel_server.protocol.errors import BadArgument, DjinnError, JournalInUse, ServerFault
from kernel_server.service import Limits, Service
from kernel_server.vectors import Vectors
from kernel_server.wire import Address, load_or_create_tokens, token_file

if TYPE_CHECKING:
    from kernel_server.kernel import Kernel

log = logging.getLogger(__name__)

#: How often the main thread looks whether it is time to end, seconds.
WATCH_S = 0.25
#: A server that could not load its model stays this long, so that a client can ask why, and while
#: clients are there at most so long, seconds.
FAILED_S, FAILED_MOST_S = 5.0, 60.0


def serve(config: ServerConfig) -> int:
    """Serve until told to end; returns the exit status."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    server = Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    try:
        return server.run()
    finally:
        server.close()


class Server:
    """A kernel behind a service, in this process.

    Raises PortInUse or AddressRefused at once; a model that does not load is told to the clients.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.events = EventLog()
        quotas, pacer, tokens = config.quotas, Pacer(), load_or_create_tokens()
        self.gateway = Gateway(
            secrets.token_hex(4),
            version.VERSION,
            self.events,
            debug=config.debug,
            jobs=quotas.jobs,
            transfer_bytes=quotas.transfer_bytes,
            vectors=Vectors(max_count=quotas.vectors, max_bytes=quotas.vector_bytes),
            pacer=pacer,
        )
        self.journal: Journal | None = None
        if config.socket is not None:
            address = Address(path=str(config.socket))
        else:
            address = Address(host=config.host, port=config.port or 0)
        self.service = Service(
            self.gateway.handle,
            tokens,
            address,
            on_connect=self._seen,
            on_disconnect=self._seen,
            limits=Limits(
                connections=max(Limits().connections, 2 * quotas.connections),
                connections_per_owner=quotas.connections,
            ),
            pacer=pacer,
        )
        try:
            self.journal = open_journal(config) if config.journal and os.name == "posix" else None
        except BaseException:
            self.service.close()
            raise
        self.gateway.keep(self.journal)
        # only now: whoever connects is told which sessions this server goes on with
        self.service.start()
        self._owners = len(tokens)
        self.address = self.service.address
        self._stopping = threading.Event()
        self._last_seen = time.monotonic()
        self._exit_status = 0
        self.kernel: Kernel | None = None

    def run(self) -> int:
        """Load the model and serve it until `stop`."""
        self._write_runtime_file()
        print(f"djinn server {self.gateway.server_id} listens on {self.address}", flush=True)
        print(f"access tokens are in {token_file()}", flush=True)
        loader = threading.Thread(target=self._load, name="loader", daemon=True)
        loader.start()
        while not self._stopping.wait(WATCH_S):
            if self._may_end():
                log.info("no client and no unfinished session for %s s: ending", self._linger())
                break
        return self._exit_status

    def stop(self) -> None:
        """Let `run` return; may be called from a signal handler or another thread."""
        self._stopping.set()

    def close(self) -> None:
        """End the service and the engine, and take the runtime file away."""
        self.events.close()
        self.service.close()
        if self.kernel is not None:
            self.kernel.close()
        elif self.journal is not None:
            self.journal.close()
        self._remove_runtime_file()

    # -- loading --------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            # late: torch takes seconds to import, and clients can connect meanwhile
            from kernel_server.kernel import Kernel, load

            shown = _Shown(self.gateway)
            loaded = load(self.config, shown)
            self.kernel = Kernel(
                loaded, self.config, self.gateway, shown, self._owners, self.journal
            )
            self.kernel.start()
            model = self.kernel.info
            random = " · random weights" if model.random_weights else ""
            print(
                f"ready: {model.name}{random}, {model.num_layers} layers,"
                f" {model.dtype} on {model.device}",
                flush=True,
            )
        except DjinnError as error:
            self._failed(error)
        except Exception as error:
            log.exception("loading failed")
            self._failed(ServerFault(f"loading the model failed: {type(error).__name__}: {error}"))

    def _failed(self, error: DjinnError) -> None:
        print(f"{error.code}: {error}", flush=True)
        self._exit_status = 2
        self.gateway.failed(error)
        # long enough for a client that is watching to read why, and to go
        deadline = time.monotonic() + FAILED_MOST_S
        self._stopping.wait(FAILED_S)
        while self.service.connections() and time.monotonic() < deadline:
            if self._stopping.wait(WATCH_S):
                break
        self.stop()

    # -- when to end ----------------------------------------------------------------------------

    def _seen(self, owner: str, connection_id: str) -> None:
        self._last_seen = time.monotonic()

    def _linger(self) -> float | None:
        return self.config.linger_s

    def _may_end(self) -> bool:
        linger_s = self._linger()
        if linger_s is None or self.service.connections():
            return False
        if self.kernel is None:
            return time.monotonic() - self._last_seen > max(linger_s, 60.0)
        if self.kernel.has_unfinished_sessions():
            return False
        return time.monotonic() - self._last_seen > linger_s

    # -- the runtime file -----------------------------------------------------------------------

    def _write_runtime_file(self) -> None:
        path = self.config.runtime_file
        if path is None:
            return
        content = {
            "address": str(self.address),
            "pid": os.getpid(),
            "server_id": self.gateway.server_id,
        }
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(content))
            draft.chmod(0o600)
            draft.replace(path)
        except OSError as error:  # nobody would find this server
            raise BadArgument(
                f"the runtime file {path} cannot be written ({error.strerror or error}): make room,"
                " or set XDG_RUNTIME_DIR to a folder of your own that can be written"
            ) from error

    def _remove_runtime_file(self) -> None:
        path = self.config.runtime_file
        if path is None:
            return
        try:
            if json.loads(path.read_text())["server_id"] == self.gateway.server_id:
                path.unlink()
        except (OSError, ValueError, KeyError):
            log.debug("runtime file %s is gone or not ours", path)


def open_journal(config: ServerConfig) -> Journal:
    """The journal this server is to go on with.

    A folder that was named is waited for and never shared. Without a name it is one by address and
    model; one of several servers there that have no address of their own takes the next that is
    free. Raises JournalInUse, BrokenJournal.
    """
    if config.state_dir is not None:
        return Journal(config.state_dir)
    import platformdirs

    folders = platformdirs.user_state_path("djinn", appauthor=False) / "journals"
    wanted, where = config.model, config.journal_key
    if where is None:
        where = str(config.socket or f"{config.host}:{config.port or 'any'}")
    model = wanted.model
    if model is not None and Path(model).exists():
        model = str(Path(model).resolve())
    named = json.dumps([where, model, wanted.geometry, wanted.seed])
    key = hashlib.sha256(named.encode()).hexdigest()[:16]
    shared = config.journal_key is not None or (config.socket is None and not config.port)
    if not shared:
        return Journal(folders / key)
    for number in range(1, 65):
        with contextlib.suppress(JournalInUse):
            return Journal(folders / (key if number == 1 else f"{key}-{number}"), wait_s=0.0)
    raise JournalInUse(f"64 servers write journals in {folders} already: name one by --state-dir")


class _Shown:
    """Loading progress for the clients and, in a terminal, for whoever started the server."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._last = ""

    def __call__(self, text: str, fraction: float) -> None:
        self._gateway.loading(text, fraction)
        if text != self._last:
            self._last = text
            print(f"loading: {text}", flush=True)


def runtime_address(path: Path) -> str:
    """The address in a runtime file."""
    return str(json.loads(path.read_text())["address"])
