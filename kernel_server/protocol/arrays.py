"""A tensor as it crosses the wire: dtype, shape and raw bytes. No torch, and no copy on reading."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernel_server.protocol.errors import BadMessage

#: dtype name -> bytes per element. The names are torch's.
ITEM_BYTES: dict[str, int] = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}

MAX_DIMENSIONS = 8
#: bound of the product of a shape's numbers that are not zero; more is no tensor
_MAX_ELEMENTS = 2**48


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """Raw little-endian, C-contiguous elements with their dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise BadMessage(f"array dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        if len(self.shape) > MAX_DIMENSIONS or any(n < 0 for n in self.shape):
            raise BadMessage(f"array shape {list(self.shape)} is not a shape")
        # an empty array needs no bytes, however large its other numbers are
        if math.prod(n for n in self.shape if n) > _MAX_ELEMENTS:
            raise BadMessage(f"array shape {str(list(self.shape))[:60]} is too large")
        if self.nbytes != len(self.data):
            raise BadMessage(
                f"array of shape {list(self.shape)} {self.dtype} needs {self.nbytes} bytes,"
                f" {len(self.data)} came"
            )

    @property
    def nbytes(self) -> int:
        """Size of the elements, bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def numpy(self) -> npt.NDArray[Any]:
        """The values as numpy; bfloat16 becomes float32, which holds every bfloat16 exactly."""
        if self.dtype == "bfloat16":
            raw = np.frombuffer(self.data, dtype="<u2").astype("<u4") << 16
            return raw.view("<f4").reshape(self.shape)
        if self.dtype == "bool":
            # any byte may have come; numpy's own must be 0 or 1
            return np.frombuffer(self.data, dtype="u1").astype(np.bool_).reshape(self.shape)
        little = np.dtype(self.dtype).newbyteorder("<")
        return np.frombuffer(self.data, dtype=little).reshape(self.shape)

    @classmethod
    def from_numpy(cls, values: npt.ArrayLike) -> Array:
        """Wrap a numpy array, copying only when it is not contiguous and little-endian."""
        array = np.asarray(values)
        if array.dtype.name not in ITEM_BYTES:
            raise BadMessage(f"arrays of dtype {array.dtype} do not cross the wire")
        name, shape = array.dtype.name, array.shape
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        # memoryview.cast refuses shapes that hold a zero
        data = array.data.cast("B") if array.size else b""
        return cls(name, tuple(shape), data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return (
            self.dtype == other.dtype
            and self.shape == other.shape
            and bytes(self.data) == bytes(other.data)
        )

    def __hash__(self) -> int:
        return hash((self.dtype, self.shape))

    def __repr__(self) -> str:
        return f"Array({self.dtype}, {list(self.shape)})"
