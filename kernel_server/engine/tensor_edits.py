"""Puts edits into a tensor given in chunks: what is chosen, what is put back, what came of it.

Tensors at a stop are immutable, so an edit answers new chunks for those it touches and the same
objects for the others. What a kind computes is said in `edit_kinds`; which rows and channels an
edit means was decided when it was planned; when it applies is decided by the state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernel_server.engine.edit_kinds import Change, Chosen, advice, change_of
from kernel_server.protocol.errors import BadEdit
from kernel_server.state.events import EditResult
from kernel_server.state.instructions import EditPlan

#: integers of the same size, to compare bits and not values
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def apply_edits(
    chunks: Sequence[Tensor],
    plans: Sequence[EditPlan],
    first_token: int,
    *,
    first_row: int = 0,
) -> tuple[list[Tensor], list[EditResult]]:
    """Apply edits in order to a tensor given in chunks `[1, tokens, width]`.

    first_token: absolute position of the forward's first token, row 0. first_row: the row the
    first chunk begins with, for a tensor that holds the last rows only (logits). An edit of rows
    that are not there changes nothing and its result lists no position.

    Raises `BadEdit` when an edit does not fit the tensor or makes a finite element infinite or NaN;
    then no edit of the call has been applied. A swap may move such elements, and what is banned at
    the logits becomes minus infinity on purpose.
    """
    made = list(chunks)
    results = []
    for plan in plans:
        made, result = _apply(made, plan, first_token, first_row)
        results.append(result)
    return made, results


def _apply(
    chunks: list[Tensor], plan: EditPlan, first_token: int, first_row: int
) -> tuple[list[Tensor], EditResult]:
    like, width = chunks[0], chunks[0].shape[-1]
    num_rows = sum(chunk.shape[1] for chunk in chunks)
    channels = _channel_index(plan, width, like)
    rows = _chosen_rows(plan, first_row, num_rows)
    places = list(_places(chunks, rows, first_row))

    def parts() -> Iterator[tuple[list[int], Tensor]]:
        for index, orders, row_index in places:
            yield orders, _pick(chunks[index][0], row_index, channels)

    change = change_of(
        Chosen(
            plan,
            like.dtype,
            like.device,
            num_rows=len(rows) if plan.rows is None else len(plan.rows),
            num_channels=width if plan.channels is None else len(plan.channels),
            parts=parts,
        )
    )
    made = list(chunks)
    figures = []
    for (index, orders, row_index), (_, before) in zip(places, parts(), strict=True):
        after = change.made(before, orders)
        figures.append(_figures(before, after, change))
        made[index] = _put(chunks[index], row_index, channels, after)
    changed, norm_before, norm_after = _totals(figures, plan, chunks[0].dtype)
    result = EditResult(
        edit_id=plan.edit_id,
        positions=tuple(first_token + row for _, row in rows),
        elements_changed=changed,
        norm_before=norm_before,
        norm_after=norm_after,
        note=_squares(norm_after) if change.note is None else change.note,
    )
    return (made if changed else chunks), result


# --- what is chosen -------------------------------------------------------------------------------


def _chosen_rows(plan: EditPlan, first_row: int, num_rows: int) -> list[tuple[int, int]]:
    """(place in the plan, row of the forward) of the rows that lie in the tensor, ascending."""
    if plan.rows is None:
        return [(order, first_row + order) for order in range(num_rows)]
    if len(set(plan.rows)) != len(plan.rows):
        raise BadEdit(f"edit {plan.edit_id}: a token is chosen twice; list each of them once")
    if plan.rows and not 0 <= min(plan.rows) <= max(plan.rows) < first_row + num_rows:
        raise BadEdit(
            f"edit {plan.edit_id}: rows {min(plan.rows)} to {max(plan.rows)} are chosen, and this"
            f" forward has rows 0 to {first_row + num_rows - 1}"
        )
    chosen = [(order, row) for order, row in enumerate(plan.rows) if row >= first_row]
    return sorted(chosen, key=lambda pair: pair[1])


def _places(
    chunks: Sequence[Tensor], rows: Sequence[tuple[int, int]], first_row: int
) -> Iterator[tuple[int, list[int], Tensor | None]]:
    """Chunks that hold chosen rows: (number, places of these rows in the plan, rows of the chunk,
    None for all of them)."""
    start = first_row
    for number, chunk in enumerate(chunks):
        end = start + chunk.shape[1]
        here = [(order, row - start) for order, row in rows if start <= row < end]
        start = end
        if here:
            whole = len(here) == chunk.shape[1]
            index = None if whole else _index([row for _, row in here], chunk)
            yield number, [order for order, _ in here], index


def _channel_index(plan: EditPlan, width: int, like: Tensor) -> Tensor | None:
    if plan.channels is None:
        return None
    if len(set(plan.channels)) != len(plan.channels):
        raise BadEdit(f"edit {plan.edit_id}: a channel is chosen twice; list each of them once")
    if plan.channels and not 0 <= min(plan.channels) <= max(plan.channels) < width:
        raise BadEdit(
            f"edit {plan.edit_id}: channels {min(plan.channels)} to {max(plan.channels)} are"
            f" chosen, and the tensor has channels 0 to {width - 1}"
        )
    return _index(plan.channels, like)


def _index(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)


def _pick(values: Tensor, rows: Tensor | None, channels: Tensor | None) -> Tensor:
    """The chosen part of `values` [tokens, width]."""
    if rows is not None:
        values = values.index_select(0, rows)
    return values if channels is None else values.index_select(1, channels)


def _put(chunk: Tensor, rows: Tensor | None, channels: Tensor | None, part: Tensor) -> Tensor:
    """A new chunk with `part` in the chosen place."""
    if rows is None and channels is None:
        return part[None]
    made = chunk.clone()
    if channels is None:
        made[0].index_copy_(0, rows, part)  # type: ignore[arg-type]  # one of the two is there
    elif rows is None:
        made[0].index_copy_(1, channels, part)
    else:
        made[0][rows[:, None], channels[None, :]] = part
    return made


# --- what came of it ------------------------------------------------------------------------------


def _figures(before: Tensor, after: Tensor, change: Change) -> Tensor:
    """Elements changed, those of them not finite now, and both norms, float64 [4]."""
    bits = _BITS[before.element_size()]
    changed = before.contiguous().view(bits) != after.contiguous().view(bits)
    broken = changed & (after.isnan() if change.bans else ~after.isfinite())
    if change.moves:
        broken = torch.zeros_like(broken)
    if change.bans:
        before, after = (torch.where(part.isfinite(), part, 0) for part in (before, after))
    figures = (changed.sum(), broken.sum(), _norm(before), _norm(after))
    return torch.stack([figure.to(torch.float64) for figure in figures])


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values.to(torch.float32))


def _squares(norm: float) -> str | None:
    """What norm layers, which square in float32, will make of values as large as these."""
    if norm**2 <= torch.finfo(torch.float32).max:
        return None
    return "so large that the square overflows float32: a norm layer makes 0 of such a token"


def _totals(figures: list[Tensor], plan: EditPlan, dtype: torch.dtype) -> tuple[int, float, float]:
    """The figures of all chunks together; one wait for the device."""
    if not figures:
        return 0, 0.0, 0.0
    parts = torch.stack(figures).tolist()
    broken = int(sum(part[1] for part in parts))
    if broken:
        largest = torch.finfo(dtype).max
        name = str(dtype).removeprefix("torch.")
        raise BadEdit(
            f"edit {plan.edit_id}: {broken} elements would become infinite or NaN in {name}, whose"
            f" largest value is {largest:.4g}; {advice(plan.spec.kind)}",
            num_overflow=broken,
        )
    changed = int(sum(part[0] for part in parts))
    norm_before, norm_after = (math.sqrt(sum(part[i] ** 2 for part in parts)) for i in (2, 3))
    return changed, norm_before, norm_after
