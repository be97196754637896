"""Figures of the tensor at a point: norms and summaries.

The tensor comes in chunks, `[1, tokens, width]` or `[tokens, width]`, and is only read. What
conditions make of it is decided in `checks`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.messages import Summary

_INFINITY = float("inf")


def token_norms(chunks: Sequence[Tensor]) -> list[float]:
    """L2 norm of each token's vector, computed in float32, one per token."""
    if len(chunks) == 1:
        return row_norms(chunks[0]).flatten().tolist()
    return torch.cat([row_norms(chunk).flatten() for chunk in chunks]).tolist()


def row_norms(values: Tensor) -> Tensor:
    """L2 norm of each row along the last axis, computed in float32, where the values are."""
    if values.dtype == torch.float64:
        values = values.float()
    return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)


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
    norms = row_norms(rows)
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
