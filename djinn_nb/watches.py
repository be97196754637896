"""What a data breakpoint watches, as a condition and locations: both are plain data, and shown.

Only form is checked here; the server decides whether the condition can be judged at the places.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from djinn_nb.checks import flag, real, shown
from djinn_nb.sites import is_residual, locations
from kernel_server.protocol.condition_closures import write
from kernel_server.protocol.conditions import LENS_NAMES, parse_condition
from kernel_server.protocol.errors import BadArgument, UnknownLocation
from kernel_server.protocol.messages import ModelInfo

EVERY_LAYER, EVERY_SITE = "every layer", "every site"

#: keyword -> the condition that it stands for
_SWITCHES = {
    "nan": "num_nan > 0",
    "inf": "num_inf > 0",
    "top_token_changes": "top_token_changed",
}
_LIMITS = {"norm_above": "norm >", "entropy_above": "entropy >", "entropy_below": "entropy <"}


def watched(watches: Mapping[str, object], condition: str | None) -> str:
    """The condition of exactly one watch, or the one given.

    >>> watched({"nan": True}, None), watched({"cosine_above": ("joy", 0.5)}, None)
    ('num_nan > 0', 'cosine("joy") > 0.5')
    """
    given = {name: value for name, value in watches.items() if value is not None}
    given = {name: value for name, value in given.items() if value is not False}
    if len(given) + (condition is not None) != 1:
        names = [*given, *(["condition"] if condition is not None else [])]
        raise BadArgument(
            f"give exactly one of {', '.join(watches)} or condition;"
            f" got {' and '.join(names) or 'none'}"
        )
    if condition is not None:
        if not isinstance(condition, str):
            raise BadArgument(f"a condition is a text such as 'norm > 30', not {shown(condition)}")
        return condition
    ((name, value),) = given.items()
    if name in _SWITCHES:
        flag(value, name)
        return _SWITCHES[name]
    if name in _LIMITS:
        if name == "entropy_below" and real(value, name) <= 0:
            raise BadArgument(f"{name} is more than 0 nats, as an entropy is, not {shown(value)}")
        return f"{_LIMITS[name]} {_number(value, name)}"
    if name == "top_token":
        if not isinstance(value, str) or not value:
            raise BadArgument(f"top_token is the text of a token, not {shown(value)}")
        return f"top_token == {write(value)}"
    if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], str):
        raise BadArgument(f'{name} is a name and a number, as in ("joy", 0.5), not {shown(value)}')
    limit = _number(value[1], name)
    if not -1 <= float(limit) < 1:
        raise BadArgument(f"{name} is from -1 to less than 1, as a cosine is, not {limit}")
    return f"cosine({write(value[0])}) > {limit}"


def _number(value: object, name: str) -> str:
    found = real(value, name)
    if not math.isfinite(found):
        raise BadArgument(f"{name} is a finite number, not {shown(value)}")
    return str(int(found)) if found == int(found) and abs(found) < 2**53 else repr(found)


def places(at: object, condition: str | None, model: ModelInfo) -> tuple[str, ...]:
    """Locations as names for the server: "every layer" (its output), "every site" where the
    condition can be judged, one location or several."""
    if isinstance(at, (int, np.integer, str)) and not isinstance(at, (bool, np.bool_)):
        if at == EVERY_LAYER:
            return tuple(f"layers.{layer}.output" for layer in range(model.num_layers))
        if at == EVERY_SITE:
            return _every_site(condition, model)
        return (str(at),)
    if not isinstance(at, Iterable):
        raise UnknownLocation(
            f"locations are {EVERY_LAYER!r}, {EVERY_SITE!r}, layer numbers or names, not"
            f" {shown(at)}"
        )
    found = []
    for one in at:
        if isinstance(one, (bool, np.bool_)) or not isinstance(one, (int, str, np.integer)):
            raise UnknownLocation(f"a location is a layer number or a name, not {shown(one)}")
        found.append(str(one))
    if not found:
        raise UnknownLocation("an empty list of locations: give at least one")
    return tuple(found)


def _every_site(condition: str | None, model: ModelInfo) -> tuple[str, ...]:
    """Each place once: the input of a layer is the output of the one before."""
    found = [name for name in locations(model) if not name.endswith(".input")]
    names = parse_condition(condition).names if condition is not None else frozenset()
    if names & LENS_NAMES:
        found = [n for n in found if n == "logits" or is_residual(n, model.num_layers)]
    if "cosine" in names:
        found = [name for name in found if is_residual(name, model.num_layers)]
    return tuple(found)
