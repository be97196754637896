"""The form of plain arguments: numbers, switches, texts. A wrong one is refused before anything is
sent; whether a value fits the session is decided by the server.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from kernel_server.protocol.errors import BadArgument, UnknownLocation

#: Whole numbers the server can be told, see the codec.
_MOST = 2**63
#: Characters of a wrong value that a message shows.
_SHOWN = 60


def whole(value: object, name: str, *, least: int | None = None) -> int:
    """A whole number, of Python or numpy; a bool is none."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise BadArgument(f"{name} is a whole number, not {shown(value)}")
    if least is not None and value < least:
        raise BadArgument(f"{name} is a whole number from {least}, not {shown(value)}")
    if not -_MOST <= value < _MOST:
        raise BadArgument(f"{name} is a whole number below 2**63, not {shown(value)}")
    return int(value)


def real(value: object, name: str) -> float:
    """A number that a float can hold, NaN and infinities included: the server judges its range."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise BadArgument(f"{name} is a number, not {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise BadArgument(f"{name} is a number up to 1.8e308, not {shown(value)}") from None


def flag(value: object, name: str) -> bool:
    """True or False; a text such as "no" would count as true, so it is refused."""
    if not isinstance(value, (bool, np.bool_)):
        raise BadArgument(f"{name} is True or False, not {shown(value)}")
    return bool(value)


def text_or_none(value: object, name: str) -> str | None:
    """A text that can be sent, or None."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadArgument(f"{name} is a text, not {shown(value)}")
    return value


def seconds(value: object, name: str) -> float:
    """A time from 0; None is no limit."""
    if value is None:
        return math.inf
    fits = isinstance(value, (int, float, np.integer, np.floating))
    if not fits or isinstance(value, bool) or not value >= 0:  # type: ignore[operator]
        raise BadArgument(f"{name} is seconds from 0, or None for no limit, not {shown(value)}")
    return real(value, name)


def warn_of_unused(temperature: float, **wishes: object) -> None:
    """Say that what only a sampler uses was asked of a greedy run; None is what was not asked."""
    named = [f"{name}={value}" for name, value in wishes.items() if value is not None]
    if temperature == 0 and named:
        part = "has" if len(named) == 1 else "have"
        warnings.warn(
            f"temperature is 0, which takes the most probable token, so {' and '.join(named)}"
            f" {part} no effect: temperature=0.8, say, draws tokens",
            stacklevel=3,
        )


def shown(value: object) -> str:
    """A wrong value as a message shows it: one line, and not all of it when it is long."""
    # a whole number of thousands of digits refuses to be printed at all
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"a number of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def listed(locations: object, purpose: str) -> list[Any]:
    """Locations as a list, from one of them or several; `purpose` is what they are for."""
    if isinstance(locations, (str, int, np.integer)):
        return [locations if isinstance(locations, (str, bool)) else int(locations)]
    try:
        found = [*locations]  # type: ignore[misc]
    except TypeError:
        raise UnknownLocation(
            f"locations are a layer number, a name, or a list of them, not {shown(locations)}"
        ) from None
    if not found:
        raise BadArgument(f"name at least one location to {purpose}")
    return [int(one) if isinstance(one, np.integer) else one for one in found]
