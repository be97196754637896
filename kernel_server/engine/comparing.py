"""Figures of two residual streams side by side: how far they are apart, by place and token.

What the two scratch forks caught lies as tensors of the model's dtype, forward by forward. Rows are
matched by their position in the session, compared bit by bit, and measured in float64, one place at
a time. Rows whose bits are the same are the same: their cosine is 1 and nothing of them goes
through the model's head. Which forwards are run again is decided in `state.comparing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_server.engine.segments import Segments
from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.location import Point, location_at
from kernel_server.state.instructions import Compared, ReadTensors

#: Rows put through the head at a time, and most of each stream in one comparison: those of the
#: last tokens, since the engine does nothing else meanwhile.
LENS_ROWS, MAX_LENS_ROWS = 64, 4096


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows of one forward at one point. rows: which of the forward's, None for all."""

    first_token: int
    rows: tuple[int, ...] | None
    chunks: tuple[Tensor, ...]

    @classmethod
    def catch(cls, chunks: Sequence[Tensor], first: int, wanted: Sequence[int] | None) -> Stream:
        """Of a forward's tensor, chunks `[tokens, hidden]`, the rows of the wanted positions.

        wanted: absolute, ascending. Tensors of a forward are never written, so all rows are kept as
        they are, and some of them as copies.
        """
        if wanted is None:
            return cls(first, None, tuple(chunks))
        kept: list[int] = []
        picked: list[Tensor] = []
        start = first
        for chunk in chunks:
            mine = [position - start for position in wanted if 0 <= position - start < len(chunk)]
            if mine:
                picked.append(chunk[torch.tensor(mine, device=chunk.device)])
                kept += [start + row - first for row in mine]
            start += len(chunk)
        return cls(first, tuple(kept), tuple(picked))

    @property
    def positions(self) -> list[int]:
        count = sum(map(len, self.chunks))
        rows = range(count) if self.rows is None else self.rows
        return [self.first_token + row for row in rows]


#: What a fork caught: by forward and point.
Caught = Mapping[tuple[int, Point], Stream]


@dataclass(slots=True)
class _Place:
    """The two streams at one point, `[tokens, hidden]` each, and which column each token is."""

    columns: Tensor
    one: Tensor
    two: Tensor

    def changed(self) -> Tensor:
        """Elements of each row whose bits differ."""
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.one.element_size()]
        return (self.one.view(bits) != self.two.view(bits)).sum(1)


def compare(segments: Segments, errand: ReadTensors, first: Caught, second: Caught) -> m.DiffReply:
    """What the streams of two forks say of the two nodes they were run for."""
    compared, request = errand.compared, errand.message
    assert compared is not None
    num_places = segments.num_layers + 1
    streams = [_joined(caught, num_places, compared) for caught in (first, second)]
    positions = sorted(set(streams[0][0][0]) & set(streams[1][0][0]))
    places = [_place(one, two, positions) for one, two in zip(*streams, strict=True)]
    shape = num_places, len(positions)
    changed = torch.full(shape, -1, dtype=torch.int32)
    names = ("cosine", "difference", "norm", "other_norm", "kl")
    figures = {name: torch.full(shape, torch.nan) for name in names}
    for index, place in enumerate(places):
        if place is None:
            continue
        columns = place.columns
        differs = place.changed()
        changed[index, columns] = differs.int().cpu()
        for name, values in _distances(place, differs).items():
            figures[name][index, columns] = values.float().cpu()
    lens_tokens = None
    if request.lens:
        lens_tokens = _lens(segments, places, changed, figures["kl"])
    return m.DiffReply(
        locations=tuple(str(location_at(i, segments.num_layers)) for i in range(num_places)),
        positions=tuple(positions),
        changed=Array.from_numpy(changed.numpy()),
        token_ids=compared.token_ids[0],
        other_token_ids=compared.token_ids[1],
        num_prompt_tokens=compared.num_prompt_tokens[0],
        other_num_prompt_tokens=compared.num_prompt_tokens[1],
        first_token=errand.first_token,
        lens_tokens=lens_tokens,
        **{name: Array.from_numpy(values.numpy()) for name, values in figures.items()},
    )


def _joined(
    caught: Caught, num_places: int, compared: Compared
) -> list[tuple[list[int], Tensor | None]]:
    """By place, the positions that a fork has there, and their rows."""
    found = []
    for point in range(num_places):
        streams = [caught[key] for key in sorted(caught) if key[1] == point]
        positions = [p for stream in streams for p in stream.positions]
        chunks = [chunk for stream in streams for chunk in stream.chunks]
        rows = torch.cat(chunks) if chunks else None
        keep = [i for i, p in enumerate(positions) if p < compared.end_token]
        if rows is not None and len(keep) < len(positions):
            rows = rows[torch.tensor(keep, dtype=torch.long, device=rows.device)]
            positions = [positions[i] for i in keep]
        found.append((positions, rows))
    return found


def _place(
    one: tuple[list[int], Tensor | None],
    two: tuple[list[int], Tensor | None],
    positions: Sequence[int],
) -> _Place | None:
    """The rows that both have at a place; None where they have none."""
    (where, rows), (there, others) = one, two
    if rows is None or others is None:
        return None
    at, other_at = ({p: i for i, p in enumerate(found)} for found in (where, there))
    columns = [c for c, p in enumerate(positions) if p in at and p in other_at]
    if not columns:
        return None

    def picked(source: Tensor, index: Mapping[int, int]) -> Tensor:
        chosen = [index[positions[column]] for column in columns]
        if chosen == list(range(len(source))):
            return source
        return source[torch.tensor(chosen, device=source.device)]

    return _Place(torch.tensor(columns), picked(rows, at), picked(others, other_at))


def _distances(place: _Place, differs: Tensor) -> dict[str, Tensor]:
    """Cosine, L2 norm of the difference and both norms of each row, in float64."""
    one, two = place.one.double(), place.two.double()
    norms = [torch.linalg.vector_norm(rows, dim=1) for rows in (one, two)]
    cosine = (one * two).sum(1) / (norms[0] * norms[1])
    same = differs == 0
    difference = torch.linalg.vector_norm(two - one, dim=1)
    return {
        "cosine": torch.where(same, 1.0, cosine.clamp(-1.0, 1.0)),
        # also where both hold the same infinity
        "difference": torch.where(same, 0.0, difference),
        "norm": norms[0],
        "other_norm": norms[1],
    }


def _lens(
    segments: Segments, places: Sequence[_Place | None], changed: Tensor, kl: Tensor
) -> int | None:
    """Fill in the divergence of the second's lens from the first's; 0 where no bit differs.

    Returns of how many tokens, the last ones, if the rows that differ are too many.
    """
    kl[changed == 0] = 0.0
    rows_from_here = (changed > 0).sum(0).flip(0).cumsum(0).flip(0)
    first = int((rows_from_here > MAX_LENS_ROWS).sum())
    for index, place in enumerate(places):
        if place is None:
            continue
        chosen = (changed[index, place.columns] > 0) & (place.columns >= first)
        rows = chosen.nonzero()[:, 0]
        for block in rows.split(LENS_ROWS):
            if not len(block):
                continue
            on_device = block.to(place.one.device)
            one, two = (
                segments.lens(stream[on_device]).float().log_softmax(-1)
                for stream in (place.one, place.two)
            )
            # a token banned in both has no part in it, and 0 * -inf would be nan
            terms = two.exp() * (two.clamp_min(-1e30) - one.clamp_min(-1e30))
            kl[index, place.columns[block]] = terms.sum(-1).clamp_min(0.0).cpu()
    return kl.shape[1] - first if first else None
