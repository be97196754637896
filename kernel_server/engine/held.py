"""What the engine keeps of one session besides its pages: tensors only, no decisions.

All tensors are immutable by convention (an edit makes new ones), so a fork shares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernel_server.engine.comparing import Stream
from kernel_server.engine.lens_values import LensValues
from kernel_server.engine.logs import Log
from kernel_server.engine.segments import ForwardState
from kernel_server.models.recording import tensors_in
from kernel_server.protocol.errors import NotStopped
from kernel_server.protocol.location import Point, is_inner

#: Up to this many tokens a forward's layer outputs are kept and reduced once, at its end; three
#: small operations per layer would cost 5 % of a decode.
KEEP_ROWS = 16


@dataclass(frozen=True, slots=True)
class Captured:
    """Figures of consecutive points of one forward."""

    first_token: int
    #: float32 [points, tokens]
    norm: Tensor
    largest: Tensor
    #: int64 [points]
    num_nan: Tensor


def reduce_points(values: Tensor, first_token: int) -> Captured:
    """Figures of `values` [points, tokens, hidden]."""
    norm = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
    # not the infinity norm: that takes five times as long on a CPU
    largest = values.abs().amax(-1).float()
    return Captured(first_token, norm, largest, _count_nan(values, norm))


def _count_nan(values: Tensor, norm: Tensor) -> Tensor:
    """NaN per point, int64 [points].

    A norm is NaN only if an element is, and looking at the norms first saves 2 % of a prefill; on a
    GPU that look would wait for the device, which costs more than counting.
    """
    if values.device.type == "cpu" and not bool(norm.isnan().any()):
        return torch.zeros(values.shape[0], dtype=torch.int64)
    return values.isnan().sum((1, 2))


def join_points(parts: list[Captured]) -> Captured:
    return Captured(
        parts[0].first_token,
        torch.cat([p.norm for p in parts]),
        torch.cat([p.largest for p in parts]),
        torch.cat([p.num_nan for p in parts]),
    )


@dataclass(slots=True)
class SessionTensors:
    """The tensors of one session."""

    forward: ForwardState | None = None
    #: the value at `forward.point` before this stop's edits, None when there were none
    _unedited: list[Tensor] | None = None
    #: residual per point reached in this forward, chunks [1, tokens, hidden], while it is short
    _kept: list[list[Tensor]] = field(default_factory=list)
    #: figures per point of a long forward, reduced as it goes
    _reduced: list[Captured] = field(default_factory=list)
    #: of a long forward, the last token's residual per point, [hidden]
    _last_rows: list[Tensor] = field(default_factory=list)
    #: figures of finished forwards, oldest first
    history: list[Captured] = field(default_factory=list)
    #: of the last finished forward's last token, [vocabulary]
    last_logits: Tensor | None = None
    #: breakpoint id -> what the lens read at its last location in this forward
    lens_before: dict[int, LensValues] = field(default_factory=dict)
    #: records by logpoint, in host memory
    logs: dict[int, Log] = field(default_factory=dict)
    #: of a scratch fork: by point, rows `[tokens, elements]` by chunk, or their summary
    caught: dict[Point, Any] = field(default_factory=dict)
    #: of a scratch fork that is compared: by forward and point
    streams: dict[tuple[int, Point], Stream] = field(default_factory=dict)
    #: what was held at stops that the session has left
    stops: dict[int, SessionTensors] = field(default_factory=dict)
    #: of a stop that was left: how many forwards were finished; the figures of those are the
    #: session's, or its branch's
    num_finished: int = 0

    def standing(self) -> ForwardState:
        """The forward the session stands in, or `NotStopped`."""
        if self.forward is None:
            raise NotStopped("the session stands in no forward: continue it to a stop first")
        return self.forward

    def begin(self, forward: ForwardState) -> None:
        self.forward = forward
        self.lens_before = {}
        self._unedited = None
        self._kept, self._reduced, self._last_rows = [], [], []

    def edited(self, point: float, value: list[Tensor]) -> None:
        """The value at the stop was replaced: what the lens read there is out of date."""
        for key, found in self.lens_before.items():
            if found.point == point:
                self.lens_before[key] = found.edited(value)

    def arrive(self) -> None:
        """A new point was reached: edits made at the last one are part of the past."""
        self._unedited = None

    def unedited(self, value: list[Tensor]) -> list[Tensor]:
        """The value at the stop as if no edit had been made there: `value`, when it is the first
        time this is asked at this point."""
        if self._unedited is None:
            self._unedited = value
        return self._unedited

    def note_value(self, forward: ForwardState, num_layers: int) -> None:
        """Capture the residual at the point reached; at the same point again, replace it."""
        point = forward.point
        if point.__class__ is not int:
            if is_inner(point):
                return
            point = int(point)
        if point > num_layers:
            return
        chunks = forward.residual
        if len(forward.token_ids) <= KEEP_ROWS:
            # references only: a decode pays for its figures once, at its end
            self._kept[point:] = [chunks]
            return
        parts = [reduce_points(chunk, forward.start) for chunk in chunks]
        self._reduced[point:] = [
            Captured(
                forward.start,
                torch.cat([p.norm for p in parts], 1),
                torch.cat([p.largest for p in parts], 1),
                torch.stack([p.num_nan for p in parts]).sum(0),
            )
        ]
        # a copy: a view would keep every layer's residual of a long prompt alive
        self._last_rows[point:] = [chunks[-1][0, -1].clone()]

    def last_rows(self) -> list[Tensor]:
        """Residual of the last token fed, [hidden], at each point reached in this forward."""
        return [chunks[-1][0, -1] for chunks in self._kept] if self._kept else self._last_rows

    def captured(self) -> Captured | None:
        """Figures of the points reached in this forward."""
        if self._kept:
            rows = [
                chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1) for chunks in self._kept
            ]
            return reduce_points(torch.cat(rows), self.standing().start)
        return join_points(self._reduced) if self._reduced else None

    def finish(self, logits: Tensor) -> None:
        """The forward's token was drawn."""
        captured = self.captured()
        if captured is not None:
            self.history = [*self.history, captured]
        self.last_logits = logits
        self.forward = None
        self.lens_before = {}
        self._unedited = None
        self._kept, self._reduced, self._last_rows = [], [], []

    def tensors(self) -> Iterator[Tensor]:
        """All of them but those of kept stops, some twice. Other threads may ask."""
        if (forward := self.forward) is not None:
            yield from forward.tensors()
            if (recording := forward.recording) is not None:
                yield from recording.tensors()
        yield from self._unedited or ()
        yield from (chunk for chunks in list(self._kept) for chunk in chunks)
        for captured in (*list(self._reduced), *self.history):
            yield from (captured.norm, captured.largest, captured.num_nan)
        yield from list(self._last_rows)
        if self.last_logits is not None:
            yield self.last_logits
        for read in list(self.lens_before.values()):
            yield from read.chunks
        yield from tensors_in(list(self.caught.values()))
        for stream in list(self.streams.values()):
            yield from stream.chunks

    def keep(self, node: int) -> None:
        """Keep what is held at this stop, but for what is held elsewhere or recorded again."""
        kept = self.fork()
        kept.num_finished, kept.history = len(self.history), []
        if kept.forward is not None:
            kept.forward.drop_cache()
        self.stops[node] = kept

    def at_stop(self, node: int, source: SessionTensors) -> SessionTensors:
        """What was held at a stop, with the figures of the forwards before it as `source` has them;
        this session's logs and kept stops go along."""
        kept = self.stops[node]
        found = kept.fork()
        found.history = source.history[: kept.num_finished]
        found.logs, found.stops = self.logs, self.stops
        return found

    def at_start(self, forward: int, source: SessionTensors) -> SessionTensors:
        """What is left at the start of a forward: figures of those before it, as `source` has
        them; the logits before it are not kept."""
        return SessionTensors(history=source.history[:forward], logs=self.logs, stops=self.stops)

    def fork(self) -> SessionTensors:
        """The same tensors for another session; its logs and kept stops are empty."""
        return SessionTensors(
            forward=self.forward.fork() if self.forward is not None else None,
            _unedited=self._unedited,
            _kept=list(self._kept),
            _reduced=list(self._reduced),
            _last_rows=list(self._last_rows),
            history=self.history,
            last_logits=self.last_logits,
            lens_before=dict(self.lens_before),
        )
