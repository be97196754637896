"""A log in a folder: parts that are whole or not there, written while the session runs.

A part is a file of JSON lines, one per token, whose last line says what it holds, with a checksum;
and, where tensors are noted, a safetensors file that was there before it. Each file is written
beside its place, synced, and renamed. Which records there are is the server's business; writing
goes on after the last part that is whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from djinn_nb.log_rows import COLUMNS, LoggedTensor, Noted, Texts, rows_of, tensors_of
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BadArgument, DjinnError, QuotaExceeded
from kernel_server.protocol.messages import LogRecord, LogReply

if TYPE_CHECKING:
    import pandas as pd

#: Bytes a folder may take unless told otherwise.
MAX_BYTES = 1 << 30
#: Pause between two looks for new records, seconds.
PAUSE_S = 0.5
_HEADER = "log.json"
_FORMAT = 1
#: dtype names of safetensors files, by ours
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class Fetch(Protocol):
    """Records after a number; those up to it may be freed by the server."""

    def __call__(self, after: int, release: bool = False) -> LogReply: ...


@dataclass(frozen=True, slots=True)
class SavedLog:
    """A log read back: `frame` has a row per record and token, `tensors` the rows by location.

    header: which log it is. torn: files that are not whole, whose records are not here.
    """

    frame: pd.DataFrame
    tensors: dict[str, LoggedTensor]
    header: dict[str, Any]
    torn: tuple[str, ...] = ()

    def __repr__(self) -> str:
        kept = f"{len(self.frame)} rows, tensors at {len(self.tensors)} locations"
        return f"SavedLog of session {self.header.get('session')}: {kept}" + (
            f", torn: {', '.join(self.torn)}" if self.torn else ""
        )


def read(folder: str | Path) -> SavedLog:
    """The log in a folder that `log.stream()` has written; raises BadArgument when there is none.

    Parts after a torn one are left out, and named in `torn`; streaming again writes them anew.

        saved = djinn_nb.logs.read("run-1")
        saved.frame.pivot_table(index="position", columns="location", values="norm")
    """
    import pandas as pd

    place = Path(folder).expanduser()
    header = _read_header(place)
    if header is None:
        raise BadArgument(f"{place} holds no log: log.stream(folder) writes one")
    rows: list[dict[str, Any]] = []
    values: list[Noted] = []
    torn: list[str] = []
    for part in _parts(place):
        if torn or not part.whole:
            torn.append(part.rows_file.name)
            continue
        rows += part.rows
        values += part.noted()
    frame = pd.DataFrame([{name: row[name] for name in COLUMNS} for row in rows], columns=COLUMNS)
    return SavedLog(frame, tensors_of(values), header, tuple(torn))


class LogStream:
    """Writes a log into a folder until it is closed; made by `log.stream(folder)`.

    stream = log.stream("run-1")
    session.continue_()
    stream.close()                  # what is left is written; what went wrong is raised
    """

    def __init__(
        self,
        fetch: Fetch,
        texts: Texts,
        folder: Path,
        header: dict[str, Any],
        *,
        max_bytes: int,
        release: bool,
    ) -> None:
        self.folder = folder
        self._fetch, self._texts = fetch, texts
        self._max_bytes, self._release = max_bytes, release
        self._error: DjinnError | OSError | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._claim = contextlib.ExitStack()
        self._claim.enter_context(_claimed(folder))
        try:
            self._resume(header)
        except BaseException:
            self._claim.close()
            raise
        self._thread = threading.Thread(target=self._follow, name="djinn-log", daemon=True)
        self._thread.start()

    @property
    def last_seq(self) -> int:
        """Number of the last record that is safe on disk."""
        return self._last_seq

    @property
    def nbytes(self) -> int:
        """Bytes of the folder's files."""
        return self._nbytes

    def flush(self) -> int:
        """Write what there is now; returns the number of the last record on disk."""
        with self._writing:
            while True:
                reply = self._fetch(self._last_seq, release=self._release)
                if not reply.records:
                    return self._last_seq
                first = reply.records[0].seq
                if first != self._last_seq + 1:
                    raise BadArgument(
                        f"records {self._last_seq + 1} to {first - 1} were freed by somebody else:"
                        " stream to another folder, and use release in one place only"
                    )
                self._write(reply.records)

    def close(self) -> None:
        """Write what is left, and stop following; raises what went wrong meanwhile."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        try:
            if self._error is not None:
                raise self._error
            if not self._claim_is_closed:
                self.flush()
        finally:
            self._claim_is_closed = True
            self._claim.close()

    _claim_is_closed = False

    def __enter__(self) -> LogStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(DjinnError, OSError):  # the error under way is the one to see
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._ended.is_set() else "following"
        if self._error is not None:
            state = f"ended by {type(self._error).__name__}: {self._error}"
        return (
            f"LogStream to {self.folder}, {self._last_seq} records, {self._nbytes} bytes, {state}"
        )

    # -- inside ---------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._ended.wait(PAUSE_S):
            try:
                self.flush()
            except (DjinnError, OSError) as error:
                self._error = error
                return

    def _resume(self, header: dict[str, Any]) -> None:
        """Find the last whole part, and take away what is torn."""
        wanted = {"format": _FORMAT, **header}
        found = _read_header(self.folder)
        if found is None:
            others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
            if others:
                raise BadArgument(
                    f"{self.folder} is no folder of a log and holds {len(others)} other files, such"
                    f" as {sorted(others)[0]}: give an empty or a new one"
                )
            _write_file(self.folder / _HEADER, json.dumps(wanted, indent=1).encode())
        elif found != wanted:
            keys = [key for key in wanted if found.get(key) != wanted[key]]
            raise BadArgument(
                f"{self.folder} holds the log of logpoint {found.get('logpoint')} of session"
                f" {found.get('session')}, and its {', '.join(keys)} differ: give another folder"
            )
        self._number = self._last_seq = 0
        torn = False
        for part in _parts(self.folder):
            torn = torn or not part.whole or part.first_seq != self._last_seq + 1
            if torn:
                part.remove()
            else:
                self._number, self._last_seq = part.number, part.last_seq
        for path in self.folder.glob(".*.new"):
            path.unlink(missing_ok=True)
        # a part's tensors without its rows
        for path in self.folder.glob("part-*.safetensors"):
            if not path.with_suffix(".jsonl").exists():
                path.unlink(missing_ok=True)
        self._nbytes = sum(path.stat().st_size for path in self.folder.iterdir())

    def _write(self, records: tuple[LogRecord, ...]) -> None:
        number = self._number + 1
        tensors = {_tensor_name(r.seq): r.value for r in records if r.value is not None}
        packed = _packed(tensors) if tensors else b""
        lines = _lines(records, self._texts, number, packed)
        size = len(lines) + len(packed)
        if self._nbytes + size > self._max_bytes:
            raise QuotaExceeded(
                f"{self.folder} has {self._nbytes} bytes and the next part {size}, more than"
                f" max_bytes={self._max_bytes}: stream on with more max_bytes",
                have=self._nbytes,
                needed=size,
                limit=self._max_bytes,
            )
        name = self.folder / f"part-{number:06d}"
        if packed:
            _write_file(name.with_suffix(".safetensors"), packed)
        _write_file(name.with_suffix(".jsonl"), lines)
        self._number, self._last_seq = number, records[-1].seq
        self._nbytes += size


# -- parts ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Part:
    """The files of one part, as they are found."""

    rows_file: Path
    number: int
    whole: bool = False
    first_seq: int = 0
    last_seq: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tensors_file(self) -> Path:
        return self.rows_file.with_suffix(".safetensors")

    def remove(self) -> None:
        # the rows first: without them the tensors are of no part
        self.rows_file.unlink(missing_ok=True)
        self.tensors_file.unlink(missing_ok=True)

    def load(self) -> None:
        """Read it; it is whole when every byte is the one that was written."""
        raw = self.rows_file.read_bytes()
        body, _, last = raw.rstrip(b"\n").rpartition(b"\n")
        body += b"\n" if body else b""
        try:
            end = json.loads(last)["end"]
            if end["number"] != self.number or end["crc"] != zlib.crc32(body):
                return
            if end["tensor_bytes"]:
                packed = self.tensors_file.read_bytes()
                if (len(packed), zlib.crc32(packed)) != (end["tensor_bytes"], end["tensor_crc"]):
                    return
            self.rows = [_unpacked(json.loads(line)) for line in body.splitlines()]
            self.first_seq, self.last_seq = int(end["first_seq"]), int(end["last_seq"])
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            return
        self.whole = True

    def noted(self) -> Iterator[Noted]:
        """Its tensors, with where and when they were noted."""
        if not self.tensors_file.exists():
            return
        import safetensors

        unpack: Any = safetensors.deserialize  # it has no types
        found = dict(unpack(self.tensors_file.read_bytes()))
        where: dict[int, list[dict[str, Any]]] = {}
        for row in self.rows:
            where.setdefault(row["seq"], []).append(row)
        for seq, rows in where.items():
            one = found[_tensor_name(seq)]
            dtype = _DTYPES[one["dtype"]]
            values = Array(dtype, tuple(one["shape"]), bytes(one["data"])).numpy()
            yield rows[0]["location"], rows[0]["forward"], [r["position"] for r in rows], values


def _parts(folder: Path) -> Iterator[_Part]:
    """Every part there is, in order, read."""
    for path in sorted(folder.glob("part-*.jsonl")):
        digits = path.stem.partition("-")[2]
        part = _Part(path, int(digits) if digits.isdigit() else -1)
        part.load()
        yield part


def _lines(records: tuple[LogRecord, ...], texts: Texts, number: int, packed: bytes) -> bytes:
    """The rows of a part, and a last line by which they are known to be whole."""
    rows = []
    for record in records:
        rows += [{"seq": record.seq, **row} for row in rows_of([record], texts)]
    body = "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows).encode()
    end = {
        "number": number,
        "first_seq": records[0].seq,
        "last_seq": records[-1].seq,
        "rows": len(rows),
        "crc": zlib.crc32(body),
        "tensor_bytes": len(packed),
        "tensor_crc": zlib.crc32(packed),
    }
    return body + json.dumps({"end": end}).encode() + b"\n"


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinities: they are written as texts, `"nan"`."""
    found = row.copy()
    for name in ("norm", "largest"):
        if not math.isfinite(row[name]):
            found[name] = str(row[name])
    return found


def _unpacked(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "norm": float(row["norm"]), "largest": float(row["largest"])}


def _tensor_name(seq: int) -> str:
    return f"{seq:09d}"


def _packed(tensors: dict[str, Array]) -> bytes:
    """A safetensors file. The library writes numpy's dtypes, and bfloat16 is none of them."""
    codes = {name: code for code, name in _DTYPES.items()}
    header: dict[str, Any] = {}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": codes[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *(a.data for a in tensors.values())])


# -- files ----------------------------------------------------------------------------------------


def _read_header(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / _HEADER).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == _FORMAT else None


def _write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whatever ends this process."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Nobody else writes into the folder; the claim ends with its process."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadArgument(
                f"{folder} is being written by another stream: close it, or give another folder"
            ) from None
        yield
    finally:
        os.close(handle)
