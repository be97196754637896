"""Tensors on their way to or from a client, in chunks. Holds sources and parts, decides nothing.

A download keeps a source that is read piece by piece as the client asks, so nothing large is copied
to the host at once; an upload keeps the pieces that came. Both belong to one owner and are bounded.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from kernel_server.protocol.arrays import ITEM_BYTES, Array
from kernel_server.protocol.errors import BadArgument, QuotaExceeded, UnknownTransfer

#: Largest piece of one reply, bytes.
MAX_CHUNK = 1 << 20
#: Bytes one owner may have in transfers at a time.
OWNER_BYTES = 4 << 30
#: Transfers one owner may have open at a time.
OWNER_TRANSFERS = 64
#: A transfer nobody asks for is dropped after this long, seconds.
IDLE_S = 300.0


class Source(Protocol):
    """A tensor that can be read piecewise."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def read(self, offset: int, length: int) -> bytes | memoryview: ...


class ArraySource:
    """An array that is in memory, read piece by piece."""

    def __init__(self, array: Array) -> None:
        self.dtype, self.shape, self.nbytes = array.dtype, array.shape, array.nbytes
        self._data = memoryview(array.data)

    def read(self, offset: int, length: int) -> memoryview:
        """Bytes `offset` to `offset + length`."""
        return self._data[offset : offset + length]


@dataclass
class _Download:
    owner: str
    source: Source
    nbytes: int
    used: float = field(default_factory=time.monotonic)


@dataclass
class _Upload:
    owner: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    received: int = 0
    parts: list[bytes] = field(default_factory=list)
    used: float = field(default_factory=time.monotonic)


_T = TypeVar("_T", _Download, _Upload)


class Transfers:
    """The open transfers of all owners.

    owner_bytes: what one owner may have in them at a time, held or announced.
    """

    def __init__(self, owner_bytes: int = OWNER_BYTES) -> None:
        self._owner_bytes = owner_bytes
        self._open: dict[str, _Download | _Upload] = {}
        self._lock = threading.Lock()

    def offer(self, owner: str, source: Source) -> str:
        """Open a download and return its id."""
        return self._add(owner, _Download(owner, source, source.nbytes))

    def read(self, owner: str, transfer_id: str, offset: int, length: int) -> bytes | memoryview:
        """A piece of a download, as often as it is asked for until it is cancelled."""
        download = self._get(owner, transfer_id, _Download)
        size = download.source.nbytes
        if not 0 <= offset <= size or not length > 0:
            raise BadArgument(f"offset {offset} lies outside the {size} bytes of this transfer")
        length = min(length, MAX_CHUNK, size - offset)
        return download.source.read(offset, length)

    def begin(self, owner: str, dtype: str, shape: tuple[int, ...]) -> str:
        """Open an upload and return its id; memory is taken as the pieces come."""
        if dtype not in ITEM_BYTES or len(shape) > 8 or any(n < 0 for n in shape):
            raise BadArgument(f"cannot receive a {dtype} tensor of shape {list(shape)}")
        nbytes = ITEM_BYTES[dtype]
        for n in shape:
            nbytes *= n
        return self._add(owner, _Upload(owner, dtype, shape, nbytes))

    def write(self, owner: str, transfer_id: str, offset: int, data: bytes | memoryview) -> int:
        """Add the next piece; a piece already received is ignored. Returns bytes received."""
        upload = self._get(owner, transfer_id, _Upload)
        with self._lock:
            if offset < upload.received:
                return upload.received  # sent again after a reconnect
            if offset != upload.received or offset + len(data) > upload.nbytes:
                raise BadArgument(
                    f"piece at {offset} of {len(data)} bytes does not follow the"
                    f" {upload.received} of {upload.nbytes} bytes received"
                )
            upload.parts.append(bytes(data))
            upload.received += len(data)
            return upload.received

    def take(self, owner: str, transfer_id: str) -> Array:
        """The uploaded tensor, whole; the transfer is closed."""
        upload = self._get(owner, transfer_id, _Upload)
        if upload.received != upload.nbytes:
            raise BadArgument(
                f"only {upload.received} of {upload.nbytes} bytes of this upload have come"
            )
        self.cancel(owner, transfer_id)
        return Array(upload.dtype, upload.shape, b"".join(upload.parts))

    def cancel(self, owner: str, transfer_id: str) -> None:
        """Close a transfer; closing one that is gone does nothing."""
        with self._lock:
            found = self._open.get(transfer_id)
            if found is not None and found.owner == owner:
                del self._open[transfer_id]

    def bytes_open(self) -> int:
        """Bytes held or announced by all open transfers."""
        with self._lock:
            return sum(t.nbytes for t in self._open.values())

    def _add(self, owner: str, transfer: _Download | _Upload) -> str:
        with self._lock:
            now = time.monotonic()
            for key in [k for k, t in self._open.items() if now - t.used > IDLE_S]:
                del self._open[key]
            mine = [t for t in self._open.values() if t.owner == owner]
            total = sum(t.nbytes for t in mine) + transfer.nbytes
            if total > self._owner_bytes or len(mine) >= OWNER_TRANSFERS:
                raise QuotaExceeded(
                    f"{len(mine) + 1} transfers of {total} bytes would be open; one owner may have"
                    f" {OWNER_TRANSFERS} of {self._owner_bytes} bytes: finish or cancel some, or"
                    " start the server with more --transfers-per-owner",
                    needed=total,
                    limit=self._owner_bytes,
                )
            key = secrets.token_hex(8)
            self._open[key] = transfer
            return key

    def _get(self, owner: str, key: str, kind: type[_T]) -> _T:
        with self._lock:
            found = self._open.get(key)
            if not isinstance(found, kind) or found.owner != owner:
                raise UnknownTransfer(
                    "this transfer is finished, cancelled or was idle too long: ask again"
                )
            found.used = time.monotonic()
            return found
