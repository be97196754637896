"""A list of token ids that is never changed: read and compared as its bytes, numbers on demand.

Every description of a session names all its tokens, and most of them are never looked at. So they
lie here as they cross the wire, int64 in a row: what has the same tokens shares one object, and
sending, receiving and comparing them touches no number. Whose tokens they are is not known here.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

_ITEM_BYTES = 8


class TokenList(Sequence[int]):
    """Token ids in order; equal to a tuple of the same numbers, and a slice of it is one.

    Raises OverflowError for a number outside int64.

        ids = TokenList([5, 6]) + [7]
        len(ids), ids[-1], ids[:2]     # 3, 7, (5, 6)
        TokenList.of_bytes(ids.packed) == ids
    """

    __slots__ = ("_ids", "packed")

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._take(array("q", ids).tobytes())

    @classmethod
    def of_bytes(cls, packed: bytes | memoryview) -> TokenList:
        """Those of int64 in this machine's order of bytes; a view is copied."""
        made = cls.__new__(cls)
        made._take(bytes(packed))
        return made

    def _take(self, packed: bytes) -> None:
        #: int64 in this machine's order of bytes
        self.packed = packed
        self._ids = memoryview(packed).cast("q")

    def on_wire(self) -> bytes:
        """int64, little-endian."""
        return self.packed if sys.byteorder == "little" else _swapped(self.packed)

    @classmethod
    def from_wire(cls, packed: bytes | memoryview) -> TokenList:
        """Those of int64, little-endian."""
        return cls.of_bytes(packed if sys.byteorder == "little" else _swapped(packed))

    def __len__(self) -> int:
        return len(self.packed) // _ITEM_BYTES

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...

    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        found = self._ids[index]
        return tuple(found.tolist()) if isinstance(found, memoryview) else found

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids.tolist())

    def __add__(self, more: Iterable[int]) -> TokenList:
        """These and more behind them."""
        return self.of_bytes(self.packed + array("q", more).tobytes())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenList):
            return self.packed == other.packed
        if isinstance(other, tuple):
            return len(self) == len(other) and tuple(self) == other
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __reduce__(self) -> tuple[type[TokenList], tuple[tuple[int, ...]]]:
        return TokenList, (tuple(self),)

    def __repr__(self) -> str:
        return f"TokenList({list(self)})"


def _swapped(packed: bytes | memoryview) -> bytes:
    swapped = array("q")
    swapped.frombytes(packed)
    swapped.byteswap()
    return swapped.tobytes()
