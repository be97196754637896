"""Where a server listens: loopback or a Unix socket in a folder of its own, and nowhere else."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from kernel_server.protocol.errors import AddressRefused, BadArgument, PortInUse

DEFAULT_PORT = 5556
CONNECT_S = 3.0
#: Longest path of a Unix socket, bytes: the kernel's field is this long with its final NUL.
MAX_PATH_BYTES = 103
#: A peer that vanished without a word is noticed after about 60 + 4 × 15 s.
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP host and port, or the path of a Unix socket; `str()` of it parses back."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    path: str | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str | Address) -> Address:
    """Read `host`, `host:port`, `:port`, `[v6]:port`, `unix:/path` or `/path`.

    Raises BadArgument for anything else.
    """
    if isinstance(text, Address):
        return text
    text = text.strip()
    if text.startswith(("unix:", "/")):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or "\0" in path:
            raise BadArgument(f"{text[:80]!r}: a Unix socket needs an absolute path, as unix:/path")
        return Address(host="", port=0, path=path)
    if text.isdigit():
        text = f":{text}"
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\s/\[\]]*))(?::(\d{1,5}))?", text)
    port = int(match[3]) if match and match[3] else DEFAULT_PORT
    if not match or port > 65535:
        raise _no_address(text)
    host = match[1] or match[2] or "127.0.0.1"
    try:
        host.encode("idna")  # what looking the name up begins with
    except UnicodeError:
        raise _no_address(text) from None
    return Address(host=host, port=port)


def _no_address(text: str) -> BadArgument:
    return BadArgument(f"{text[:80]!r} is no address; write host:port, :port or unix:/path")


def listen(address: Address, backlog: int = 128) -> tuple[socket.socket, Address]:
    """Bind and listen; answer the socket and the address with the port that was chosen for 0.

    Raises AddressRefused beyond loopback or for an open folder, PortInUse when taken.
    """
    if address.path is not None:
        return _listen_unix(address, backlog)
    family, where = _loopback(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere the option lets two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((where, address.port))
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {address.port} of {where} is taken; stop what listens there, "
                "or choose another with --port (0: any free one)"
            ) from error
        raise AddressRefused(f"cannot listen on {address}: {error.strerror}") from error
    return sock, Address(host=where, port=sock.getsockname()[1])


def dial(address: Address, timeout_s: float = CONNECT_S) -> socket.socket:
    """Open a socket to `address`, or raise the OSError that prevented it."""
    if address.path is None:
        sock = socket.create_connection((address.host, address.port), timeout_s)
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address.path)
        except OSError:
            sock.close()
            raise
    tune(sock)
    return sock


def tune(sock: socket.socket) -> None:
    """No Nagle (200 kB took 44 ms with it, 0.4 ms without), and notice peers that vanish."""
    if sock.family == getattr(socket, "AF_UNIX", None):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def remove_socket_file(address: Address) -> None:
    """Take away the file of a Unix socket that is no longer listened on."""
    if address.path is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address.path)


def _loopback(address: Address) -> tuple[socket.AddressFamily, str]:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise AddressRefused(f"cannot listen on {address}: {error.strerror}") from error
    if not all(ipaddress.ip_address(info[4][0]).is_loopback for info in found):
        raise AddressRefused(
            f"{address} is not loopback, and a server is not opened to a network: listen on "
            f"127.0.0.1 and reach it with `ssh -L {address.port}:localhost:{address.port} HOST`"
        )
    family, _, _, _, where = min(found, key=lambda info: info[0] != socket.AF_INET)
    return family, str(where[0])


def _listen_unix(address: Address, backlog: int) -> tuple[socket.socket, Address]:
    assert address.path is not None
    path = Path(address.path)
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise AddressRefused(
            f"the path {path} has {len(os.fsencode(path))} bytes, a Unix socket takes "
            f"{MAX_PATH_BYTES}; choose a shorter one"
        )
    _require_private_folder(path.parent)
    _clear_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        os.chmod(path, 0o600)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"another server listens on {address}; stop it first") from error
        raise AddressRefused(f"cannot listen on {address}: {error.strerror}") from error
    return sock, address


def _require_private_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise AddressRefused(f"cannot use the folder {folder}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise AddressRefused(
            f"{folder} is open to others (mode {stat.S_IMODE(found.st_mode):04o}); a socket needs "
            f"a folder of your own: `chmod 700 {folder}`, or name another"
        )


def _clear_stale(path: Path) -> None:
    """Remove the socket file of a server that is gone; refuse when one answers."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise AddressRefused(f"{path} exists and is no socket; name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError as error:
            raise PortInUse(f"cannot tell who listens on {path}: {error.strerror}") from error
        else:
            raise PortInUse(f"another server listens on unix:{path}; stop it first")
