"""Sessions as files: `session.save(path)`, `server.load(path)`, on the client's own machine.

A checkpoint is a folder: `session.json`, which says all in words and numbers, and
`tensors.safetensors`, the prompt, the values of edits and the vectors of conditions. It holds no
keys and values: whoever loads it computes the session again, as it went, which is bit-equal under
the same execution fingerprint. What a file must look like to count as whole is decided here; what
a session is made of, by the server.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from djinn_nb.client import CHUNK_BYTES, COMPUTE_S, Opened
from kernel_server.protocol import codec
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BadArgument, BadMessage, BrokenCheckpoint

if TYPE_CHECKING:
    from djinn_nb.client import Client
    from djinn_nb.session import Session

FORMAT, VERSION = "djinn checkpoint", 1
JSON_FILE, TENSOR_FILE = "session.json", "tensors.safetensors"
#: Largest description that is read, bytes.
MAX_JSON_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds, whole and checked."""

    record: m.SessionRecord
    arrays: tuple[Array, ...]
    #: for readers: model, texts, where the session stood
    about: dict[str, Any]


def fetch(session: Session) -> Checkpoint:
    """All that determines a session, from its server. Raises NotStopped while it runs."""
    client = session.client
    with Opened(client) as opened:
        message = m.ReadRecord(session_id=session.id)
        reply = client.call(message, m.RecordReply, timeout_s=COMPUTE_S, opens=opened)
        arrays = tuple(
            one.data if one.data is not None else client.fetch_array(one, f"array {i}")
            for i, one in enumerate(reply.arrays)
        )
    return Checkpoint(reply.record, arrays, _about(client, reply.record, arrays))


def _about(client: Client, record: m.SessionRecord, arrays: tuple[Array, ...]) -> dict[str, Any]:
    """What a person who opens the file wants to know."""
    prompt = arrays[record.prompt].numpy().tolist()
    model = client.model
    return {
        "model": model.name,
        "random_weights": model.random_weights,
        "status": record.status,
        "stop": None if record.stop is None else record.stop.location,
        "forward": record.forward,
        "prompt": client.text_of(prompt) if model.has_tokenizer else None,
        "generated": client.text_of(record.generated) if model.has_tokenizer else None,
        "edits": [edit.spec.kind + " at " + edit.spec.location for edit in record.edits],
    }


def write(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Path:
    """Write a checkpoint in one step: the folder is there whole, or not at all.

    Raises BadArgument where something is there already or the disk does not take it.
    """
    from safetensors.numpy import save

    folder = Path(path).expanduser().absolute()
    if folder.exists() or folder.is_symlink():
        raise BadArgument(f"{folder} exists: nothing is overwritten, name another")
    tensors = save({f"array.{i}": _raw(array) for i, array in enumerate(checkpoint.arrays)})
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "about": checkpoint.about,
        "fingerprint": checkpoint.record.fingerprint,
        "arrays": [
            {"name": f"array.{i}", "dtype": array.dtype, "shape": list(array.shape)}
            for i, array in enumerate(checkpoint.arrays)
        ],
        "tensors": {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()},
        "record": _plain(checkpoint.record),
    }
    content["sha256"] = _digest(content)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir(mode=0o700)
        _synced(draft / TENSOR_FILE, tensors)
        _synced(draft / JSON_FILE, json.dumps(content, indent=1).encode())
        _sync_folder(draft)
        draft.rename(folder)
        _sync_folder(folder.parent)
    except OSError as error:
        raise BadArgument(
            f"{folder} cannot be written ({error.strerror or error}): make room there, or name"
            " another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(draft)
    return folder


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint that is whole; raises BrokenCheckpoint for any other."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise BrokenCheckpoint(f"{folder} is no folder: session.save(path) makes one")
    content = _content(folder / JSON_FILE)
    tensors = _bytes(folder / TENSOR_FILE)
    said = content["tensors"]
    if len(tensors) != said["bytes"] or hashlib.sha256(tensors).hexdigest() != said["sha256"]:
        raise BrokenCheckpoint(
            f"{folder / TENSOR_FILE} has {len(tensors)} bytes that are not the {said['bytes']} that"
            " were saved: it is torn or was changed, take another copy"
        )
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        raw = load(tensors)
        arrays = tuple(
            Array(one["dtype"], tuple(one["shape"]), raw[one["name"]].tobytes())
            for one in content["arrays"]
        )
        record = _record(content["record"])
    except (SafetensorError, BadMessage, KeyError, TypeError, ValueError) as error:
        raise BrokenCheckpoint(f"{folder} does not hold together: {error}") from error
    return Checkpoint(record, arrays, dict(content["about"]))


def is_checkpoint(path: str) -> bool:
    """Whether a folder looks like one that `session.save()` wrote."""
    return (Path(path).expanduser() / JSON_FILE).is_file()


def send(client: Client, checkpoint: Checkpoint, name: str | None, inexact: bool) -> m.SessionInfo:
    """Make a session of a checkpoint on a server."""
    with Opened(client) as opened:
        parts = tuple(
            m.ArrayPart(data=array)
            if array.nbytes <= CHUNK_BYTES
            else m.ArrayPart(upload_id=client.upload(array, f"array {i}", opened))
            for i, array in enumerate(checkpoint.arrays)
        )
        message = m.LoadRecord(record=checkpoint.record, arrays=parts, name=name, inexact=inexact)
        return client.control(message)


# -- bytes --------------------------------------------------------------------------------------


def _raw(array: Array) -> Any:
    """The elements as numpy has them; bfloat16 as its bits."""
    import numpy as np

    dtype = "<u2" if array.dtype == "bfloat16" else np.dtype(array.dtype).newbyteorder("<")
    return np.frombuffer(array.data, dtype=dtype).reshape(array.shape)


def _plain(record: m.SessionRecord) -> Any:
    """The record as JSON: the codec's own form, which has no arrays in it."""
    return codec.plain(record)


def _record(tree: Any) -> m.SessionRecord:
    header = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
    found = codec.decode(codec.MAGIC + len(header).to_bytes(4, "little") + header)
    if not isinstance(found, m.SessionRecord):
        raise BadMessage(f"it holds a {type(found).__name__} in place of a session")
    return found


def _digest(content: dict[str, Any]) -> str:
    """Of everything but itself, however it is laid out."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _content(file: Path) -> dict[str, Any]:
    data = _bytes(file, MAX_JSON_BYTES)
    try:
        content = json.loads(data)
        whole = content["sha256"] == _digest(content)
        known = (content["format"], content["version"]) == (FORMAT, VERSION)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenCheckpoint(f"{file} is torn or no checkpoint's: {error}") from error
    if not known:
        raise BrokenCheckpoint(
            f"{file} is {content['format']!r} version {content['version']!r}, and this version of"
            f" Djinn reads {FORMAT!r} version {VERSION}"
        )
    if not whole:
        raise BrokenCheckpoint(f"{file} was changed after it was saved: take another copy")
    return dict(content)


def _bytes(file: Path, most: int | None = None) -> bytes:
    try:
        if most is not None and file.stat().st_size > most:
            raise BrokenCheckpoint(f"{file} has more than {most} bytes: it is no checkpoint's")
        return file.read_bytes()
    except OSError as error:
        raise BrokenCheckpoint(f"{file} cannot be read: {error.strerror or error}") from error


def _synced(file: Path, content: bytes) -> None:
    with file.open("xb") as handle:
        os.fchmod(handle.fileno(), 0o600)
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
