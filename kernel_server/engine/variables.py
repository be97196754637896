"""Figures of the tensor at a point: the variables of conditions, summaries.

The tensor comes in chunks, `[1, tokens, width]` or `[tokens, width]`, and is only read. Which
breakpoints are judged where, and what follows, is decided by the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.messages import Summary
from kernel_server.state.instructions import Check

_INFINITY = float("inf")


def token_norms(chunks: Sequence[Tensor]) -> list[float]:
    """L2 norm of each token's vector, computed in float32, one per token."""
    if len(chunks) == 1:
        return _norms(chunks[0]).flatten().tolist()
    return torch.cat([_norms(chunk).flatten() for chunk in chunks]).tolist()


def _norms(values: Tensor) -> Tensor:
    if values.dtype == torch.float64:
        values = values.float()
    return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)


class _TokenValues(dict[str, Any]):
    """The variables of one token; the norms are computed when the first condition asks."""

    __slots__ = ("norms", "row")

    def __init__(self, norms: _Norms) -> None:
        super().__init__()
        self.norms = norms
        self.row = 0

    def __missing__(self, name: str) -> Any:
        if name != "norm":
            raise KeyError(name)
        self["norm"] = value = self.norms.of(self.row)
        return value


class _Norms:
    """Norms of all tokens, computed at most once."""

    __slots__ = ("_chunks", "_found")

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        self._chunks = chunks
        self._found: list[float] | None = None

    def of(self, row: int) -> float:
        if self._found is None:
            self._found = token_norms(self._chunks)
        return self._found[row]


def evaluate_checks(
    checks: Sequence[Check],
    chunks: Sequence[Tensor],
    token_ids: Sequence[int],
    texts: Callable[[int], str],
    first_token: int,
    forward: int,
) -> dict[int, tuple[int, ...]]:
    """Absolute positions at which each check holds, by breakpoint id; those that hold nowhere are
    left out.

    chunks: the tensor at the point, `[1, tokens, width]` each. It may hold the last rows only
    (logits): then only their tokens are judged. token_ids: those fed in this forward, the first at
    position `first_token`.

    Raises `BadCondition` when a condition cannot be computed (division by zero).
    """
    if len(token_ids) == 1:
        return _judge_one(checks, chunks[0], token_ids[0], texts, first_token, forward)
    num_rows = sum(chunk.shape[-2] for chunk in chunks)
    skipped = len(token_ids) - num_rows
    first = first_token + skipped
    held: dict[int, tuple[int, ...]] = {}
    judged = []
    for check in checks:
        if check.holds is None:
            held[check.breakpoint_id] = tuple(range(first, first + num_rows))
        else:
            judged.append((check.holds, check.hits, check.breakpoint_id))
    if not judged:
        return held
    needs_text = any("token" in check.names for check in checks)
    values = _TokenValues(_Norms(chunks))
    values["forward"] = forward
    positions: dict[int, list[int]] = {}
    for row in range(num_rows):
        token_id = token_ids[skipped + row]
        values.row = row
        values.pop("norm", None)
        values["position"] = first + row
        values["token_id"] = token_id
        if needs_text:
            values["token"] = texts(token_id)
        for holds, hits, breakpoint_id in judged:
            values["hits"] = hits
            if holds(values):
                positions.setdefault(breakpoint_id, []).append(first + row)
    for breakpoint_id, found in positions.items():
        held[breakpoint_id] = tuple(found)
    return held


class _OneToken(dict[str, Any]):
    """The variables of a decode's token; the norm is computed when a condition asks."""

    __slots__ = ("chunk",)

    def __init__(self, chunk: Tensor) -> None:
        super().__init__()
        self.chunk = chunk

    def __missing__(self, name: str) -> Any:
        if name != "norm":
            raise KeyError(name)
        self[name] = norm = _norms(self.chunk).item()
        return norm


def _judge_one(
    checks: Sequence[Check],
    chunk: Tensor,
    token_id: int,
    texts: Callable[[int], str],
    position: int,
    forward: int,
) -> dict[int, tuple[int, ...]]:
    """`evaluate_checks` for a single token: every decode with an armed breakpoint pays this."""
    values = _OneToken(chunk)
    values["forward"], values["position"], values["token_id"] = forward, position, token_id
    held: dict[int, tuple[int, ...]] = {}
    for check in checks:
        if check.holds is not None:
            if "token" in check.names:
                values["token"] = texts(token_id)
            values["hits"] = check.hits
            if not check.holds(values):
                continue
        held[check.breakpoint_id] = (position,)
    return held


def summarize(chunks: Sequence[Tensor], location: str) -> Summary:
    """Figures of a tensor given in chunks of rows, for a look before its elements are asked for.

    minimum, maximum, mean: of the elements that are not NaN (NaN when there are none). norm and
    the norms per token: of all elements, so NaN where one is. All computed in float32 or wider.
    """
    width = chunks[0].shape[-1]
    parts = [_part(chunk.reshape(-1, width)) for chunk in chunks]
    per_token = torch.cat([rows for rows, _ in parts]).cpu()
    # one row of figures per chunk, brought over together
    figures = torch.stack([row for _, row in parts]).cpu()
    total, squares, num_nan, num_inf = figures[:, 2:].sum(0).tolist()
    num_elements = per_token.shape[0] * width
    num_numbers = num_elements - int(num_nan)
    nothing = float("nan")
    return Summary(
        location=location,
        dtype=str(chunks[0].dtype).removeprefix("torch."),
        shape=(per_token.shape[0], width),
        minimum=float(figures[:, 0].min()) if num_numbers else nothing,
        maximum=float(figures[:, 1].max()) if num_numbers else nothing,
        mean=total / num_numbers if num_numbers else nothing,
        norm=squares**0.5,
        num_nan=int(num_nan),
        num_inf=int(num_inf),
        per_token=Array.from_numpy(per_token.numpy()),
    )


def _part(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of `rows` [tokens, width]: norm and largest magnitude per token, float32 [tokens, 2]; and
    minimum, maximum, sum, sum of squares, NaN and infinite counts, float64 [6]."""
    rows = rows.to(torch.float32)
    norms = _norms(rows)
    per_token = torch.stack([norms, rows.abs().amax(-1)], 1)
    is_nan = rows.isnan()
    if not rows.numel():
        none = [_INFINITY, -_INFINITY, 0.0, 0.0, 0.0, 0.0]
        return per_token, torch.tensor(none, dtype=torch.float64, device=rows.device)
    figures = [
        rows.masked_fill(is_nan, _INFINITY).amin(),
        rows.masked_fill(is_nan, -_INFINITY).amax(),
        rows.masked_fill(is_nan, 0).sum(dtype=torch.float64),
        norms.to(torch.float64).square().sum(),
        is_nan.sum(),
        rows.isinf().sum(),
    ]
    return per_token, torch.stack([figure.to(torch.float64) for figure in figures])
