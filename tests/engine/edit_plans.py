"""Edits and tensors for the tests of what edits compute, on any device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.messages import EditSpec
from kernel_server.state.instructions import EditPlan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
FIRST = 100


def plan(
    kind: Any,
    *,
    rows: tuple[int, ...] | None = None,
    channels: tuple[int, ...] | None = None,
    value: Any = None,
    edit_id: int = 1,
    **spec: Any,
) -> EditPlan:
    if value is not None:
        spec["value"] = Array.from_numpy(np.asarray(value, dtype=np.float32))
    edit = EditSpec(kind=kind, location="layers.0.output", **spec)
    return EditPlan(edit_id=edit_id, point=1, spec=edit, rows=rows, channels=channels)


def chunks_of(sizes: list[int], width: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(1, size, width, generator=generator).to(dtype) for size in sizes]


def bits(chunks: list[Tensor]) -> list[list[Any]]:
    return [chunk.view(BITS[chunk.dtype]).tolist() for chunk in chunks]


def awkward(dtype: torch.dtype) -> Tensor:
    """Zeros of both signs, infinities, subnormals and NaNs with payloads, `[1, 2, 8]`."""
    patterns = {
        torch.float32: [
            0x7FC00001,
            -0x3FFFFF,
            0x7F800001,
            1,
            -0x80000000,
            0,
            0x7F800000,
            0x7F7FFFFF,
        ],
        torch.bfloat16: [0x7FC1, -0x3F, 0x7F81, 1, -0x8000, 0, 0x7F80, 0x7F7F],
        torch.float16: [0x7E01, -0x1FF, 0x7C01, 1, -0x8000, 0, 0x7C00, 0x7BFF],
    }
    row = torch.tensor(patterns[dtype], dtype=BITS[dtype]).view(dtype)
    return torch.stack([row, row.flip(0)])[None]
