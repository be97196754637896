"""What a user's installation looks like, one line per finding, with the next move.

Each check answers findings and raises nothing: a check that cannot be made is a finding too. So
what may be missing is imported by the check that needs it.
Whether a finding is a problem is decided here; how it is printed, by the command line.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import AccessDenied, BadArgument, DjinnError, NoServer

Verdict = Literal["ok", "warning", "problem"]
GIB = 2**30

#: Less of this left than that is worth a word, bytes.
LITTLE_MEMORY, LITTLE_DISK = 2 * GIB, GIB
#: What nothing here works without, where no metadata of the package says it.
NEEDED = ("numpy", "pandas", "platformdirs", "rpyc")
#: A server with its caps reached needs about as many open files.
OPEN_FILES = 512


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: how it is, and what to do if it should be otherwise."""

    about: str
    verdict: Verdict
    text: str
    then: str = ""

    def line(self) -> str:
        """As a person reads it."""
        return f"{self.verdict:<8} {self.about:<10} {self.text}" + (
            f": {self.then}" if self.then else ""
        )

    def as_dict(self) -> dict[str, str]:
        """As a program reads it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is looked for; `named`: the user named it, so one has to be there."""

    host: str
    port: int
    socket: Path | None
    named: bool


def examine(place: Place) -> list[Finding]:
    """Everything, in the order a person would look."""
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "python": _python,
        "packages": _packages,
        "device": _device,
        "memory": _memory,
        "threads": _threads,
        "files": _open_files,
        "disk": _disk,
        "token": _tokens,
        "server": lambda: _server(place),
        "lab": _lab,
    }
    found: list[Finding] = []
    for about, check in checks.items():
        try:
            found += check()
        except Exception as error:  # the doctor must not fall ill
            text = f"could not be looked at: {type(error).__name__}: {error}"
            found.append(Finding(about, "warning", text))
    return found


def _python() -> Iterable[Finding]:
    version = platform.python_version()
    yield Finding("python", "ok", f"{version} on {platform.system()} {platform.machine()}")


def _packages() -> Iterable[Finding]:
    """Installed versions against the ranges of the package's own metadata."""
    wanted = _requirements()
    if wanted is None:
        yield Finding(
            "packages", "warning", "djinn-nb is not installed here, only on the path",
            "pip install -e '.[server]' in the checkout",
        )  # fmt: skip
        lost = [name for name in NEEDED if not _is_here(name)]
        if lost:
            yield Finding("packages", "problem", f"missing: {', '.join(lost)}", "install djinn-nb")
        return
    shown, missing = [], []
    for name, (extra, allows) in wanted.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append((name, extra))
            continue
        if not allows(version):
            what = f"djinn-nb{f'[{extra}]' if extra else ''}"
            yield Finding(
                "packages", "problem", f"{name} {version} is outside the range of {what}",
                f"pip install -U '{what}'",
            )  # fmt: skip
        elif name in ("torch", "transformers", "rpyc", "numpy"):
            shown.append(f"{name} {version}")
    ours = importlib.metadata.version("djinn-nb")
    yield Finding("packages", "ok", ", ".join([f"djinn-nb {ours}", *shown]))
    client = [name for name, extra in missing if not extra]
    if client:
        yield Finding(
            "packages", "problem", f"missing: {', '.join(client)}", "pip install djinn-nb"
        )
    server = [name for name, extra in missing if extra == "server"]
    if server:
        yield Finding(
            "packages", "warning", f"the client alone is installed, without {', '.join(server)}",
            "to serve a model from here, pip install 'djinn-nb[server]'",
        )  # fmt: skip


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # barred by whoever runs this interpreter
        return False


def _requirements() -> dict[str, tuple[str, Callable[[str], bool]]] | None:
    """Of the client and of the server: name → (extra, whether a version will do)."""
    try:
        lines = importlib.metadata.requires("djinn-nb") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    from packaging.requirements import Requirement

    found: dict[str, tuple[str, Callable[[str], bool]]] = {}
    for line in lines:
        one = Requirement(line)
        for extra in ("", "server"):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                specifier = one.specifier
                found.setdefault(
                    one.name,
                    (extra, lambda v, s=specifier: s.contains(v, prereleases=True)),  # type: ignore[misc]
                )
                break
    return found


def _device() -> Iterable[Finding]:
    driver = _nvidia_driver()
    if importlib.util.find_spec("torch") is None:
        yield Finding("device", "ok", "not looked at: no torch here")
        return
    import torch

    if not torch.cuda.is_available():
        if driver is None:
            yield Finding("device", "ok", f"no GPU, models run on the CPU ({_cpu()})")
        else:
            yield Finding(
                "device", "warning",
                f"the driver {driver} is here, but torch {torch.__version__} finds no CUDA device",
                "install a CUDA build of torch: make setup TORCH_FLAGS='--index-url …'",
            )  # fmt: skip
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            "device", "ok" if free > total / 4 else "warning",
            f"cuda:{index} {torch.cuda.get_device_name(index)}, {free / GIB:.1f} of"
            f" {total / GIB:.1f} GiB free, CUDA {torch.version.cuda}, driver {driver or 'unknown'}",
            "" if free > total / 4 else "others use it: choose another with --gpu",
        )  # fmt: skip


def _cpu() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}"


def _nvidia_driver() -> str | None:
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _memory() -> Iterable[Finding]:
    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available on the host"
    if memory.available < LITTLE_MEMORY:
        yield Finding("memory", "warning", text, "end other programs, or give less --kv-memory")
    else:
        yield Finding("memory", "ok", text)


def _threads() -> Iterable[Finding]:
    cores = len(os.sched_getaffinity(0))
    text = f"a server computes with 1 thread unless --threads says otherwise, {cores} cores here"
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > cores:
        yield Finding(
            "threads", "warning", f"{text}; OMP_NUM_THREADS is {asked}",
            f"set it to at most {cores}",
        )  # fmt: skip
    else:
        yield Finding("threads", "ok", text)


def _open_files() -> Iterable[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        yield Finding(
            "files", "warning", f"at most {soft} open files",
            f"ulimit -n {OPEN_FILES} before a server that many connect to",
        )  # fmt: skip
    else:
        yield Finding("files", "ok", f"at most {soft} open files")


def _disk() -> Iterable[Finding]:
    from kernel_server.wire.tokens import token_file

    folder = token_file().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < LITTLE_DISK:
        yield Finding(
            "disk", "warning", f"{free / GIB:.2f} GiB free where tokens and records are kept",
            "make room, or set XDG_DATA_HOME",
        )  # fmt: skip
    else:
        yield Finding("disk", "ok", f"{free / GIB:.1f} GiB free where tokens and records are kept")


def _tokens() -> Iterable[Finding]:
    from kernel_server.wire.tokens import TOKEN_VARIABLE, read_tokens, token_file

    path = token_file()
    if os.environ.get(TOKEN_VARIABLE):
        yield Finding("token", "ok", f"{TOKEN_VARIABLE} is set: clients here use it, not the file")
    try:
        tokens = read_tokens(path)
    except FileNotFoundError:
        yield Finding("token", "ok", f"no token file yet: the first server makes {path}")
        return
    except OSError as error:
        yield Finding(
            "token", "problem", f"{path} cannot be read ({error.strerror})",
            "take it back, or set XDG_DATA_HOME to a folder of your own",
        )  # fmt: skip
        return
    except BadArgument as error:
        yield Finding("token", "problem", error.message)
        return
    folder = stat.S_IMODE(path.parent.stat().st_mode)
    if folder & 0o022:
        yield Finding(
            "token", "problem", f"others may write in {path.parent} (mode {folder:04o})",
            f"chmod 700 {path.parent}",
        )  # fmt: skip
        return
    owners = f"{len(tokens)} owner{'s' * (len(tokens) != 1)}"
    yield Finding("token", "ok", f"{path} is private and holds {owners}")


def _server(place: Place) -> Iterable[Finding]:
    from kernel_server.asking import Asking
    from kernel_server.wire.tokens import TOKEN_VARIABLE, token_file

    try:
        with Asking.at(place.host, place.port, place.socket) as ask:
            hello: m.Initialized = ask.ask(m.Initialize(client="doctor"))
            yield _greeted(hello, str(ask.address))
    except (NoServer, AccessDenied) as error:
        no_token = not token_file().exists() and not os.environ.get(TOKEN_VARIABLE)
        if place.named:
            yield Finding("server", "problem", error.message)
        elif isinstance(error, NoServer) or no_token:
            yield Finding(
                "server", "ok",
                f"none at {place.host}:{place.port}; a client without an address starts its own",
            )  # fmt: skip
        else:
            yield Finding("server", "warning", error.message)
    except DjinnError as error:  # another build, too many connections
        yield Finding("server", "problem", error.message)


def _greeted(hello: m.Initialized, address: str) -> Finding:
    text = f"{hello.server_id} at {address}, djinn-nb {hello.version}, speaks our contract"
    if hello.phase == "failed":
        reason = hello.error.message if hello.error else "see its log"
        return Finding("server", "problem", f"{text}; its model did not load ({reason})")
    if hello.phase == "loading":
        return Finding("server", "ok", f"{text}; its model is loading, {hello.fraction:.0%}")
    return Finding("server", "ok", text)


def _lab() -> Iterable[Finding]:
    names = ("jupyterlab", "ipykernel", "anywidget")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding(
            "lab", "warning", f"not installed: {', '.join(missing)}", "pip install 'djinn-nb[lab]'"
        )
    else:
        yield Finding("lab", "ok", f"jupyterlab {importlib.metadata.version('jupyterlab')}")


def report(found: list[Finding]) -> dict[str, Any]:
    """The findings as JSON; `verdict` is the worst of them."""
    order: tuple[Verdict, ...] = ("ok", "warning", "problem")
    worst = max((order.index(one.verdict) for one in found), default=0)
    return {"verdict": order[worst], "findings": [one.as_dict() for one in found]}
