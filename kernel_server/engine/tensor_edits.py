"""What an edit does to a tensor: float32 arithmetic, one rounding, and a count of what changed.

Tensors at a stop are immutable, so an edit answers new chunks for those it touches and the same
objects for the others. Which rows and channels an edit means was decided when it was planned; when
it applies is decided by the state. Formulas, element by element, with x and the result in float32::

    scale  x * factor        add  x + (alpha * value)        set  value        zero  0

An edit that is the identity on an element (factor 1, nothing added, the same value set) leaves its
bits alone, minus zero and the payload of a NaN included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    then no edit of the call has been applied.
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
    width = chunks[0].shape[-1]
    num_rows = sum(chunk.shape[1] for chunk in chunks)
    channels = _channel_index(plan, width, chunks[0])
    rows = _chosen_rows(plan, first_row, num_rows)
    change = _Change.of(plan, chunks[0], len(rows) if plan.rows is None else len(plan.rows), width)
    made = list(chunks)
    figures = []
    taken, start = 0, first_row
    for index, chunk in enumerate(chunks):
        end = start + chunk.shape[1]
        # `order` is the row of the value an element takes, `row` the row of the tensor
        here = [(order, row - start) for order, row in rows if start <= row < end]
        start = end
        if not here:
            continue
        taken += len(here)
        whole_rows = len(here) == chunk.shape[1]
        row_index = None if whole_rows else _index([row for _, row in here], chunk)
        before = _pick(chunk[0], row_index, channels)
        after = change.applied(before, [order for order, _ in here])
        figures.append(_figures(before, after))
        made[index] = _put(chunk, row_index, channels, after)
    changed, norm_before, norm_after = _totals(figures, plan, chunks[0].dtype)
    result = EditResult(
        edit_id=plan.edit_id,
        positions=tuple(first_token + row for _, row in rows),
        elements_changed=changed,
        norm_before=norm_before,
        norm_after=norm_after,
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


# --- what is done ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    """One edit ready to be computed: its kind and its value on the device, in float32."""

    kind: str
    factor: float
    #: `[]`, `[channels]` or `[tokens, channels]`; for `add` times alpha already
    value: Tensor | None
    compute: torch.dtype

    @classmethod
    def of(cls, plan: EditPlan, like: Tensor, num_rows: int, width: int) -> _Change:
        spec = plan.spec
        # a float64 model keeps its bits only in float64
        compute = torch.float64 if like.dtype == torch.float64 else torch.float32
        if spec.kind == "scale":
            return cls("scale", _number(plan, "factor", spec.factor, compute), None, compute)
        if spec.kind == "zero":
            return cls("zero", 0.0, None, compute)
        num_channels = width if plan.channels is None else len(plan.channels)
        value = _value(plan, num_rows, num_channels, compute).to(like.device)
        if spec.kind == "add":
            # its own rounding: fused with the addition it would differ between devices
            value = value * _number(plan, "alpha", spec.alpha, compute)
        return cls(spec.kind, 1.0, value, compute)

    def applied(self, before: Tensor, orders: list[int]) -> Tensor:
        """The new value of `before` [tokens, channels], whose value rows are `orders`."""
        if self.kind == "zero":
            return torch.zeros_like(before)
        if self.kind == "scale":
            if self.factor == 1.0:
                return before
            made = (before.to(self.compute) * self.factor).to(before.dtype)
            return torch.where(before.isnan(), before, made)
        value = self._rows(orders)
        if self.kind == "set":
            return value.to(before.dtype).expand(before.shape).contiguous()
        made = (before.to(self.compute) + value).to(before.dtype)
        return torch.where(before.isnan() | (value == 0), before, made)

    def _rows(self, orders: list[int]) -> Tensor:
        assert self.value is not None
        if self.value.dim() < 2 or orders == list(range(self.value.shape[0])):
            return self.value
        return self.value.index_select(0, _index(orders, self.value))


def _number(plan: EditPlan, name: str, number: float | None, compute: torch.dtype) -> float:
    largest = torch.finfo(compute).max
    if number is None or not -largest <= number <= largest:
        raise BadEdit(
            f"edit {plan.edit_id}: {name} is {number}; choose a number between {-largest:.4g} and"
            f" {largest:.4g}"
        )
    return number


def _value(plan: EditPlan, num_rows: int, num_channels: int, compute: torch.dtype) -> Tensor:
    """The edit's value, checked against what it is for."""
    array = plan.spec.value
    if array is None:
        raise BadEdit(f"edit {plan.edit_id}: {plan.spec.kind} needs a value")
    allowed = ((), (num_channels,), (num_rows, num_channels))
    if array.shape not in allowed:
        raise BadEdit(
            f"edit {plan.edit_id}: the value has shape {list(array.shape)}; give one number, a"
            f" vector [{num_channels}] or a matrix [{num_rows}, {num_channels}]"
        )
    dtype = np.float64 if compute == torch.float64 else np.float32
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        # a copy: the bytes that came are read-only
        numbers = np.array(array.numpy(), dtype=dtype)
    num_bad = int(numbers.size - np.isfinite(numbers).sum())
    if num_bad:
        raise BadEdit(
            f"edit {plan.edit_id}: {num_bad} of {numbers.size} elements of the value are NaN or"
            " infinite in float32; give finite ones"
        )
    return torch.from_numpy(numbers)


# --- what came of it ------------------------------------------------------------------------------


def _figures(before: Tensor, after: Tensor) -> Tensor:
    """Elements changed, those of them not finite now, and both norms, float64 [4]."""
    bits = _BITS[before.element_size()]
    changed = before.contiguous().view(bits) != after.contiguous().view(bits)
    broken = changed & ~after.isfinite()
    figures = (changed.sum(), broken.sum(), _norm(before), _norm(after))
    return torch.stack([figure.to(torch.float64) for figure in figures])


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values.to(torch.float32))


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
            f" largest value is {largest:.4g}; use a smaller {_knob(plan)}",
            num_overflow=broken,
        )
    changed = int(sum(part[0] for part in parts))
    norm_before, norm_after = (math.sqrt(sum(part[i] ** 2 for part in parts)) for i in (2, 3))
    return changed, norm_before, norm_after


def _knob(plan: EditPlan) -> str:
    return {"scale": "factor", "add": "alpha or value"}.get(plan.spec.kind, "value")
