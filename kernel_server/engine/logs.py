"""What logpoints have noted of a session, and the writing of it while a stretch runs.

A record of a few tokens is a reference until the stretch ends, and is then reduced and copied to
the host with all others, so that the layers wait for nothing; one of many tokens is reduced at
once, since it would keep every layer's residual stream alive. How much may be written is told by
the state; what is lost for want of room is counted.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernel_server.engine.segments import ForwardState
from kernel_server.engine.variables import row_norms
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.location import location_at
from kernel_server.protocol.messages import LogContent, LogRecord, LogReply, ReadLog
from kernel_server.state.events import LogResult
from kernel_server.state.instructions import LogPlan

log = logging.getLogger(__name__)

#: Up to this many tokens a record waits for the end of the stretch.
WAITING_ROWS = 16
#: Most tokens of one record, and most bytes of its tensor (one token may have more).
MAX_RECORD_ROWS = 4096
MAX_VALUE_BYTES = 512 << 10
#: Most bytes of records in one answer; a single record may be larger.
REPLY_BYTES = 1 << 20
#: What a record and each of its tokens take besides a tensor, bytes.
RECORD_BYTES, ROW_BYTES = 512, 96


@dataclass(slots=True)
class Log:
    """The records of one logpoint, the oldest first."""

    records: deque[tuple[LogRecord, int]] = field(default_factory=deque)
    last_seq: int = 0
    dropped: int = 0

    def read(self, request: ReadLog) -> LogReply:
        """Records after the one the caller has; those are freed when he says so."""
        while request.release and self.records and self.records[0][0].seq <= request.after:
            self.records.popleft()
        found: list[LogRecord] = []
        total = 0
        for record, nbytes in self.records:
            if record.seq <= request.after:
                continue
            total += nbytes
            if found and total > REPLY_BYTES:
                break
            found.append(record)
        return LogReply(records=tuple(found), last_seq=self.last_seq, dropped=self.dropped)


@dataclass(slots=True)
class _Piece:
    """A record that is being made."""

    plan: LogPlan
    point: float
    rows: tuple[int, ...]
    nbytes: int
    #: [tokens, channels], until the figures are there
    value: Tensor | None
    #: float32 [tokens, 3]: norm, largest magnitude, NaN count; maybe still on its way to the host
    figures: Tensor | None = None
    #: the tensor to be kept; maybe still on its way to the host
    kept: Tensor | None = None


class StretchLogs:
    """Writes the logs of one session while a stretch of it runs.

    logs: by logpoint, written to when the stretch ends. room_bytes: for all of them together.
    """

    def __init__(
        self,
        logs: dict[int, Log],
        plans: Sequence[LogPlan],
        room_bytes: int,
        *,
        forward: int,
        num_layers: int,
    ) -> None:
        self._logs = logs
        self._plans: dict[float, list[LogPlan]] = {}
        for plan in plans:
            self._plans.setdefault(plan.point, []).append(plan)
        self._room = room_bytes
        self._rooms = {plan.breakpoint_id: plan.room_bytes for plan in plans}
        self._forward = forward
        self._num_layers = num_layers
        self._pieces: list[_Piece] = []
        self._held: dict[int, int] = {}
        self._dropped: dict[int, int] = {}
        self._refused: dict[int, int] = {}
        self._state: ForwardState | None = None
        self._device: torch.device | None = None

    def plans(self, point: float) -> Sequence[LogPlan]:
        """The logpoints at a point."""
        return self._plans.get(point, ())

    @property
    def points(self) -> Iterator[float]:
        """Where there is something to note."""
        return iter(self._plans)

    def note(
        self,
        forward: ForwardState,
        chunks: Sequence[Tensor],
        held: Mapping[int, tuple[int, ...]],
    ) -> bool:
        """Note what the logpoints at this point ask for; True when one must stop for want of room.

        chunks: the tensor there, `[1, tokens, channels]` each, maybe the last rows only. held:
        positions at which the condition of each held.
        """
        self._state, self._device = forward, chunks[0].device
        point = forward.point
        full = False
        first_row = len(forward.token_ids) - sum(chunk.shape[1] for chunk in chunks)
        for plan in self.plans(point):
            if plan.check is not None:
                found = held.get(plan.breakpoint_id, ())
                rows = tuple(position - forward.start for position in found)
            else:
                rows = tuple(range(len(forward.token_ids))) if plan.rows is None else plan.rows
            rows = tuple(row for row in rows if row >= first_row)
            if not rows:
                continue
            self._held[plan.breakpoint_id] = self._held.get(plan.breakpoint_id, 0) + 1
            for part in _parts(rows, chunks[0], plan.what):
                full |= not self._take(plan, point, part, chunks, first_row)
        return full

    def _take(
        self,
        plan: LogPlan,
        point: float,
        rows: tuple[int, ...],
        chunks: Sequence[Tensor],
        first_row: int,
    ) -> bool:
        """Make a record, or drop it; False when the session is to stop instead."""
        width, item = chunks[0].shape[-1], chunks[0].element_size()
        nbytes = RECORD_BYTES + ROW_BYTES * len(rows)
        nbytes += len(rows) * width * item if plan.what == "tensor" else 0
        key = plan.breakpoint_id
        if key in self._refused or nbytes > min(self._room, self._rooms[key]):
            self._dropped[key] = self._dropped.get(key, 0) + 1
            if plan.stop_when_full:
                self._refused.setdefault(key, nbytes)
            return not plan.stop_when_full
        piece = _Piece(plan, point, rows, nbytes, _gather(chunks, rows, first_row))
        if len(rows) > WAITING_ROWS:
            _reduce([piece])
            if piece.kept is not None and chunks[0].device.type == "cpu":
                piece.kept = piece.kept.clone()  # a view would keep the whole chunk until the end
        self._room -= nbytes
        self._rooms[key] -= nbytes
        self._pieces.append(piece)
        return True

    def finish(self) -> tuple[LogResult, ...]:
        """Bring everything to the host and add it to the logs; what the stretch has noted."""
        try:
            records = self._records()
        except Exception:  # no memory, or a device that is gone: the stretch says so itself
            log.exception("records were lost")
            records = []
            for piece in self._pieces:
                key = piece.plan.breakpoint_id
                self._dropped[key] = self._dropped.get(key, 0) + 1
        sizes: dict[int, list[int]] = {}
        for piece, record in records:
            key = piece.plan.breakpoint_id
            into = self._logs.setdefault(key, Log())
            into.last_seq += 1
            into.records.append((record(into.last_seq), piece.nbytes))
            sizes.setdefault(key, []).append(piece.nbytes)
        self._pieces = []
        for key, count in self._dropped.items():
            self._logs.setdefault(key, Log()).dropped += count
        return tuple(
            LogResult(
                breakpoint_id=key,
                held=self._held.get(key, 0),
                sizes=tuple(sizes.get(key, ())),
                dropped=self._dropped.get(key, 0),
                refused_bytes=self._refused.get(key),
            )
            for key in self._held
        )

    def _records(self) -> list[tuple[_Piece, _Record]]:
        if not self._pieces:
            return []
        waiting: dict[tuple[int, torch.dtype], list[_Piece]] = {}
        for piece in self._pieces:
            if piece.value is not None:
                key = (piece.value.shape[-1], piece.value.dtype)
                waiting.setdefault(key, []).append(piece)
        for pieces in waiting.values():
            _reduce(pieces)
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        assert self._state is not None
        return [
            (piece, _Record(piece, self._state, self._forward, self._num_layers))
            for piece in self._pieces
        ]


class _Record:
    """A piece on the host, to be numbered."""

    def __init__(self, piece: _Piece, state: ForwardState, forward: int, num_layers: int) -> None:
        assert piece.figures is not None
        figures = piece.figures.numpy()
        self._piece = piece
        self._forward = forward
        self._location = str(location_at(piece.point, num_layers))
        self._positions = tuple(state.start + row for row in piece.rows)
        self._token_ids = tuple(state.token_ids[row] for row in piece.rows)
        self._per_token = Array.from_numpy(figures[:, :2].copy())
        self._num_nan = Array.from_numpy(figures[:, 2].astype("int32"))
        self._value = None if piece.kept is None else _array(piece.kept)

    def __call__(self, seq: int) -> LogRecord:
        return LogRecord(
            seq=seq,
            forward=self._forward,
            location=self._location,
            positions=self._positions,
            token_ids=self._token_ids,
            per_token=self._per_token,
            num_nan=self._num_nan,
            value=self._value,
        )


def _parts(rows: tuple[int, ...], sample: Tensor, what: LogContent) -> Iterator[tuple[int, ...]]:
    """The rows of each record: no record is larger than an answer may be, but for a single row."""
    size = MAX_RECORD_ROWS
    if what == "tensor":
        size = min(size, max(1, MAX_VALUE_BYTES // (sample.shape[-1] * sample.element_size())))
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def _gather(chunks: Sequence[Tensor], rows: tuple[int, ...], first_row: int) -> Tensor:
    """The rows of the forward, `[rows, channels]`; a view where they lie together."""
    begin, end = rows[0] - first_row, rows[-1] - first_row + 1
    if end - begin == len(rows) and rows == tuple(range(rows[0], rows[-1] + 1)):
        parts = []
        for chunk in chunks:
            size = chunk.shape[1]
            if begin < size and end > 0:
                parts.append(chunk[0, max(begin, 0) : end])
            begin, end = begin - size, end - size
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    picked = []
    for row in rows:
        left = row - first_row
        for chunk in chunks:
            if left < chunk.shape[1]:
                picked.append(chunk[0, left])
                break
            left -= chunk.shape[1]
    return torch.stack(picked)


def _reduce(pieces: Sequence[_Piece]) -> None:
    """Compute the figures of pieces of one width and dtype, and send them to the host."""
    values = [piece.value for piece in pieces if piece.value is not None]
    together = values[0] if len(values) == 1 else torch.cat(values)
    figures = torch.stack(
        [
            row_norms(together),
            together.abs().amax(-1).float(),
            together.isnan().sum(-1).float(),
        ],
        1,
    )
    counts = [len(piece.rows) for piece in pieces]
    on_host = figures.to("cpu", non_blocking=True).split(counts)
    kept: Sequence[Tensor | None] = [None] * len(pieces)
    if any(piece.plan.what == "tensor" for piece in pieces):
        kept = together.to("cpu", non_blocking=True).split(counts)
    for piece, found, value in zip(pieces, on_host, kept, strict=True):
        piece.figures, piece.value = found, None
        piece.kept = value if piece.plan.what == "tensor" else None


def _array(tensor: Tensor) -> Array:
    """A tensor's own copy as raw bytes: a view would keep all that it was computed with."""
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw)
