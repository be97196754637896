"""What logpoints have noted of a session, and the writing of it while a stretch runs.

A record of a few tokens is a reference until the stretch ends, and is then reduced and copied to
the host with all others, so that the layers wait for nothing; one of many tokens is reduced at
once, since it would keep every layer's residual stream alive. How much may be written is told by
the state; what is lost for want of room is counted.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernel_server.engine.segments import ForwardState
from kernel_server.engine.variables import row_norms
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.location import Point, location_at
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
class _Piece:
    """A record: being made, and then on the host. A message is made of it when it is read."""

    plan: LogPlan
    point: Point
    forward: int
    num_layers: int
    #: position of the forward's first token, and the ids of all that it was fed
    start: int
    token_ids: Sequence[int]
    rows: tuple[int, ...]
    nbytes: int
    #: [tokens, channels], until the figures are there
    value: Tensor | None
    seq: int = 0
    #: float32 [tokens, 3]: norm, largest magnitude, NaN count
    figures: npt.NDArray[np.float32] | None = None
    kept: Tensor | None = None

    def record(self) -> LogRecord:
        """It as a message."""
        assert self.figures is not None
        return LogRecord(
            seq=self.seq,
            forward=self.forward,
            location=str(location_at(self.point, self.num_layers)),
            positions=tuple(self.start + row for row in self.rows),
            token_ids=tuple(self.token_ids[row] for row in self.rows),
            per_token=Array.from_numpy(self.figures[:, :2]),
            num_nan=Array.from_numpy(self.figures[:, 2].astype(np.int32)),
            value=None if self.kept is None else _array(self.kept),
        )


@dataclass(slots=True)
class _Group:
    """Pieces that were reduced together; the tensors may still be on their way to the host."""

    pieces: Sequence[_Piece]
    #: float32 [tokens, 3], and the values [tokens, channels] where they are noted
    figures: Tensor
    kept: Tensor | None

    def arrive(self) -> None:
        """Give each piece its part. Pinned memory is not for keeping: it is copied."""
        figures = self.figures.numpy().copy()
        kept = self.kept
        if kept is not None and kept.is_pinned():
            kept = kept.clone()
        begin = 0
        for piece in self.pieces:
            end = begin + len(piece.rows)
            piece.figures = figures[begin:end]
            piece.kept = None if kept is None else kept[begin:end]
            begin = end


@dataclass(slots=True)
class Log:
    """The records of one logpoint, the oldest first."""

    records: deque[_Piece] = field(default_factory=deque)
    last_seq: int = 0
    dropped: int = 0

    def add(self, piece: _Piece) -> None:
        """Number a record and keep it."""
        self.last_seq += 1
        piece.seq = self.last_seq
        self.records.append(piece)

    def read(self, request: ReadLog) -> LogReply:
        """Records after the one the caller has; those are freed when he says so."""
        while request.release and self.records and self.records[0].seq <= request.after:
            self.records.popleft()
        found: list[LogRecord] = []
        total = 0
        first = self.records[0].seq if self.records else 0
        for piece in itertools.islice(self.records, max(0, request.after + 1 - first), None):
            total += piece.nbytes
            if found and total > REPLY_BYTES:
                break
            found.append(piece.record())
        return LogReply(records=tuple(found), last_seq=self.last_seq, dropped=self.dropped)


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
        self._plans: dict[Point, list[LogPlan]] = {}
        for plan in plans:
            self._plans.setdefault(plan.point, []).append(plan)
        self._room = room_bytes
        self._rooms = {plan.breakpoint_id: plan.room_bytes for plan in plans}
        self._forward = forward
        self._num_layers = num_layers
        self._pieces: list[_Piece] = []
        #: those that are reduced already
        self._groups: list[_Group] = []
        self._held: dict[int, int] = {}
        self._dropped: dict[int, int] = {}
        self._refused: dict[int, int] = {}
        self._device: torch.device | None = None

    def plans(self, point: Point) -> Sequence[LogPlan]:
        """The logpoints at a point."""
        return self._plans.get(point, ())

    @property
    def points(self) -> Iterator[Point]:
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
        self._device = chunks[0].device
        full = False
        count = len(forward.token_ids)
        first_row = count - sum(chunk.shape[1] for chunk in chunks) if count > 1 else 0
        for plan in self.plans(forward.point):
            if plan.check is not None:
                found = held.get(plan.breakpoint_id, ())
                rows = tuple(position - forward.start for position in found)
            else:
                rows = tuple(range(count)) if plan.rows is None else plan.rows
            if first_row:
                rows = tuple(row for row in rows if row >= first_row)
            if not rows:
                continue
            self._held[plan.breakpoint_id] = self._held.get(plan.breakpoint_id, 0) + 1
            parts = _parts(rows, chunks[0], plan.what) if count > 1 else (rows,)
            for part in parts:
                full |= not self._take(plan, forward, part, chunks, first_row)
        return full

    def _take(
        self,
        plan: LogPlan,
        forward: ForwardState,
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
        alone = len(forward.token_ids) == 1
        piece = _Piece(
            plan,
            forward.point,
            self._forward,
            self._num_layers,
            forward.start,
            forward.token_ids,
            rows,
            nbytes,
            chunks[0][0] if alone else _gather(chunks, rows, first_row),
        )
        if len(rows) > WAITING_ROWS:
            self._groups.append(_reduced([piece]))
        self._room -= nbytes
        self._rooms[key] -= nbytes
        self._pieces.append(piece)
        return True

    def finish(self) -> tuple[LogResult, ...]:
        """Bring everything to the host and add it to the logs; what the stretch has noted."""
        try:
            self._arrive()
        except Exception:  # no memory, or a device that is gone: the stretch says so itself
            log.exception("records were lost")
            for piece in self._pieces:
                key = piece.plan.breakpoint_id
                self._dropped[key] = self._dropped.get(key, 0) + 1
            self._pieces = []
        sizes: dict[int, list[int]] = {}
        for piece in self._pieces:
            key = piece.plan.breakpoint_id
            self._logs.setdefault(key, Log()).add(piece)
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

    def _arrive(self) -> None:
        """Reduce what waits, one group for each width and dtype, and bring all to the host."""
        if not self._pieces:
            return
        waiting: dict[tuple[int, torch.dtype, LogContent], list[_Piece]] = {}
        for piece in self._pieces:
            if piece.value is not None:
                kind = (piece.value.shape[-1], piece.value.dtype, piece.plan.what)
                waiting.setdefault(kind, []).append(piece)
        self._groups += [_reduced(pieces) for pieces in waiting.values()]
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        for group in self._groups:
            group.arrive()
        self._groups = []


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


def _reduced(pieces: Sequence[_Piece]) -> _Group:
    """The figures of pieces of one width, dtype and content, on their way to the host."""
    values = [piece.value for piece in pieces if piece.value is not None]
    together = values[0] if len(values) == 1 else torch.cat(values)
    columns = [
        row_norms(together),
        together.abs().amax(-1).float(),
        together.isnan().sum(-1).float(),
    ]
    for piece in pieces:
        piece.value = None
    kept = None
    if pieces[0].plan.what == "tensor":
        kept = together.to("cpu", non_blocking=True)
        if together.device.type == "cpu":
            kept = kept.clone()  # by now, or it would keep every layer of a long prompt
    return _Group(pieces, torch.stack(columns, 1).to("cpu", non_blocking=True), kept)


def _array(tensor: Tensor) -> Array:
    """A tensor's own copy as raw bytes: a view would keep all that it was computed with."""
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw)
