"""The embedded server: a process of its own on this machine, found again or started.

One server per (model, device, dtype, options): a runtime file named by the hash of these says where
it listens. Here it is decided whether one runs and how to start it; what it does, and when it ends,
is the server's business. It outlives this process, so a restarted notebook finds its sessions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import platformdirs

import kernel_server
from djinn_nb.checks import shown
from djinn_nb.progress import Progress
from kernel_server.protocol.errors import (
    AddressRefused,
    BadArgument,
    ConnectionFailed,
    DjinnError,
    NoServer,
)

#: Without clients and unfinished sessions it stays this long, seconds; one for a model that was
#: named goes soon (it must live until its first client has come).
LINGER_S, LINGER_NAMED_S = 1800.0, 3.0
#: It must listen within this, seconds: importing torch from a cold disk is slow.
START_S = 180.0
#: Longest path of a Unix socket everywhere, bytes.
SOCKET_PATH_BYTES = 100
#: What to do when it is there no more: its sessions are in its journal.
RESTART = "connect() as before starts it again"
#: Lines of its log shown when it dies at the start.
LOG_LINES = 12

#: dtypes a model can be served in
DTYPES = ("float32", "bfloat16", "float16")
#: option of connect() -> flag of the server, and the type of its value
OPTIONS: dict[str, tuple[str, type]] = {
    "check": ("--check", bool),
    "debug": ("--debug", bool),
    "device_memory": ("--device-memory", str),
    "disk_memory": ("--disk-memory", str),
    "disk_path": ("--disk-path", str),
    "decode_bucket": ("--decode-bucket", int),
    "geometry": ("--geometry", str),
    "gpu": ("--gpu", int),
    "host_memory": ("--host-memory", str),
    "idle_after": ("--idle-after", float),
    "kept_memory": ("--kept-memory", str),
    "kv_memory": ("--kv-memory", str),
    "lease": ("--lease", str),
    "linger_s": ("--linger-s", float),
    "prefill_chunk": ("--prefill-chunk", int),
    "seed": ("--seed", int),
    "state_dir": ("--state-dir", str),
    "threads": ("--threads", int),
    "trust_remote_code": ("--trust-remote-code", bool),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which server is wanted: what decides whether one that runs is the right one."""

    model: str | None
    device: str | None
    dtype: str | None
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(
        cls, model: str | None, device: str | None, dtype: str | None, options: dict[str, Any]
    ) -> Wanted:
        """Check the form of the arguments; raises BadArgument, listing what is known."""
        if model is not None and not isinstance(model, (str, os.PathLike)):
            raise BadArgument(f"model is a folder or hub id, not {shown(model)}")
        if device is not None and not (isinstance(device, str) and device and device.isprintable()):
            raise BadArgument(f"device is a text such as 'cpu' or 'cuda:0', not {shown(device)}")
        checked = {name: _option(name, value) for name, value in options.items()}
        return cls(
            model=None if model is None else _model_name(os.fspath(model)),
            device=device,
            dtype=None if dtype is None else _dtype_name(dtype),
            options=tuple(sorted((k, v) for k, v in checked.items() if v is not None)),
        )

    @property
    def key(self) -> str:
        """Names the server's files: the same wishes, the same server, if it is of this build."""
        from kernel_server.protocol.messages import contract_digest

        wishes = [self.model, self.device, self.dtype, self.options, contract_digest()]
        return hashlib.sha256(json.dumps(wishes).encode()).hexdigest()[:16]

    @property
    def journal_key(self) -> str:
        """Names the journal, which a server of a later build goes on with."""
        wishes = [self.model, self.device, self.dtype, self.options]
        return "embedded-" + hashlib.sha256(json.dumps(wishes).encode()).hexdigest()[:16]

    def flags(self) -> list[str]:
        """The wishes as arguments of `kernel_server serve`."""
        flags = []
        for name in ("model", "device", "dtype"):
            if (value := getattr(self, name)) is not None:
                flags += [f"--{name}", value]
        chosen = dict(self.options)
        named = self.model is not None or "geometry" in chosen
        chosen.setdefault("linger_s", LINGER_NAMED_S if named else LINGER_S)
        for name, value in chosen.items():
            flag, kind = OPTIONS[name]
            if kind is not bool:
                flags += [flag, str(value)]
            elif value:
                flags.append(flag)
        return flags


def _option(name: str, value: Any) -> Any:
    if name not in OPTIONS:
        raise BadArgument(f"connect() has no option {name!r}; known: {', '.join(OPTIONS)}")
    kind = OPTIONS[name][1]
    if value is None:
        return None
    if name in ("disk_path", "state_dir") and isinstance(value, (str, os.PathLike)):
        value = str(Path(value).expanduser().absolute())
    if name.endswith("_memory") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    fits = (int, float) if kind is float else kind
    if not isinstance(value, fits) or (isinstance(value, bool) and kind is not bool):
        raise BadArgument(f"{name} is a {kind.__name__}, not {shown(value)}")
    if isinstance(value, str) and not value.isprintable():
        raise BadArgument(f"{name} has characters that cannot be printed: {shown(value)}")
    return kind(value)


def _model_name(name: str) -> str:
    """A folder by its one true path, so that the same model is the same server; ids as they are."""
    if not name or not name.isprintable():
        raise BadArgument(f"model is a folder or hub id, not {shown(name)}")
    try:
        folder = Path(name).expanduser()
        return str(folder.resolve()) if folder.exists() else name
    except (OSError, RuntimeError) as error:  # too long, or a home that nobody has
        reason = getattr(error, "strerror", None) or str(error)
        raise BadArgument(f"model {shown(name)} is no folder or hub id: {reason}") from None


def _dtype_name(dtype: object) -> str:
    """`float32`, also from `torch.float32` or `np.float32`."""
    text = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    name = str(text).removeprefix("torch.")
    if name not in DTYPES:
        raise BadArgument(f"dtype is {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {shown(dtype)}")
    return name


@dataclass(frozen=True, slots=True)
class Running:
    """A server that listens, as its runtime file describes it."""

    address: str
    pid: int
    server_id: str


def find_or_start(wanted: Wanted) -> str:
    """The address of the server wanted, starting one when none runs.

    Raises NoServer when it cannot be started, with the end of its log.
    """
    try:
        folder = runtime_folder()
        file = folder / f"{wanted.key}.json"
        with _locked(folder / f"{wanted.key}.lock"):
            running = read_runtime_file(file)
            if running is not None and _answers(running):
                return running.address
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
            return _start(wanted, folder, file)
    except OSError as error:  # a full disk, a folder that cannot be written, no more processes
        if isinstance(error, DjinnError):
            raise
        where = f" {error.filename}" if error.filename else ""
        raise NoServer(
            f"no embedded server can be started here:{where} {error.strerror or error}; make room"
            " or set XDG_RUNTIME_DIR and XDG_STATE_HOME to folders of your own that can be written"
        ) from error


def runtime_folder() -> Path:
    """Where runtime files and sockets are: a folder of the user's own, mode 0700."""
    with warnings.catch_warnings():
        # without XDG_RUNTIME_DIR platformdirs names a folder in /tmp; its owner is checked below
        warnings.simplefilter("ignore")
        folder = platformdirs.user_runtime_path("djinn", appauthor=False)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if os.name == "posix" and (found.st_uid != os.getuid() or found.st_mode & 0o077):
        raise AddressRefused(
            f"{folder} is open to others (mode {found.st_mode & 0o777:04o}):"
            f" `chmod 700 {folder}`, or set XDG_RUNTIME_DIR to a folder of your own"
        )
    return folder


def log_file(wanted: Wanted) -> Path:
    """What the server writes to its stderr."""
    folder = platformdirs.user_state_path("djinn", appauthor=False)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / f"embedded-{wanted.key}.log"


def read_runtime_file(file: Path) -> Running | None:
    """What a runtime file says; None when there is none or it is not whole."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return Running(str(data["address"]), int(data["pid"]), str(data["server_id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answers(running: Running) -> bool:
    """Whether that very server answers, and has not failed to load its model."""
    from djinn_nb.transport import Transport
    from kernel_server.protocol import codec
    from kernel_server.protocol import messages as m
    from kernel_server.wire import find_token

    payload = codec.encode(m.Initialize(client="djinn_nb"))
    try:
        with Transport(running.address, find_token(), patience_s=0.5) as transport:
            reply = codec.decode(transport.request(payload, timeout=10.0))
    except ConnectionFailed:
        return False
    return (
        isinstance(reply, m.Initialized)
        and reply.server_id == running.server_id
        and reply.phase != "failed"
    )


def _start(wanted: Wanted, folder: Path, file: Path) -> str:
    _require_server_parts()
    # a fresh name: a server that is just ending may still hold the old socket
    socket = folder / f"{wanted.key}-{secrets.token_hex(3)}.sock"
    if os.name == "posix" and len(os.fsencode(socket)) <= SOCKET_PATH_BYTES:
        where = ["--socket", str(socket)]
    else:
        where = ["--host", "127.0.0.1", "--port", "0"]
    command = [
        sys.executable, "-m", "kernel_server", "serve", *where,
        "--runtime-file", str(file), "--journal-key", wanted.journal_key, *wanted.flags(),
    ]  # fmt: skip
    log = log_file(wanted)
    starting = _Starting(command, folder, log)
    try:
        return _wait_until_it_listens(starting.begun(), file, log)
    except BaseException:
        starting.give_up()  # interrupted: nobody would find it, or it would hide the next one
        raise


class _Starting:
    """A process that is begun on a thread of its own, which also reaps it.

    An interrupt reaches the main thread alone. One that came while that began a process would leave
    it behind, with nobody who knows of it.
    """

    def __init__(self, command: list[str], folder: Path, log: Path) -> None:
        self._command, self._folder, self._log = command, folder, log
        self._process: subprocess.Popen[bytes] | None = None
        self._given_up = False
        self._begun: SimpleQueue[OSError | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="djinn-embedded", daemon=True)

    def begun(self) -> subprocess.Popen[bytes]:
        """The process; raises the OSError of one that could not be begun."""
        self._thread.start()
        error = self._begun.get()
        if error is not None:
            raise error
        assert self._process is not None
        return self._process

    def give_up(self) -> None:
        """End the process, also if it is only about to begin."""
        self._given_up = True  # first: whoever of the two looks later sees what the other did
        if self._process is not None:
            self._process.terminate()

    def _run(self) -> None:
        try:
            with self._log.open("wb") as output:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # an interrupt in the notebook is not for it
                    cwd=self._folder,
                    env=_environment(),
                )
        except OSError as error:
            self._begun.put(error)
            return
        if self._given_up:
            self._process.terminate()
        self._begun.put(None)
        self._process.wait()


def _wait_until_it_listens(process: subprocess.Popen[bytes], file: Path, log: Path) -> str:
    """The address it has written into its runtime file."""
    began = time.monotonic()
    with Progress("starting the embedded server", unit="%") as progress:
        while (running := read_runtime_file(file)) is None:
            waited_s = time.monotonic() - began
            if process.poll() is not None:
                raise _died(process.returncode, log)
            if waited_s > START_S:
                raise NoServer(
                    f"the embedded server did not listen within {START_S:.0f} s; its log: {log}"
                )
            progress.at(min(waited_s / 20, 0.9) * 100, 100)
            time.sleep(0.02)
    return running.address


def _require_server_parts() -> None:
    """The client installs without torch; then there is no server to start here."""
    missing = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
    if missing:
        raise NoServer(
            f"no server to start here, {' and '.join(missing)} is not installed:"
            " pip install 'djinn-nb[server]', or connect('host:port') to one elsewhere"
        )


def _environment() -> dict[str, str]:
    """Ours, and a way to the package when it is used without being installed."""
    environment = dict(os.environ)
    home = str(Path(kernel_server.__file__).resolve().parent.parent)
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        paths = [home, *environment.get("PYTHONPATH", "").split(os.pathsep)]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    # both belong to the notebook kernel that starts it
    environment.pop("MPLBACKEND", None)
    environment.pop("JPY_PARENT_PID", None)
    return environment


def _died(status: int, log: Path) -> DjinnError:
    """Why it ended, from the last lines it wrote."""
    lines = [line for line in _tail(log) if line.strip()]
    from kernel_server.protocol.errors import ERRORS

    for line in reversed(lines):
        code, separator, message = line.partition(": ")
        if separator and code in ERRORS:
            return ERRORS[code](message)  # it said so itself, in one line
    last = lines[-1].strip() if lines else "it wrote nothing"
    error = NoServer(
        f"the embedded server ended at its start (exit status {status}): {last}; its log: {log}"
    )
    error.server_traceback = "\n".join(lines)
    return error


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One connect() at a time looks and starts; the lock goes with the process that holds it."""
    if os.name != "posix":  # two starts at once end in two servers, each usable
        yield
        return
    import fcntl

    with file.open("w") as handle:
        with Progress("waiting for another connect()", unit="%") as progress:
            began = time.monotonic()
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    progress.at(0, 100)
                    if time.monotonic() - began > START_S + 30:
                        raise NoServer(
                            f"another process holds {file} and starts no server; end it"
                        ) from None
                    time.sleep(0.05)
        yield
