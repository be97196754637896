"""What each kind of edit computes of the elements chosen; `tensor_edits` chooses and puts back.

Element by element, with x and the result in float32, rounded once to the tensor's dtype::

    scale  x * factor    add  x + (alpha * value)    set  value    zero  0
    clamp  minimum where x is less, maximum where x is more
    project_out  x - sum over i of (x . u_i) u_i, the u_i an orthonormal basis of the directions
    mean   the mean of the channel over the tokens chosen
    swap   the bits of the other of the two tokens chosen

Sums over many elements (a product x . u, a mean) are accumulated in float64 and then rounded to
float32. An element on which the edit is the identity keeps its bits, minus zero and the payload of
a NaN included.

At the logits, of the next token::

    ban      minus infinity for each token named
    force    minus infinity for every other token; its own logit stays, or is 0 where not finite
    replace  a, b: the larger of both logits for b, minus infinity for a

Every float dtype holds minus infinity, and the sampler gives such a token the weight 0: it is drawn
at no temperature and no top-p. Raising a logit instead would leave the others a chance at a high
temperature. Norms reported of these three are over finite logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernel_server.protocol.errors import BadEdit
from kernel_server.state.instructions import EditPlan

#: A direction of which less than this share is left beside those before it adds nothing to them:
#: float32 numbers cannot tell it from a combination of theirs.
_DEPENDENT = 1e-6


@dataclass(frozen=True, slots=True)
class Change:
    """One edit ready to be computed."""

    #: (elements [tokens, channels], the place of each token in the plan) -> their new value
    made: Callable[[Tensor, list[int]], Tensor]
    #: makes minus infinities on purpose: they are no overflow and no part of a norm
    bans: bool = False
    #: moves what is there, NaN and infinities too: nothing overflows
    moves: bool = False
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one edit is about to change, as a kind needs to know it."""

    plan: EditPlan
    dtype: torch.dtype
    device: torch.device
    #: tokens that the plan names, and elements of each
    num_rows: int
    num_channels: int
    #: the parts of the tensor that are chosen, chunk by chunk: (place in the plan, elements)
    parts: Callable[[], Iterator[tuple[list[int], Tensor]]]

    @property
    def compute(self) -> torch.dtype:
        """A float64 model keeps its bits only in float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def bad(self, text: str, **details: int) -> BadEdit:
        return BadEdit(f"edit {self.plan.edit_id}: {text}", **details)

    def number(self, name: str) -> float:
        """A number of the edit that the arithmetic can hold."""
        number: float | None = getattr(self.plan.spec, name)
        largest = torch.finfo(self.compute).max
        if number is None or not -largest <= number <= largest:
            raise self.bad(
                f"{name} is {number}; choose a number between {-largest:.4g} and {largest:.4g}"
            )
        return number

    def numbers(self) -> npt.NDArray[Any]:
        """The edit's value, finite in the dtype of the arithmetic."""
        array = self.plan.spec.value
        if array is None:
            raise self.bad(f"{self.plan.spec.kind} needs a value")
        dtype = np.float64 if self.compute == torch.float64 else np.float32
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            # a copy: the bytes that came are read-only
            numbers = np.array(array.numpy(), dtype=dtype)
        if bad := int(numbers.size - np.isfinite(numbers).sum()):
            raise self.bad(
                f"{bad} of {numbers.size} elements of the value are NaN or infinite in float32;"
                " give finite ones"
            )
        return numbers


def change_of(chosen: Chosen) -> Change:
    """The change an edit makes to the elements chosen, or `BadEdit` when it does not fit them."""
    return _KINDS[chosen.plan.spec.kind](chosen)


def advice(kind: str) -> str:
    """What to do when a kind would make finite elements infinite or NaN."""
    return {
        "scale": "use a smaller factor",
        "add": "use a smaller alpha or value",
        "clamp": "use smaller bounds",
        "mean": "choose tokens without NaN and infinities",
        "project_out": "choose tokens without NaN and infinities",
        "replace": "look where the NaN of these logits comes from",
    }.get(kind, "use a smaller value")


# --- element by element -----------------------------------------------------------------------


def _scale(chosen: Chosen) -> Change:
    factor, compute = chosen.number("factor"), chosen.compute

    def made(before: Tensor, places: list[int]) -> Tensor:
        if factor == 1.0:
            return before
        scaled = (before.to(compute) * factor).to(before.dtype)
        return torch.where(before.isnan(), before, scaled)

    return Change(made)


def _add(chosen: Chosen) -> Change:
    compute = chosen.compute
    # its own rounding: fused with the addition it would differ between devices
    value = _rowwise(chosen) * chosen.number("alpha")

    def made(before: Tensor, places: list[int]) -> Tensor:
        term = _of_places(value, places)
        added = (before.to(compute) + term).to(before.dtype)
        return torch.where(before.isnan() | (term == 0), before, added)

    return Change(made)


def _set(chosen: Chosen) -> Change:
    value = _rowwise(chosen)

    def made(before: Tensor, places: list[int]) -> Tensor:
        return _of_places(value, places).to(before.dtype).expand(before.shape).contiguous()

    return Change(made)


def _zero(chosen: Chosen) -> Change:
    return Change(lambda before, places: torch.zeros_like(before))


def _clamp(chosen: Chosen) -> Change:
    spec, compute = chosen.plan.spec, chosen.compute
    least = None if spec.minimum is None else chosen.number("minimum")
    most = None if spec.maximum is None else chosen.number("maximum")

    def made(before: Tensor, places: list[int]) -> Tensor:
        wide, clamped = before.to(compute), before
        for bound, outside in ((least, torch.lt), (most, torch.gt)):
            if bound is not None:
                # filled in float32, then rounded to the dtype
                edge = torch.full_like(wide, bound).to(before.dtype)
                clamped = torch.where(outside(wide, bound), edge, clamped)
        return clamped

    return Change(made)


def _rowwise(chosen: Chosen) -> Tensor:
    """A value of one number, one vector, or one vector for each token, on the device."""
    rows, channels = chosen.num_rows, chosen.num_channels
    array = chosen.plan.spec.value
    if array is not None and array.shape not in ((), (channels,), (rows, channels)):
        raise chosen.bad(
            f"the value has shape {list(array.shape)}; give one number, a vector [{channels}] or a"
            f" matrix [{rows}, {channels}]"
        )
    return torch.from_numpy(chosen.numbers()).to(chosen.device)


def _of_places(value: Tensor, places: list[int]) -> Tensor:
    if value.dim() < 2 or places == list(range(value.shape[0])):
        return value
    return value.index_select(0, torch.tensor(places, dtype=torch.int64, device=value.device))


# --- over many elements -----------------------------------------------------------------------


def _project_out(chosen: Chosen) -> Change:
    channels, array = chosen.num_channels, chosen.plan.spec.value
    if array is not None and (
        array.shape[-1:] != (channels,) or not 1 <= len(array.shape) <= 2 or not array.shape[0]
    ):
        raise chosen.bad(
            f"the value has shape {list(array.shape)}; give a direction [{channels}] or several"
            f" [directions, {channels}]"
        )
    directions = np.atleast_2d(chosen.numbers().astype(np.float64))
    units = orthonormal(directions)
    if not len(units):
        raise chosen.bad("every direction is zero, so there is nothing to project out")
    basis, compute = torch.from_numpy(units).to(chosen.device), chosen.compute

    def made(before: Tensor, places: list[int]) -> Tensor:
        part = ((before.to(torch.float64) @ basis.T) @ basis).to(compute)
        left = (before.to(compute) - part).to(before.dtype)
        return torch.where(before.isnan() | (part == 0), before, left)

    note = None
    if len(units) < len(directions):
        note = f"of {len(directions)} directions only {len(units)} are independent"
    return Change(made, note=note)


def orthonormal(directions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """An orthonormal basis `[rank, channels]` of the span of `directions` [k, channels].

    Gram and Schmidt's, each direction reduced twice. Those that depend on others before them add
    nothing; a single direction is only divided by its length.

        orthonormal(np.array([[3.0, 0.0], [6.0, 0.0]]))    # [[1, 0]]
    """
    basis = np.zeros_like(directions)
    rank = 0
    for direction in directions:
        largest = float(np.abs(direction).max())
        if largest == 0:
            continue
        # divided first, so that no square overflows or is lost
        left = direction / largest
        length = float(np.linalg.norm(left))
        for _ in range(2):
            left = left - (left @ basis[:rank].T) @ basis[:rank]
        remainder = float(np.linalg.norm(left))
        if remainder > _DEPENDENT * length and rank < basis.shape[1]:
            basis[rank] = left / remainder
            rank += 1
    return basis[:rank]


def _mean(chosen: Chosen) -> Change:
    total = torch.zeros(chosen.num_channels, dtype=torch.float64, device=chosen.device)
    count = 0
    for places, part in chosen.parts():
        total += part.to(torch.float64).sum(0)
        count += len(places)
    mean = (total / max(count, 1)).to(chosen.compute).to(chosen.dtype)

    def made(before: Tensor, places: list[int]) -> Tensor:
        # equal numbers keep their bits: minus zero is equal to zero
        return torch.where(before.isnan() | (before == mean), before, mean)

    return Change(made)


def _swap(chosen: Chosen) -> Change:
    parts = list(chosen.parts())
    places = [place for found, _ in parts for place in found]
    if sorted(places) != [0, 1]:
        raise chosen.bad(
            f"swap changes the places of exactly two tokens, and {chosen.num_rows} are chosen"
        )
    rows = torch.cat([part for _, part in parts])
    pair = rows if places == [0, 1] else rows.flip(0)
    return Change(lambda before, at: _of_places(pair.flip(0), at), moves=True)


# --- the next token ---------------------------------------------------------------------------


def _ban(chosen: Chosen) -> Change:
    index = _token_index(chosen)

    def made(before: Tensor, places: list[int]) -> Tensor:
        return _drawable(chosen, before.index_fill(1, index, -math.inf))

    return Change(made, bans=True)


def _force(chosen: Chosen) -> Change:
    token = _token_index(chosen, 1)

    def made(before: Tensor, places: list[int]) -> Tensor:
        logit = before.index_select(1, token)
        logit = torch.where(logit.isfinite(), logit, torch.zeros_like(logit))
        return torch.full_like(before, -math.inf).index_copy(1, token, logit)

    return Change(made, bans=True)


def _replace(chosen: Chosen) -> Change:
    instead, token = _token_index(chosen, 2).flip(0).split(1)

    def made(before: Tensor, places: list[int]) -> Tensor:
        larger = torch.maximum(before.index_select(1, token), before.index_select(1, instead))
        after = before.index_copy(1, instead, larger).index_fill(1, token, -math.inf)
        return _drawable(chosen, after)

    return Change(made, bans=True)


def _token_index(chosen: Chosen, count: int | None = None) -> Tensor:
    ids, size = chosen.plan.spec.token_ids, chosen.num_channels
    if not ids or (count is not None and len(ids) != count):
        raise chosen.bad(
            f"{chosen.plan.spec.kind} names {len(ids)} tokens, it takes {count or 'one or more'}"
        )
    if not 0 <= min(ids) <= max(ids) < size:
        raise chosen.bad(
            f"tokens {min(ids)} to {max(ids)} are named, and the logits are of 0 to {size - 1}"
        )
    return torch.tensor(ids, dtype=torch.int64, device=chosen.device)


def _drawable(chosen: Chosen, logits: Tensor) -> Tensor:
    """The logits, unless every token of them is banned."""
    if logits.numel() and not bool((logits > -math.inf).any()):
        raise chosen.bad(
            f"with this {chosen.plan.spec.kind} none of {chosen.num_channels} tokens could be"
            " drawn: leave one, or remove an earlier ban"
        )
    return logits


_KINDS: dict[str, Callable[[Chosen], Change]] = {
    "scale": _scale,
    "add": _add,
    "set": _set,
    "zero": _zero,
    "clamp": _clamp,
    "project_out": _project_out,
    "mean": _mean,
    "swap": _swap,
    "force": _force,
    "ban": _ban,
    "replace": _replace,
}
