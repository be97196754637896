"""Named vectors on disk: a file of safetensors for each, by owner, with how it was made.

Decides names, limits, which file is whole, and for which model a vector may be used. Every server
of a user sees the same folder, so it is read anew each time. What a vector is used for is decided
by whoever asks for it.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import platformdirs

from kernel_server.protocol import vector_file
from kernel_server.protocol.errors import (
    BadArgument,
    BrokenVector,
    QuotaExceeded,
    UnknownVector,
    WrongModel,
)
from kernel_server.protocol.messages import VectorInfo
from kernel_server.protocol.vector_file import MAX_WIDTH

#: How long a server waits for another one that writes, seconds; a write takes milliseconds.
LOCK_S = 10.0
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 _.-]{0,98}[A-Za-z0-9_-])?")
_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class VectorEntry:
    """A named vector with its numbers, float32 `[width]`; they cannot be written to."""

    info: VectorInfo
    array: npt.NDArray[np.float32]


class Vectors:
    """The named vectors of all owners, in files under `folder`.

    folder: None for the one of this user. max_count, max_bytes: what one owner may keep, the files
    counted whole. Safe to use from several threads and processes.

        vectors = Vectors(tmp_path)
        vectors.store("ann", "joy", array, location="layers.16.output", model="m", weights="ab12")
        vectors.get("ann", "joy").array
    """

    def __init__(
        self, folder: Path | None = None, *, max_count: int = 1000, max_bytes: int = 1 << 30
    ) -> None:
        self._folder = vectors_folder() if folder is None else folder
        self.max_count = max_count
        self.max_bytes = max_bytes
        #: of what was read; never held while waiting for a disk or another server
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        #: name and hash of the weights served; None before the model is loaded
        self._served: tuple[str, str] | None = None
        #: path -> (what the file system says of it, what was read)
        self._known: dict[Path, tuple[tuple[int, ...], VectorEntry]] = {}

    def serve(self, model: str, weights: str) -> None:
        """Say which model is served: vectors of others are refused for use from now on."""
        self._served = (model, weights)

    # -- reading --------------------------------------------------------------------------------

    def get(self, owner: str, name: str, *, inexact: bool = False) -> VectorEntry:
        """A vector to be used with the model served.

        inexact: take one that was made on another model; its width is for the user to check.
        Raises UnknownVector, BrokenVector, WrongModel, BadArgument.
        """
        entry = self.read(owner, name)
        if self._served is not None and not inexact:
            require_same_model(entry.info, *self._served)
        return entry

    def is_foreign(self, info: VectorInfo) -> bool:
        """Whether a vector was made on other weights than those served."""
        return self._served is not None and info.weights != self._served[1]

    def read(self, owner: str, name: str) -> VectorEntry:
        """A vector to be looked at, whatever model it was made on."""
        check_name(name)
        path = self._path(owner, name)
        try:
            status = path.stat()
            key = (status.st_ino, status.st_size, status.st_mtime_ns)
            known = self._known.get(path)
            if known is not None and known[0] == key:
                return known[1]
            entry = _read_file(path, name)
        except FileNotFoundError:
            raise self._unknown(owner, name) from None
        except OSError as error:
            raise BrokenVector(
                f"the file of vector {name!r} cannot be read ({error.strerror or error}):"
                " remove it and make it anew"
            ) from error
        with self._lock:
            self._known[path] = (key, entry)
        return entry

    def listed(self, owner: str) -> tuple[VectorInfo, ...]:
        """Every vector of an owner by name; a torn one says in `broken` what is wrong with it."""
        found = []
        for name in self._names(owner):
            try:
                found.append(self.read(owner, name).info)
            except BrokenVector as error:
                found.append(
                    VectorInfo(name=name, width=0, norm=0.0, location="", broken=str(error))
                )
            except UnknownVector:  # removed since the folder was read
                continue
        return tuple(found)

    def _names(self, owner: str) -> list[str]:
        try:
            files = list(os.scandir(self._owner_folder(owner)))
        except FileNotFoundError:
            return []
        names = [file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX)]
        return sorted(name for name in names if _NAME.fullmatch(name))

    def _unknown(self, owner: str, name: str) -> UnknownVector:
        names = self._names(owner)
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        others = f"there are {shown}" if names else "there are none yet"
        return UnknownVector(f"you have no vector named {name!r}: {others}", names=names[:100])

    # -- writing --------------------------------------------------------------------------------

    def store(
        self,
        owner: str,
        name: str,
        value: npt.NDArray[Any],
        *,
        location: str,
        model: str,
        weights: str,
        provenance: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> VectorInfo:
        """Keep a vector, whole or not at all; one of the same name stays unless `replace`.

        value: `[width]`, finite and not zero. Raises BadArgument, QuotaExceeded.
        """
        check_name(name)
        array = _checked(name, value)
        info = VectorInfo(
            name=name,
            width=len(array),
            norm=vector_file.norm_of(array),
            location=location,
            model=model,
            weights=weights,
            provenance=dict(provenance or {}),
        )
        content = _file_content(info, array)
        with self._writing, self._locked_folder(owner) as folder:
            path = self._path(owner, name)
            if path.exists() and not replace:
                raise BadArgument(
                    f"you have a vector named {name!r} already: pass replace=True, or take another"
                    " name"
                )
            self._check_quota(folder, path, len(content))
            _write(path, content)
        return info

    def _check_quota(self, folder: Path, path: Path, nbytes: int) -> None:
        others = [f.stat().st_size for f in folder.glob(f"*{_SUFFIX}") if f != path]
        if len(others) >= self.max_count:
            raise QuotaExceeded(
                f"you have {len(others)} vectors, the limit is {self.max_count}: remove one first",
                have=len(others),
                limit=self.max_count,
            )
        if sum(others) + nbytes > self.max_bytes:
            raise QuotaExceeded(
                f"a vector of {nbytes} bytes does not fit: you have {sum(others)} bytes of vectors,"
                f" the limit is {self.max_bytes}; remove one first",
                needed=nbytes,
                have=sum(others),
                limit=self.max_bytes,
            )

    def remove(self, owner: str, name: str) -> None:
        """Delete a vector, a torn one too. Raises UnknownVector."""
        check_name(name)
        path = self._path(owner, name)
        try:
            path.unlink()
        except FileNotFoundError:
            raise self._unknown(owner, name) from None
        except OSError as error:
            raise _unwritable(error) from error
        with self._lock:
            self._known.pop(path, None)

    # -- files ----------------------------------------------------------------------------------

    def _owner_folder(self, owner: str) -> Path:
        # the owner's name is free text; quoted it is one folder, and never one of . and ..
        return self._folder / ("owner-" + quote(owner, safe=""))

    def _path(self, owner: str, name: str) -> Path:
        return self._owner_folder(owner) / f"{name}{_SUFFIX}"

    @contextmanager
    def _locked_folder(self, owner: str) -> Iterator[Path]:
        """The owner's folder, made when there is none, kept from other servers while inside."""
        folder = self._owner_folder(owner)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _unwritable(error) from error
        try:
            _lock_file(handle)
            yield folder
        finally:
            os.close(handle)  # which unlocks it


def _lock_file(handle: int) -> None:
    """Keep other servers out; one that holds the folder for long is hung, and is not waited for."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BadArgument(
                    f"another server has kept the folder of named vectors for {LOCK_S:g} s: try"
                    " again, or end that server"
                ) from None
            time.sleep(0.01)


def vectors_folder() -> Path:
    """Where the vectors of this user's servers are."""
    return platformdirs.user_data_path("djinn", appauthor=False) / "vectors"


def check_name(name: str) -> None:
    """Raise BadArgument unless `name` can name a vector and its file."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadArgument(
            f"{str(name)[:60]!r} cannot name a vector: give 1 to 100 letters (A to z), digits,"
            " spaces, '_', '-' or '.', with a letter or digit first"
        )


def require_same_model(info: VectorInfo, model: str, weights: str) -> None:
    """Raise WrongModel unless the vector was made on these weights."""
    if info.weights == weights:
        return
    raise WrongModel(
        f"vector {info.name!r} was made on {info.model or 'a model not told'} (weights"
        f" {_short(info.weights)}), this is {model} (weights {_short(weights)}): make it anew here,"
        " or pass inexact=True to use it as numbers",
        vector=info.weights,
        served=weights,
    )


def _short(weights: str) -> str:
    return weights[:12] or "unknown"


def _checked(name: str, value: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    array = np.asarray(value)
    if array.ndim != 1 or not 1 <= array.size <= MAX_WIDTH or array.dtype.kind not in "fiu":
        raise BadArgument(
            f"vector {name!r} has shape {list(array.shape)} and dtype {array.dtype}: give 1 to"
            f" {MAX_WIDTH} numbers in one dimension"
        )
    with np.errstate(over="ignore"):
        array = np.array(array, dtype="<f4")
    if bad := int(array.size - np.isfinite(array).sum()):
        raise BadArgument(
            f"vector {name!r}: {bad} of {array.size} numbers are NaN or infinite in float32"
        )
    if not array.any():
        raise BadArgument(f"vector {name!r} is zero everywhere, so it has no direction")
    return array


def _file_content(info: VectorInfo, array: npt.NDArray[np.float32]) -> bytes:
    from safetensors.numpy import save

    try:
        metadata = vector_file.metadata_of(info, array)
    except ValueError as error:
        raise BadArgument(str(error)) from None
    content: bytes = save({vector_file.TENSOR: array}, metadata=metadata)
    return content


def _write(path: Path, content: bytes) -> None:
    """Put a file in its place in one step: a reader sees the old one or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        try:
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name is on disk too
            finally:
                os.close(folder)
        finally:
            with suppress(FileNotFoundError):
                draft.unlink()
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> BadArgument:
    return BadArgument(
        f"the folder of named vectors cannot be written ({error.strerror or error}): make room, or"
        " start the server with XDG_DATA_HOME set to a folder of yours"
    )


def _read_file(path: Path, name: str) -> VectorEntry:
    """Read a file and hold it against its checksum. Raises BrokenVector, OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    with path.open("rb") as file:
        content = file.read(vector_file.MAX_FILE_BYTES + 1)
    try:
        if len(content) > vector_file.MAX_FILE_BYTES:
            raise ValueError(f"it has more than {vector_file.MAX_FILE_BYTES} bytes")
        array = load(content)[vector_file.TENSOR]
        info = vector_file.info_of(name, vector_file.header_of(content), array)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenVector(
            f"the file of vector {name!r} is torn or not one of ours ({error}): remove it and make"
            " it anew"
        ) from error
    array.flags.writeable = False
    return VectorEntry(info, array)
