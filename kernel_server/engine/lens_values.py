"""The logit lens where a forward stands, for the conditions there: top token, entropy,
probabilities.

Rows are put through the head when somebody asks for them, many at a time, and once. Which rows are
asked for, and what follows, is decided by the conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_server.engine.segments import ForwardState, Segments
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.location import final_norm_point, logits_point

#: Rows put through the head at a time: bounds the logits held at once.
LENS_ROWS = 64
#: In place of a top token where a row's logits hold a NaN.
NO_TOKEN = -1

#: Logits [rows, vocabulary] of rows [rows, width] of the tensor at a point.
Head = Callable[[Tensor], Tensor]
#: function and text -> the tokens whose probabilities are added up
Asked = Mapping[tuple[str, str], Sequence[int]]


class LensValues:
    """What the lens reads at one point of one forward, row by row.

    point: where it is. chunks: the tensor there, `[1, tokens, width]` each. first_row: the row of
    the forward that is the first here (the logits hold the last row only).
    """

    def __init__(
        self, point: float, chunks: Sequence[Tensor], head: Head, *, first_row: int = 0
    ) -> None:
        self.point = point
        self._chunks = chunks
        self._head = head
        self._first_row = first_row
        self._found: dict[int, dict[Any, Any]] = {}
        self._tops: dict[int, int] = {}

    @property
    def chunks(self) -> Sequence[Tensor]:
        """The tensor it reads."""
        return self._chunks

    def edited(self, chunks: Sequence[Tensor]) -> LensValues:
        """The same place with other values; nothing of them is computed yet."""
        return LensValues(self.point, chunks, self._head, first_row=self._first_row)

    def of(self, row: int) -> dict[Any, Any]:
        """Entropy and probabilities of a row that was loaded."""
        return self._found[row]

    def top(self, row: int) -> int:
        """Token id that the lens reads first in a row; it is computed if nobody has asked yet."""
        if row not in self._tops:
            self.load_tops([row])
        return self._tops[row]

    def has(self, row: int) -> bool:
        """Whether the tensor holds this row of the forward."""
        rows = sum(chunk.shape[-2] for chunk in self._chunks)
        return 0 <= row - self._first_row < rows

    def load(self, rows: Iterable[int], asked: Asked) -> None:
        """Compute all figures of these rows of the forward."""
        missing = [row for row in rows if row not in self._found]
        for begin in range(0, len(missing), LENS_ROWS):
            block = missing[begin : begin + LENS_ROWS]
            figures = self._figures(self._logits(block), asked)
            for row, (top, entropy, *probabilities) in zip(block, figures, strict=True):
                self._tops[row] = int(top)
                self._found[row] = dict(zip(asked, probabilities, strict=True))
                self._found[row]["entropy"] = entropy

    def load_tops(self, rows: Iterable[int]) -> None:
        """Compute the top token alone of these rows of the forward."""
        missing = [row for row in rows if row not in self._tops]
        for begin in range(0, len(missing), LENS_ROWS):
            block = missing[begin : begin + LENS_ROWS]
            self._tops.update(zip(block, _tops(self._logits(block)).tolist(), strict=True))

    def _logits(self, rows: Sequence[int]) -> Tensor:
        return self._head(self._rows(rows)).float()

    def _rows(self, rows: Sequence[int]) -> Tensor:
        """Rows of the forward, `[rows, width]`."""
        if len(self._chunks) == 1 and len(rows) == self._chunks[0].shape[-2]:
            return self._chunks[0].flatten(0, -2)
        picked = []
        for row in rows:
            left = row - self._first_row
            for chunk in self._chunks:
                if left < chunk.shape[-2]:
                    picked.append(chunk.flatten(0, -2)[left])
                    break
                left -= chunk.shape[-2]
        return torch.stack(picked)

    def _figures(self, logits: Tensor, asked: Asked) -> list[list[float]]:
        """Per row: top token, entropy in nats, and the sums of probabilities asked for."""
        log_probabilities = logits.log_softmax(-1)
        probabilities = log_probabilities.exp()
        # 0 * -inf is nan: tokens the model excludes add nothing to the entropy
        entropy = -(probabilities * log_probabilities.clamp_min(-1e30)).sum(-1)
        columns = [_tops(logits), entropy]
        columns += [probabilities[:, list(ids)].sum(-1) for ids in asked.values()]
        # brought over together; a double holds every token id
        found: list[list[float]] = torch.stack([c.double() for c in columns], 1).tolist()
        return found


class Lens:
    """The lens where a forward stands, and what it read at the points before in this forward.

    remembered: breakpoint id -> what the lens read at its last location in this forward.
    """

    def __init__(self, segments: Segments, remembered: dict[int, LensValues]) -> None:
        self._segments = segments
        self._remembered = remembered
        self._forward: ForwardState | None = None
        self._here: LensValues | None = None
        self._vectors: dict[int, tuple[Array, Tensor]] = {}

    def stand(self, forward: ForwardState) -> None:
        """The forward has come to another point."""
        self._forward, self._here = forward, None

    def here(self) -> LensValues:
        """What the lens reads at the point."""
        if self._here is None:
            assert self._forward is not None
            forward, segments = self._forward, self._segments
            chunks = segments.value(forward)
            missing = len(forward.token_ids) - sum(chunk.shape[1] for chunk in chunks)
            self._here = LensValues(
                forward.point, chunks, head_at(segments, forward.point), first_row=missing
            )
        return self._here

    def before(self, breakpoint_id: int) -> LensValues | None:
        """What it read at the breakpoint's location before; None at the first."""
        return self._remembered.get(breakpoint_id)

    def remember(self, breakpoint_id: int) -> None:
        """This point is the one before at the breakpoint's next location."""
        self._remembered[breakpoint_id] = self.here()

    def vector(self, value: Array) -> Tensor:
        """A named vector, float32 [width], where the tensors are."""
        found = self._vectors.get(id(value))
        if found is None:
            assert self._forward is not None
            device = self._segments.value(self._forward)[0].device
            numbers = np.array(value.numpy(), dtype=np.float32)
            # with the array, whose id is good while it lives
            found = self._vectors[id(value)] = (value, torch.from_numpy(numbers).to(device))
        return found[1]


def head_at(segments: Segments, point: float) -> Head:
    """The way from rows of the tensor at a point to logits."""
    if point == logits_point(segments.num_layers):
        return lambda rows: rows
    normed = point == final_norm_point(segments.num_layers)
    return lambda rows: segments.lens(rows, normed=normed)


def _tops(logits: Tensor) -> Tensor:
    """The largest logit's token of each row, the lowest id among equals; `NO_TOKEN` beside NaN."""
    largest = logits.max(-1)
    # a NaN counts as the largest of all
    return largest.indices.masked_fill(largest.values.isnan(), NO_TOKEN)
