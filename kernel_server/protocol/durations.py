"""Durations as people write them, and as they are told."""

from __future__ import annotations

import re

from kernel_server.protocol.errors import BadArgument

_UNITS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as `8h`, `90min`, `30s`, `2d` or `30`.

    >>> parse_seconds("90min")
    5400.0
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)?\s*", text)
    if not found:
        raise BadArgument(f"{text!r} is no duration: write 8h, 90min, 30s or a number of seconds")
    return float(found[1]) * _UNITS[found[2] or ""]


def in_words(seconds: float) -> str:
    """A duration in the largest unit of which it is at least two.

    >>> in_words(28800), in_words(5400), in_words(2.96)
    ('8 h', '90 min', '2.96 s')
    """
    for unit in ("d", "h", "min"):
        if seconds >= 2 * _UNITS[unit]:
            return f"{seconds / _UNITS[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"
