"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from kernel_server.protocol.errors import BadArgument

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4,
          "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `2GiB`, `500MB` or `1073741824`.

    >>> parse_bytes("2GiB")
    2147483648
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if not found:
        raise BadArgument(f"{text!r} is not a size: write 2GiB, 500MB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2] or ""])
